"""The layers that Delta touches, for a writer that runs the same few examples through them many times.

    lower_layers.py --> LowerOutput --> prepare --> Chunk --> score: log-probs of the answers, gradient of B
                        once per write    once per step, where it takes other rows than the last

These are not computed again and again, and every number stays as it is (up to rounding):

    shared prefix    tokens that all examples begin with: once per episode, under its own B (flat_batch.py)
    parents          a card that others stand behind: once, and they attend to it
    padding          none: streams are flat, and only attention sees rectangles
    first MLP        its inputs depend on no B: W x and A x are kept over steps and writes (first_mlp.py), and
                     no gradient goes below
    last layer       queries, MLP, norm and head at answer positions only
    head             the gradient of the cross-entropy is formed beside the log-probs, block by block, so no
                     logits are kept (``kernels.head_pass``)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from actors.fast_weights.delta import Basis, StackedWeights
from actors.write.first_mlp import GATE_AND_UP, FirstMlp, Stream, key_of
from actors.write.flat_batch import FlatBatch, make_flat_batch
from actors.write.frozen_llama import FrozenLayer, FrozenLlama, times_frozen
from actors.write.kernels import add_grouped, head_pass, kl_pass, shrink_grouped
from actors.write.lower_layers import Row, chunks_of, parents_of, spans_of


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Rows that go through the upper layers together, with all that does not depend on B.

    numbers: the rows' places among those that were prepared. sizes: tokens of their answers.
    episodes int64 [G]: whose B each group of ``batch`` acts under.
    stream: of all tokens, or of the answers alone where the first adapted MLP is in the last layer.
    taught, preserved: places of the two kinds of answer tokens, where there are both. base: log-probs [A, V]
    of each preserved row.
    """

    numbers: tuple[int, ...]
    sizes: tuple[int, ...]
    episodes: Tensor
    batch: FlatBatch
    rotary: tuple[Tensor, Tensor]
    stream: Stream
    targets: Tensor
    taught: Tensor
    preserved: Tensor
    base: tuple[Tensor, ...]


class UpperLayers:
    """From the first adapted MLP to the head. B and A are tensors of the caller; theta gets no gradient."""

    def __init__(self, model: FrozenLlama, basis: Basis, chunk_tokens: int, hard_below: float = 1.0) -> None:
        """``hard_below``: only answer tokens of at most this probability give a gradient."""
        self._model, self._most = model, math.log(hard_below)
        self._first, self._last = basis.first_layer, len(model.layers) - 1
        self._chunk_tokens = chunk_tokens
        self._a = {name: matrix.to(model.device, model.dtype) for name, matrix in basis.a.items()}
        self._rank = basis.rank
        self._first_mlp = FirstMlp(model, basis, self._a, chunk_tokens)

    # --- once per write -------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, prefix: int, rows: Sequence[Row]) -> tuple[Chunk, ...]:
        """Make what ``score`` needs of ``rows``, which all begin with the same ``prefix`` tokens."""
        inputs, episodes = [row.inputs[prefix:] for row in rows], [row.episode for row in rows]
        lengths, answers = [len(ids) for ids in inputs], [len(row.targets) for row in rows]
        parents = parents_of(episodes, inputs, answers)
        streams = self._first_mlp.streams(rows)
        chunks = []
        for numbers in chunks_of(lengths, episodes, parents, prefix, self._chunk_tokens):
            groups = [list(group) for _, group in groupby(numbers, lambda i: episodes[i])]
            spans = [spans_of(group, lengths, answers, parents) for group in groups]
            batch = make_flat_batch(prefix, spans, self._model.device)
            # Each group repeats the prefix: above the lower layers it runs under that episode's own B.
            pieces = [
                piece
                for group, of_group in zip(groups, spans, strict=True)
                for piece in (
                    streams[group[0]].first(prefix),
                    *(streams[i].last(span.length) for i, span in zip(group, of_group, strict=True)),
                )
            ]
            chunks.append(self._chunk([rows[i] for i in numbers], numbers, batch, Stream.joined(pieces)))
        return tuple(chunks)

    # --- once per step --------------------------------------------------------------------------------------

    def score(
        self, chunks: Sequence[Chunk], weights: StackedWeights, loss_weights: Sequence[float]
    ) -> list[Tensor]:
        """Log-probs [A] float32 of each prepared row's answer under its episode's fast weights.

        Of a preserved row it is the KL [A] to its ``base``. Adds the gradient of sum(loss weight * loss) to
        the tensors of ``weights``, where the loss is -log-prob or KL. A row has one loss weight.
        """
        by_row: dict[int, Tensor] = {}
        for chunk in chunks:
            with torch.enable_grad():
                states = self._states(chunk, self._of_groups(weights, chunk))
            per_token = [
                loss_weights[row]
                for row, size in zip(chunk.numbers, chunk.sizes, strict=True)
                for _ in range(size)
            ]
            # The head's own gradient comes from these passes; autograd takes over from the states downwards.
            values, gradient = self._losses(chunk, states.detach(), torch.tensor(per_token))
            torch.autograd.backward(states, gradient)
            by_row.update(_by_row(chunk, values))
        return [by_row[i] for i in range(len(by_row))]

    def _losses(self, chunk: Chunk, states: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probs or KL of each answer token, and the gradient of their weighted sum by ``states``."""
        head, taught, kept = self._model.head, chunk.taught, chunk.preserved
        if not chunk.base:
            return head_pass(states, head, chunk.targets, weights, self._most)
        kl, of_kept = kl_pass(states[kept], head, chunk.base, weights.to(kept.device)[kept])
        values = torch.empty(len(states), device=states.device).index_copy_(0, kept, kl)
        gradient = torch.empty_like(states).index_copy_(0, kept, of_kept)
        if len(taught):
            own_weights = weights.to(taught.device)[taught]
            logprobs, of_taught = head_pass(
                states[taught], head, chunk.targets[taught], own_weights, self._most
            )
            values.index_copy_(0, taught, logprobs)
            assert of_taught is not None
            gradient.index_copy_(0, taught, of_taught)
        return values, gradient

    @torch.no_grad()
    def distributions(self, chunks: Sequence[Chunk], weights: StackedWeights) -> list[Tensor]:
        """Log-probs float32 [A, V] of the whole vocabulary at each prepared row's answer tokens."""
        by_row: dict[int, Tensor] = {}
        for chunk in chunks:
            states = self._states(chunk, self._of_groups(weights, chunk))
            rows = states.split(list(chunk.sizes))
            by_row |= {
                number: (row @ self._model.head.T).float().log_softmax(-1)
                for number, row in zip(chunk.numbers, rows, strict=True)
            }
        return [by_row[i] for i in range(len(by_row))]

    @torch.no_grad()
    def measure(self, *parts: tuple[Sequence[Chunk], StackedWeights]) -> list[list[Tensor]]:
        """The log-probs alone, for several sets of chunks, each under its own weights. The head runs once."""
        states = [
            self._states(chunk, self._of_groups(weights, chunk))
            for chunks, weights in parts
            for chunk in chunks
        ]
        targets = [chunk.targets for chunks, _ in parts for chunk in chunks]
        logprobs, _ = head_pass(torch.cat(states), self._model.head, torch.cat(targets), None)
        of_chunks = iter(logprobs.split([len(target) for target in targets]))
        of_parts = [
            dict(pair for chunk in chunks for pair in _by_row(chunk, next(of_chunks))) for chunks, _ in parts
        ]
        return [[by_row[i] for i in range(len(by_row))] for by_row in of_parts]

    def _of_groups(self, weights: StackedWeights, chunk: Chunk) -> StackedWeights:
        """The fast weights of the chunk's groups, in the model's dtype."""
        return weights.map(lambda matrix: matrix.index_select(0, chunk.episodes).to(self._model.dtype))

    # --- the passes -----------------------------------------------------------------------------------------

    def _chunk(self, rows: Sequence[Row], numbers: Sequence[int], batch: FlatBatch, stream: Stream) -> Chunk:
        device = self._model.device
        if self._first == self._last:
            stream = stream.map(batch.answers_of)  # no later attention reads the other tokens
        kept = torch.tensor([row.base is not None for row in rows for _ in row.targets])
        return Chunk(
            numbers=tuple(numbers),
            sizes=tuple(len(row.targets) for row in rows),
            episodes=torch.tensor(list(dict.fromkeys(row.episode for row in rows)), device=device),
            batch=batch,
            rotary=self._model.rotary(batch),
            stream=stream,
            targets=torch.cat([row.targets for row in rows]),
            taught=(~kept).nonzero()[:, 0].to(device),
            preserved=kept.nonzero()[:, 0].to(device),
            base=tuple(base for row in rows if (base := row.base) is not None),
        )

    def _states(self, chunk: Chunk, weights: StackedWeights) -> Tensor:
        """The normed stream [sum of A, d] at the answer-predicting positions. ``weights``: of the groups."""
        model, batch, stream = self._model, chunk.batch, chunk.stream
        shrunk = stream.shrunk if stream.x is None else self._shrink(self._first, stream.x, weights.a, batch)
        hidden = self._mlp(self._first, stream.hidden, stream.gate_up, shrunk, weights, batch)
        for number in range(self._first + 1, self._last + 1):
            # Autograd adds up gradients in the order of these calls: it decides the last bit.
            layer = model.layers[number]
            if number < self._last:
                hidden = hidden + model.attention(layer, hidden, batch, chunk.rotary)
            else:
                residual = batch.answers_of(hidden)
                hidden = residual + model.answer_attention(layer, hidden, batch, chunk.rotary)
            x = model.normed(hidden, layer.post_norm)
            gate_up = layer.gate_up(x)
            shrunk = self._shrink(number, x, weights.a, batch)
            hidden = self._mlp(number, hidden, gate_up, shrunk, weights, batch)
        return model.final_norm(hidden)

    def _shrink(self, number: int, x: Tensor, a: Mapping[str, Tensor], batch: FlatBatch) -> dict[str, Tensor]:
        """A x of the adapted ones among gate and up: one matmul for both where all groups share A."""
        names = [name for name in GATE_AND_UP if key_of(number, name) in self._a]
        if not names:
            return {}
        if a:
            offsets = self._offsets(number, batch)
            return {name: shrink_grouped(x, a[key_of(number, name)], offsets) for name in names}
        together = times_frozen(x, torch.cat([self._a[key_of(number, name)] for name in names]), None)
        return dict(zip(names, together.split(self._rank, dim=-1), strict=True))

    def _offsets(self, number: int, batch: FlatBatch) -> tuple[int, ...]:
        return batch.answer_offsets if number == self._last else batch.offsets

    def _mlp(
        self,
        number: int,
        hidden: Tensor,
        gate_up: Tensor,
        shrunk: Mapping[str, Tensor],
        weights: StackedWeights,
        batch: FlatBatch,
    ) -> Tensor:
        """hidden + MLP under Delta, given W x and A x of its first two projections."""
        offsets, b = self._offsets(number, batch), weights.b
        layer: FrozenLayer = self._model.layers[number]
        gate, up = gate_up.chunk(2, dim=-1)
        if "gate_proj" in shrunk:
            gate = add_grouped(gate, shrunk["gate_proj"], b[key_of(number, "gate_proj")], offsets)
        if "up_proj" in shrunk:
            up = add_grouped(up, shrunk["up_proj"], b[key_of(number, "up_proj")], offsets)
        act = functional.silu(gate) * up
        down = layer.down(act)
        if (key := key_of(number, "down_proj")) in self._a:
            if weights.a:
                small = shrink_grouped(act, weights.a[key], offsets)
            else:
                small = times_frozen(act, self._a[key], None)
            down = add_grouped(down, small, b[key], offsets)
        return hidden + down


def _by_row(chunk: Chunk, logprobs: Tensor) -> Iterator[tuple[int, Tensor]]:
    return zip(chunk.numbers, torch.split(logprobs, list(chunk.sizes)), strict=True)
