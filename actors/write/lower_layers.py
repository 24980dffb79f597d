"""The layers below Delta. They depend on no B, so a write runs each example through them once.

    parts (the flashcards, the probes)  -->  pieces, each with one shared prefix  -->  one flat stream
                                                                                           |
    upper_layers.py  <--  LowerOutput: the stream [T, d] of each example  <-- remembered --+

The stream is what enters the first adapted MLP: behind the layers below it, and the attention of its own
layer.
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

_OwnedExample = tuple[int, WriteExample]  # the number of its episode, and the example


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One example behind the lower layers, without the shared prefix.

    hidden [T, d]: its stream. targets int64 [A]: the answer. The last A positions of ``hidden`` predict it,
    as the last answer token is no input. base float32 [A, V]: the log-probs that a preserved reply keeps;
    None for an example that is taught.
    """

    episode: int
    hidden: Tensor
    targets: Tensor
    base: Tensor | None = None

    @property
    def span(self) -> RowSpan:
        return RowSpan(len(self.hidden), len(self.targets))


@dataclass(frozen=True, slots=True, eq=False)
class LowerOutput:
    """All examples of one part. prefix [P, d]: the P >= 0 tokens that every example begins with."""

    prefix: Tensor
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Examples that run together. sizes: tokens of their shared prefix, then of each example without it."""

    examples: list[WriteExample]
    ids: tuple[int, ...]
    sizes: list[int]
    batch: FlatBatch


class LowerLayers:
    """The layers below ``first``, and the attention of layer ``first``. Remembers the streams of late."""

    def __init__(self, model: FrozenLlama, first: int, chunk_tokens: int) -> None:
        self._model, self._first, self._chunk_tokens = model, first, chunk_tokens
        self._remembered: dict[WriteExample, Tensor] = {}  # oldest first

    @torch.no_grad()
    def read(self, *parts: Sequence[_OwnedExample]) -> tuple[LowerOutput, ...]:
        """Run (episode, example) pairs, at least one in each part; the rows come back in their order.

        Each part has a shared prefix of its own. The matmuls of all parts are done together.
        """
        streams = self._streams([[example for _, example in part] for part in parts])
        return tuple(self._output(part, streams) for part in parts)

    def _output(self, part: Sequence[_OwnedExample], streams: Mapping[WriteExample, Tensor]) -> LowerOutput:
        shared = len(shared_prefix([example.prompt_ids for _, example in part]))
        device = self._model.device
        rows = [
            Row(episode, streams[example][shared:], torch.tensor(example.answer_ids, device=device))
            for episode, example in part
        ]
        return LowerOutput(streams[part[0][1]][:shared], tuple(rows))

    def _streams(self, parts: Sequence[Sequence[WriteExample]]) -> dict[WriteExample, Tensor]:
        """The stream of each example, remembered or run now."""
        wanted = dict.fromkeys(example for part in parts for example in part)
        # What is used again becomes the newest: taken out here, put back behind all others by _remember.
        streams = {
            example: self._remembered.pop(example) for example in wanted if example in self._remembered
        }
        new = [list(dict.fromkeys(example for example in part if example not in streams)) for part in parts]
        streams |= self._run(new)
        self._remember(streams)
        return streams

    def _run(self, parts: Sequence[Sequence[WriteExample]]) -> dict[WriteExample, Tensor]:
        """The stream [T, d] of each example's inputs, the prefix of its part included."""
        pieces = [piece for examples in parts if examples for piece in self._pieces(examples)]
        streams: dict[WriteExample, Tensor] = {}
        for together in _filled(pieces, self._chunk_tokens):
            batches = ConcatenatedBatches(tuple(piece.batch for piece in together))
            ids = torch.tensor(
                [token for piece in together for token in piece.ids], device=self._model.device
            )
            of_pieces = self._pass(ids, batches).split(batches.sizes)
            for piece, stream in zip(together, of_pieces, strict=True):
                prefix, *rows = stream.split(piece.sizes)
                for example, row in zip(piece.examples, rows, strict=True):
                    streams[example] = torch.cat([prefix, row])
        return streams

    def _pieces(self, examples: Sequence[WriteExample]) -> Iterator[_Piece]:
        shared = shared_prefix([example.prompt_ids for example in examples])
        # Without the last answer token: nothing is predicted from it.
        inputs = [(*example.prompt_ids, *example.answer_ids[:-1])[len(shared) :] for example in examples]
        lengths = [len(ids) for ids in inputs]
        for chunk in chunks_of(lengths, [0] * len(examples), len(shared), self._chunk_tokens):
            spans = [RowSpan(lengths[i], len(examples[i].answer_ids)) for i in chunk]
            yield _Piece(
                examples=[examples[i] for i in chunk],
                ids=(*shared, *(token for i in chunk for token in inputs[i])),
                sizes=[len(shared), *(span.length for span in spans)],
                batch=make_flat_batch(len(shared), [spans], self._model.device),
            )

    def _remember(self, streams: Mapping[WriteExample, Tensor]) -> None:
        """Keep the newest ``_KEPT_TOKENS``: a write that rehearses earlier flashcards meets them again."""
        self._remembered.update(streams)
        kept = sum(len(stream) for stream in self._remembered.values())
        for example in list(self._remembered):
            if kept <= _KEPT_TOKENS:
                break
            kept -= len(self._remembered.pop(example))

    def _pass(self, ids: Tensor, pattern: AttentionPattern) -> Tensor:
        model, rotary = self._model, self._model.rotary(pattern)
        hidden = model.embed(ids)
        for layer in model.layers[: self._first]:
            hidden = hidden + model.attention(layer, hidden, pattern, rotary)
            hidden = hidden + model.feed(layer, hidden)
        return hidden + model.attention(model.layers[self._first], hidden, pattern, rotary)


def chunks_of(lengths: Sequence[int], groups: Sequence[int], prefix: int, limit: int) -> Iterator[list[int]]:
    """Indices in the order of their groups, at most ``limit`` tokens in a chunk; a longer row is alone.

    A chunk holds the prefix once per group, so a group is split only where it is too long for one chunk.
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
    """The tokens that all prompts begin with.

    No prompt's last token is among them: it predicts an answer, so it belongs to its own row.
    """
    equal = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False)))
    return prompts[0][: min(equal, *(len(prompt) - 1 for prompt in prompts))]


def _filled(pieces: Iterable[_Piece], limit: int) -> Iterator[list[_Piece]]:
    """Neighbours together, at most ``limit`` tokens (a longer piece is alone)."""
    together: list[_Piece] = []
    for piece in pieces:
        if together and sum(len(member.ids) for member in (*together, piece)) > limit:
            yield together
            together = []
        together.append(piece)
    if together:
        yield together
