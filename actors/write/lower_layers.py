"""The part of a cut model below Delta: it depends on no B, so each example runs through it once, in one stream with all others of its write.

    parts (the flashcards, the probes)  -->  pieces of one shared prefix each  -->  one flat stream  -->  stream [T, d] of each example, remembered

The stream is the one that enters the first adapted MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from actors.types import WriteExample
from actors.write.flat_batch import ConcatenatedBatches, FlatBatch, RowSpan, make_flat_batch
from actors.write.frozen_llama import AttentionPattern, FrozenLlama

_KEPT_TOKENS = 8192  # 19 MB of SmolLM2-135M, 84 MB of a 4B model in float32


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Examples that go through the trunk together. sizes: of the prefix that they share, and of each without it."""

    examples: list[WriteExample]
    ids: tuple[int, ...]
    sizes: list[int]
    layout: FlatBatch


class LowerLayers:
    """Layers below ``cut`` and the attention of that one. Holds what was read lately."""

    def __init__(self, model: FrozenLlama, cut: int, chunk_tokens: int) -> None:
        self._model, self._cut, self._chunk_tokens = model, cut, chunk_tokens
        self._read: dict[WriteExample, Tensor] = {}  # oldest first

    @torch.no_grad()
    def read(self, parts: Sequence[Sequence[WriteExample]]) -> dict[WriteExample, Tensor]:
        """The stream of each example's inputs. A part has a shared prefix of its own; the matmuls of all parts are done together."""
        wanted = dict.fromkeys(example for part in parts for example in part)
        found = {example: self._read.pop(example) for example in wanted if example in self._read}
        found |= self._run(
            [list(dict.fromkeys(example for example in part if example not in found)) for part in parts]
        )
        self._remember(found)
        return found

    def _run(self, parts: Sequence[Sequence[WriteExample]]) -> dict[WriteExample, Tensor]:
        """The stream [T, d] of each example's inputs, the prefix that its part shares included."""
        pieces = [piece for examples in parts if examples for piece in self._pieces(examples)]
        streams: dict[WriteExample, Tensor] = {}
        for together in _filled(pieces, self._chunk_tokens):
            beside = ConcatenatedBatches(tuple(piece.layout for piece in together))
            ids = torch.tensor(
                [token for piece in together for token in piece.ids], device=self._model.device
            )
            for piece, stream in zip(together, self._pass(ids, beside).split(beside.sizes), strict=True):
                prefix, *rows = stream.split(piece.sizes)
                streams.update(
                    {
                        example: torch.cat([prefix, row])
                        for example, row in zip(piece.examples, rows, strict=True)
                    }
                )
        return streams

    def _pieces(self, examples: Sequence[WriteExample]) -> Iterator[_Piece]:
        shared = shared_prefix([example.prompt_ids for example in examples])
        lengths = [
            len(example.prompt_ids) + len(example.answer_ids) - 1 - len(shared) for example in examples
        ]
        for chunk in chunks_of(lengths, [0] * len(examples), len(shared), self._chunk_tokens):
            mine = [examples[i] for i in chunk]
            spans = [RowSpan(lengths[i], len(examples[i].answer_ids)) for i in chunk]
            ids = (
                *shared,
                *(token for one in mine for token in (*one.prompt_ids, *one.answer_ids[:-1])[len(shared) :]),
            )
            yield _Piece(
                mine,
                ids,
                [len(shared), *(span.length for span in spans)],
                make_flat_batch(len(shared), [spans], self._model.device),
            )

    def _remember(self, streams: Mapping[WriteExample, Tensor]) -> None:
        """Keep the newest ``_KEPT_TOKENS``: a write that rehearses earlier flashcards meets them again, and no B changes what the trunk gives."""
        self._read.update(streams)
        kept = sum(len(stream) for stream in self._read.values())
        for example in list(self._read):
            if kept <= _KEPT_TOKENS:
                break
            kept -= len(self._read.pop(example))

    def _pass(self, ids: Tensor, layout: AttentionPattern) -> Tensor:
        model, rotary = self._model, self._model.rotary(layout)
        hidden = model.embed(ids)
        for layer in model.layers[: self._cut]:
            hidden = hidden + model.attention(layer, hidden, layout, rotary)
            hidden = hidden + model.feed(layer, hidden)
        return hidden + model.attention(model.layers[self._cut], hidden, layout, rotary)


def chunks_of(lengths: Sequence[int], groups: Sequence[int], prefix: int, limit: int) -> Iterator[list[int]]:
    """Indices in the order of their groups, each chunk at most ``limit`` tokens (a longer row is its own chunk).

    A chunk holds the prefix once per group, so a group is split only where it is too long for one.
    """
    chunk: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: (groups[i], lengths[i])):
        cost = lengths[i] + (prefix if not chunk or groups[chunk[-1]] != groups[i] else 0)
        if chunk and tokens + cost > limit:
            yield chunk
            chunk, tokens = [], 0
            cost = lengths[i] + prefix
        chunk.append(i)
        tokens += cost
    if chunk:
        yield chunk


def shared_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all prompts begin with, short of any prompt's last token: that one predicts an answer and belongs to its row."""
    equal = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False)))
    return prompts[0][: min(equal, *(len(prompt) - 1 for prompt in prompts))]


def _filled(pieces: Iterable[_Piece], limit: int) -> Iterator[list[_Piece]]:
    """Neighbours together, at most ``limit`` tokens (a longer piece is alone)."""
    together: list[_Piece] = []
    for piece in pieces:
        if together and sum(len(one.ids) for one in (*together, piece)) > limit:
            yield together
            together = []
        together.append(piece)
    if together:
        yield together
