"""Reads rows of tokens under fast weights that change from reading to reading.

A reading gives the log-probs of the written answers. ``answer`` gives what greedy decoding says instead.

    rows --> [layers below the cut] --> Block --> [layers from the cut up, merged] --> Reading --> answer
             once; keys kept              |       W + B A, for each reading                          |
                                          +---- keys and values of the layers below -----------------+

The cut is the first layer that Delta touches. The written answer is the draft of greedy decoding (speculative
decoding, arXiv 2211.17192, with a draft that costs nothing): as far as the model says the same, no token is
decoded. So a measurement gets cheaper the more is remembered. Every product is that of the base model with
merged weights: under Delta = 0 a reading is the base model's, bit for bit.

Why not transformers' ``generate`` with the injected Delta: it needs the model a second time, and a
measurement of 12 facts (48 questions, SmolLM2-135M, one core) takes 13.7 s of CPU instead of 3.8 s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from actors.fast_weights.delta import Basis, check
from actors.types import FastWeights, WriteExample
from actors.write.frozen_llama import FrozenLayer, FrozenLlama, Linear

KeyValues = tuple[Tensor, Tensor]  # each [R, kv heads, T, head_dim]
BLOCK_ROWS = 32
# Bounds the logits of one reading: 201 MB at a vocabulary of 49k, 623 MB at 152k (float32).
BLOCK_TOKENS = 1024


class _Frame:
    """One pass of R rows of T tokens through one layer.

    Attention is causal, and over ``past`` as far as ``mask`` [R, 1, T, K] allows. ``kept``: all keys and
    values after the pass.
    """

    def __init__(self, positions: Tensor, past: KeyValues | None, mask: Tensor | None) -> None:
        self._rows, self._past, self._mask = positions.shape[0], past, mask
        self.positions = positions.flatten()
        self.kept: KeyValues | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (self._rows, -1)).transpose(1, 2) for x in (q, k, v))
        if self._past is not None:
            k, v = torch.cat([self._past[0], k], dim=2), torch.cat([self._past[1], v], dim=2)
        self.kept = (k, v)
        grouped: Any = {"enable_gqa": q.shape[1] != k.shape[1]}
        attended = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=self._mask, is_causal=self._past is None, **grouped
        )
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Rows that are read together, after the layers below the cut.

    numbers      the rows' places among those that were prepared
    prompts      int64 [R]: prompt lengths
    positions    int64 [R, T] of the inputs: prompt and answer without its last token, padded on the right
    hidden       [R * T, d]
    keys         of the layers below the cut; empty if no answer will be asked for
    predicting   int64 [sum of answers]: the places in ``hidden`` that predict the answers' tokens
    targets      int64 [sum of answers]
    """

    numbers: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    prompts: Tensor
    positions: Tensor
    hidden: Tensor
    keys: tuple[KeyValues, ...]
    predicting: Tensor
    targets: Tensor

    @property
    def sizes(self) -> list[int]:
        return [len(answer) for answer in self.answers]


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """``table`` float32 [sum of answers, V]: log-probs of every token at each answer position.

    ``keys``: of the layers from the cut up.
    """

    table: Tensor
    keys: tuple[KeyValues, ...]


def merged_layers(model: FrozenLlama, basis: Basis, weights: FastWeights) -> tuple[FrozenLayer, ...]:
    """The layers from the cut up, with W + B A in place of W. Revision 0 gives the base model's.

    Raises BasisError.
    """
    check(weights, basis)
    layers = model.layers[basis.first_layer :]
    if weights.revision == 0:
        return tuple(layers)
    device = model.device
    deltas: dict[str, Tensor] = {}  # [d_out, d_in]
    for name, b in weights.b.items():
        # A revision has an A of its own if writes move A.
        a = torch.from_numpy(weights.a[name]) if weights.a else basis.a[name]
        deltas[name] = (torch.from_numpy(b).to(device) @ a.to(device)).to(model.dtype)
    return tuple(
        _merged(layer, number, deltas) for number, layer in enumerate(layers, start=basis.first_layer)
    )


def _merged(layer: FrozenLayer, number: int, deltas: Mapping[str, Tensor]) -> FrozenLayer:
    def delta(projection: str) -> Tensor | None:
        return deltas.get(f"model.layers.{number}.mlp.{projection}")

    assert layer.gate_up.weight is not None and layer.down.weight is not None, "the model has no weights here"
    gate_up, down = layer.gate_up.weight.clone(), layer.down.weight
    for rows, part in zip(gate_up.chunk(2), (delta("gate_proj"), delta("up_proj")), strict=True):
        if part is not None:
            rows.add_(part)
    if (part := delta("down_proj")) is not None:
        down = down + part
    merged_gate_up, merged_down = (
        Linear(gate_up, layer.gate_up.bias, None),
        Linear(down, layer.down.bias, None),
    )
    return replace(layer, gate_up=merged_gate_up, down=merged_down)


class Reader:
    """Reads and answers with one model. ``stop``: the tokens that end an answer."""

    def __init__(self, model: FrozenLlama, stop: Sequence[int]) -> None:
        self.model, self._stop = model, frozenset(stop)

    @torch.no_grad()
    def prepare(self, examples: Sequence[WriteExample], cut: int, answered: bool) -> tuple[Block, ...]:
        """Run the layers below the cut. A block has at most BLOCK_ROWS rows of similar length.

        ``answered``: keep what ``answer`` needs.
        """
        lengths = [len(example.prompt_ids) + len(example.answer_ids) - 1 for example in examples]
        return tuple(self._block(examples, numbers, cut, answered) for numbers in _chunks(lengths))

    @torch.no_grad()
    def read(self, block: Block, layers: Sequence[FrozenLayer]) -> Reading:
        """Run ``layers``, those from the block's cut up (``merged_layers``)."""
        hidden, keys = self._through(layers, block.hidden, block.positions, None, None)
        return Reading(self._logits(hidden[block.predicting]).log_softmax(-1), keys)

    @torch.no_grad()
    def answer(
        self, block: Block, reading: Reading, layers: Sequence[FrozenLayer], most: int
    ) -> list[tuple[int, ...]]:
        """Greedy answers to the rows' prompts, of at most ``most`` tokens with the stop token."""
        guesses = reading.table.argmax(-1).split(block.sizes)  # by row, the likeliest token at each position
        drafts = zip(block.answers, guesses, strict=True)
        said = [_own_words(draft, row_guesses.tolist())[:most] for draft, row_guesses in drafts]
        going = [row for row, tokens in enumerate(said) if not self._ended(tokens, most)]
        if not going:
            return [tuple(tokens) for tokens in said]
        model, rows = self.model, torch.tensor(going, device=self.model.device)
        keys: tuple[KeyValues, ...] = tuple((k[rows], v[rows]) for k, v in (*block.keys, *reading.keys))
        # Where the last token said stands in its row. All keys before it are the answer's own.
        place = block.prompts[rows] + torch.tensor([len(said[row]) - 1 for row in going], device=model.device)
        seen = torch.arange(block.positions.shape[1], device=model.device) < place[:, None]
        all_layers = [*model.layers[: len(block.keys)], *layers]
        while not all(self._ended(said[row], most) for row in going):
            seen = torch.cat([seen, torch.ones(len(going), 1, dtype=torch.bool, device=model.device)], dim=1)
            hidden = model.embed(torch.tensor([said[row][-1] for row in going], device=model.device))
            hidden, keys = self._through(all_layers, hidden, place[:, None], keys, seen[:, None, None])
            for row, token in zip(going, self._logits(hidden).argmax(-1).tolist(), strict=True):
                if not self._ended(said[row], most):
                    said[row].append(token)
            place = place + 1
        return [tuple(tokens) for tokens in said]

    def _ended(self, tokens: Sequence[int], most: int) -> bool:
        return tokens[-1] in self._stop or len(tokens) >= most

    def _block(
        self, examples: Sequence[WriteExample], numbers: Sequence[int], cut: int, answered: bool
    ) -> Block:
        device, rows = self.model.device, [examples[number] for number in numbers]
        inputs = [(*example.prompt_ids, *example.answer_ids[:-1]) for example in rows]
        width = max(map(len, inputs))
        ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in inputs], device=device)
        positions = torch.arange(width, device=device).expand(len(rows), width)
        below = self.model.layers[:cut]
        hidden, keys = self._through(below, self.model.embed(ids.flatten()), positions, None, None)
        starts = [row * width + len(example.prompt_ids) - 1 for row, example in enumerate(rows)]
        spans = [(start, len(example.answer_ids)) for start, example in zip(starts, rows, strict=True)]
        predicting = [place for start, size in spans for place in range(start, start + size)]
        targets = [token for example in rows for token in example.answer_ids]
        return Block(
            numbers=tuple(numbers),
            answers=tuple(example.answer_ids for example in rows),
            prompts=torch.tensor([len(example.prompt_ids) for example in rows], device=device),
            positions=positions,
            hidden=hidden,
            keys=keys if answered else (),
            predicting=torch.tensor(predicting, device=device),
            targets=torch.tensor(targets, device=device),
        )

    def _through(
        self,
        layers: Sequence[FrozenLayer],
        hidden: Tensor,
        positions: Tensor,
        past: Sequence[KeyValues] | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, tuple[KeyValues, ...]]:
        """Run ``hidden`` [R * T, d] through whole layers. Returns the keys and values of each too.

        ``positions`` [R, T].
        """
        kept: list[KeyValues] = []
        rotary: tuple[Tensor, Tensor] | None = None
        for number, layer in enumerate(layers):
            frame = _Frame(positions, None if past is None else past[number], mask)
            rotary = rotary or self.model.rotary(frame)
            hidden = hidden + self.model.attention(layer, hidden, frame, rotary)
            hidden = hidden + self.model.feed(layer, hidden)
            assert frame.kept is not None
            kept.append(frame.kept)
        return hidden, tuple(kept)

    def _logits(self, hidden: Tensor) -> Tensor:
        return (self.model.final_norm(hidden) @ self.model.head.T).float()


def _own_words(draft: Sequence[int], guesses: Sequence[int]) -> list[int]:
    """The draft as far as the model says the same, then the model's own token."""
    pairs = enumerate(zip(draft, guesses, strict=True))
    same = next((place for place, (token, guess) in pairs if token != guess), len(draft))
    return [*draft[:same], *guesses[same : same + 1]]


def _chunks(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of rows, shortest first, at most BLOCK_ROWS and BLOCK_TOKENS (with padding) together.

    A longer row is alone.
    """
    chunk: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chunk and (len(chunk) == BLOCK_ROWS or (len(chunk) + 1) * lengths[place] > BLOCK_TOKENS):
            yield chunk
            chunk = []
        chunk.append(place)
    if chunk:
        yield chunk
