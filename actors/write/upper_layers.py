"""A frozen model cut where Delta begins to act, for a writer that runs the same few examples through it many times.

    tokens --> [layers below the cut, and the cut layer's attention] --> Reading --> prepare --> Chunk --> score: log-probs of the answers,
               the trunk (trunk.py): does not depend on B, once per write            once per minibatch           gradient of B: once per step

What leaves every number as it is (up to rounding) and is not computed again and again:

    shared prefix    tokens that all examples begin with run once in the trunk, and above the cut once per episode (layout.py)
    no padding       streams are flat; only attention sees rectangles
    first MLP        its inputs do not depend on B: W x and A x are kept over the epochs, and no gradient goes below it
    last layer       queries, MLP, norm and head at answer positions only
    head             the gradient of the cross-entropy is formed beside the log-probs, block by block: no logits are kept (``head_pass``)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from actors.fast_weights.delta import Basis, StackedWeights
from actors.types import WriteExample
from actors.write.flat_batch import FlatBatch, RowSpan, make_flat_batch
from actors.write.frozen_llama import FrozenLayer, FrozenLlama, times_frozen
from actors.write.kernels import add_grouped, head_pass, shrink_grouped
from actors.write.lower_layers import LowerLayers, chunks_of, shared_prefix


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One example after the trunk, without the shared prefix. hidden [T, d]: the stream that enters the first adapted MLP.

    targets int64 [A]: the answer; the last A positions of ``hidden`` predict it (the last answer token is no input).
    """

    episode: int
    hidden: Tensor
    targets: Tensor

    @property
    def span(self) -> RowSpan:
        return RowSpan(len(self.hidden), len(self.targets))


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """All examples of a write after the trunk. prefix [P, d]: the same stream for the P >= 0 tokens that every example begins with."""

    prefix: Tensor
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Rows that go through the tail together, with all that does not depend on B.

    numbers: the rows' places among those that were prepared; sizes: of their answers. episodes int64 [G]: whose B each group acts under.
    hidden [n, d], gate_up [n, 2 f], shrunk [n, rank] by projection: the cut MLP's residual stream, W x and A x; n is all tokens, or the answers where
    the cut layer is the last. Where the write moves A too there is no A x to keep, but its x [n, d].
    """

    numbers: tuple[int, ...]
    sizes: tuple[int, ...]
    episodes: Tensor
    layout: FlatBatch
    rotary: tuple[Tensor, Tensor]
    hidden: Tensor
    gate_up: Tensor
    shrunk: Mapping[str, Tensor]
    x: Tensor | None
    targets: Tensor


class UpperLayers:
    """See the module's text."""

    def __init__(self, model: FrozenLlama, basis: Basis, chunk_tokens: int) -> None:
        self.model = model
        self._cut, self._last = basis.first_layer, len(model.layers) - 1
        self._chunk_tokens = chunk_tokens
        self._a = {name: matrix.to(model.device, model.dtype) for name, matrix in basis.a.items()}
        self.rank, self._train_a = basis.rank, basis.train_a
        self._trunk = LowerLayers(model, self._cut, chunk_tokens)

    # --- once per write ------------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, *parts: Sequence[tuple[int, WriteExample]]) -> tuple[Reading, ...]:
        """The trunk's streams of (episode, example) pairs, at least one in each part; rows come back in their order.

        Each part has a shared prefix of its own; their matmuls are done together. What was read lately is not run again.
        """
        found = self._trunk.read([[example for _, example in part] for part in parts])
        return tuple(self._reading(part, found) for part in parts)

    def _reading(
        self, examples: Sequence[tuple[int, WriteExample]], found: Mapping[WriteExample, Tensor]
    ) -> Reading:
        shared = len(shared_prefix([example.prompt_ids for _, example in examples]))
        rows = [
            Row(episode, found[example][shared:], torch.tensor(example.answer_ids, device=self.model.device))
            for episode, example in examples
        ]
        return Reading(found[examples[0][1]][:shared], tuple(rows))

    @torch.no_grad()
    def prepare(self, reading: Reading, rows: Sequence[Row]) -> tuple[Chunk, ...]:
        """What ``score`` needs of some ``rows`` of ``reading``, made once for all epochs that use them."""
        prefix = len(reading.prefix)
        return tuple(
            self._prepare_chunk(reading.prefix, rows, chunk)
            for chunk in chunks_of(
                [len(row.hidden) for row in rows], [row.episode for row in rows], prefix, self._chunk_tokens
            )
        )

    # --- once per step -------------------------------------------------------------------------------------------------------------------------

    def score(
        self, chunks: Sequence[Chunk], weights: StackedWeights, loss_weights: Sequence[float]
    ) -> list[Tensor]:
        """Log-probs [A] float32 of each prepared row's answer under its episode's fast weights.

        Adds the gradient of -sum(loss weight * log-prob) to the tensors of ``weights``; one of ``loss_weights`` a row.
        """
        out: dict[int, Tensor] = {}
        for chunk in chunks:
            with torch.enable_grad():
                states = self._tail(chunk, self._of_groups(weights, chunk))
            shares = torch.tensor(
                [
                    loss_weights[i]
                    for i, size in zip(chunk.numbers, chunk.sizes, strict=True)
                    for _ in range(size)
                ]
            )
            logprobs, gradient = head_pass(states.detach(), self.model.head, chunk.targets, shares)
            torch.autograd.backward(states, gradient)
            out.update(_by_row(chunk, logprobs))
        return [out[i] for i in range(len(out))]

    @torch.no_grad()
    def measure(self, *parts: tuple[Sequence[Chunk], StackedWeights]) -> list[list[Tensor]]:
        """The log-probs alone, for several sets of chunks, each under fast weights of its own; the head runs once for all."""
        states = [
            self._tail(chunk, self._of_groups(weights, chunk))
            for chunks, weights in parts
            for chunk in chunks
        ]
        targets = [chunk.targets for chunks, _ in parts for chunk in chunks]
        logprobs, _ = head_pass(torch.cat(states), self.model.head, torch.cat(targets), None)
        pieces = iter(logprobs.split([len(one) for one in targets]))
        scored = [
            dict(pair for chunk in chunks for pair in _by_row(chunk, next(pieces))) for chunks, _ in parts
        ]
        return [[rows[i] for i in range(len(rows))] for rows in scored]

    def _of_groups(self, weights: StackedWeights, chunk: Chunk) -> StackedWeights:
        """Those of the chunk's groups, in the model's dtype."""
        b, a = (
            {name: x.index_select(0, chunk.episodes).to(self.model.dtype) for name, x in side.items()}
            for side in (weights.b, weights.a)
        )
        return StackedWeights(b, a)

    # --- the passes ----------------------------------------------------------------------------------------------------------------------------

    def _prepare_chunk(self, prefix: Tensor, rows: Sequence[Row], numbers: Sequence[int]) -> Chunk:
        episodes = sorted({rows[i].episode for i in numbers})
        groups = [[i for i in numbers if rows[i].episode == episode] for episode in episodes]
        layout = make_flat_batch(
            len(prefix), [[rows[i].span for i in group] for group in groups], self.model.device
        )
        hidden = torch.cat(
            [piece for group in groups for piece in (prefix, *(rows[i].hidden for i in group))]
        )
        if self._cut == self._last:
            hidden = layout.answers_of(hidden)
        layer = self.model.layers[self._cut]
        x = self.model.normed(hidden, layer.post_norm)
        adapted = [name for name in ("gate_proj", "up_proj") if _key(self._cut, name) in self._a]
        return Chunk(
            numbers=tuple(i for group in groups for i in group),
            sizes=tuple(len(rows[i].targets) for group in groups for i in group),
            episodes=torch.tensor(episodes, device=self.model.device),
            layout=layout,
            rotary=self.model.rotary(layout),
            hidden=hidden,
            gate_up=layer.gate_up(x),
            shrunk={} if self._train_a else {name: x @ self._a[_key(self._cut, name)].T for name in adapted},
            x=x if self._train_a else None,
            targets=torch.cat([rows[i].targets for group in groups for i in group]),
        )

    def _tail(self, chunk: Chunk, weights: StackedWeights) -> Tensor:
        """The normed stream at the answer-predicting positions [sum of A, d]; ``weights``: of this chunk's groups."""
        model, layout = self.model, chunk.layout
        shrunk = chunk.shrunk if chunk.x is None else self._shrink(self._cut, chunk.x, weights.a, layout)
        hidden = self._mlp(self._cut, chunk.hidden, chunk.gate_up, shrunk, weights, layout)
        for number in range(self._cut + 1, self._last + 1):
            layer = model.layers[number]
            if number < self._last:
                hidden = hidden + model.attention(layer, hidden, layout, chunk.rotary)
            else:
                hidden = layout.answers_of(hidden) + model.answer_attention(
                    layer, hidden, layout, chunk.rotary
                )
            x = model.normed(hidden, layer.post_norm)
            hidden = self._mlp(
                number, hidden, layer.gate_up(x), self._shrink(number, x, weights.a, layout), weights, layout
            )
        return model.final_norm(hidden)

    def _shrink(
        self, number: int, x: Tensor, a: Mapping[str, Tensor], layout: FlatBatch
    ) -> dict[str, Tensor]:
        """A x of the gate and up projections, those that are adapted, as one matmul where all groups share A."""
        names = [name for name in ("gate_proj", "up_proj") if _key(number, name) in self._a]
        if not names:
            return {}
        if a:
            return {
                name: shrink_grouped(x, a[_key(number, name)], self._offsets(number, layout))
                for name in names
            }
        together = times_frozen(x, torch.cat([self._a[_key(number, name)] for name in names]), None)
        return dict(zip(names, together.split(self.rank, dim=-1), strict=True))

    def _offsets(self, number: int, layout: FlatBatch) -> tuple[int, ...]:
        return layout.answer_offsets if number == self._last else layout.offsets

    def _mlp(
        self,
        number: int,
        hidden: Tensor,
        gate_up: Tensor,
        shrunk: Mapping[str, Tensor],
        weights: StackedWeights,
        layout: FlatBatch,
    ) -> Tensor:
        """hidden + MLP under Delta, given W x and A x of its first two projections."""
        offsets, b = self._offsets(number, layout), weights.b
        layer: FrozenLayer = self.model.layers[number]
        gate, up = gate_up.chunk(2, dim=-1)
        if "gate_proj" in shrunk:
            gate = add_grouped(gate, shrunk["gate_proj"], b[_key(number, "gate_proj")], offsets)
        if "up_proj" in shrunk:
            up = add_grouped(up, shrunk["up_proj"], b[_key(number, "up_proj")], offsets)
        act = functional.silu(gate) * up
        fed = layer.down(act)
        if (key := _key(number, "down_proj")) in self._a:
            small = (
                shrink_grouped(act, weights.a[key], offsets)
                if weights.a
                else times_frozen(act, self._a[key], None)
            )
            fed = add_grouped(fed, small, b[key], offsets)
        return hidden + fed


def _by_row(chunk: Chunk, logprobs: Tensor) -> Iterator[tuple[int, Tensor]]:
    return zip(chunk.numbers, torch.split(logprobs, list(chunk.sizes)), strict=True)


def _key(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.{projection}"
