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
    """One example behind the lower layers.

    hidden [T, d]: the stream of its T inputs; the last answer token is none. targets int64 [A]: the answer,
    which the last A positions predict. base float32 [A, V]: the log-probs that a preserved reply keeps; None
    for an example that is taught.
    """

    episode: int
    example: WriteExample
    hidden: Tensor
    targets: Tensor
    base: Tensor | None = None

    @property
    def inputs(self) -> tuple[int, ...]:
        return inputs_of(self.example)


@dataclass(frozen=True, slots=True, eq=False)
class LowerOutput:
    """All examples of one part. prefix: how many tokens every example begins with, 0 or more."""

    prefix: int
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Examples that run together. ids: the shared prefix, then the own tokens of each. sizes: of these.

    parents: the place of the example that each one continues.
    """

    examples: list[WriteExample]
    ids: tuple[int, ...]
    sizes: list[int]
    parents: list[int | None]
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
        device = self._model.device
        rows = [
            Row(episode, example, streams[example], torch.tensor(example.answer_ids, device=device))
            for episode, example in part
        ]
        return LowerOutput(len(shared_prefix([example.prompt_ids for _, example in part])), tuple(rows))

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
                for example, row, parent in zip(piece.examples, rows, piece.parents, strict=True):
                    before = prefix if parent is None else streams[piece.examples[parent]]
                    streams[example] = torch.cat([before, row])
        return streams

    def _pieces(self, examples: Sequence[WriteExample]) -> Iterator[_Piece]:
        shared = shared_prefix([example.prompt_ids for example in examples])
        inputs = [inputs_of(example)[len(shared) :] for example in examples]
        answers = [len(example.answer_ids) for example in examples]
        parents = parents_of([0] * len(examples), inputs, answers)
        lengths = [len(ids) for ids in inputs]
        for chunk in chunks_of(lengths, [0] * len(examples), parents, len(shared), self._chunk_tokens):
            spans = spans_of(chunk, lengths, answers, parents)
            own = (inputs[i][-span.length :] for i, span in zip(chunk, spans, strict=True))
            yield _Piece(
                examples=[examples[i] for i in chunk],
                ids=(*shared, *(token for ids in own for token in ids)),
                sizes=[len(shared), *(span.length for span in spans)],
                parents=[span.parent for span in spans],
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


def parents_of(
    groups: Sequence[int], inputs: Sequence[tuple[int, ...]], answers: Sequence[int]
) -> list[int | None]:
    """The row of its group that each row continues: the longest with which it begins, before its answer."""
    rows = {(group, ids): i for i, (group, ids) in enumerate(zip(groups, inputs, strict=True))}
    lengths = sorted({len(ids) for ids in inputs}, reverse=True)
    parents: list[int | None] = []
    for group, ids, size in zip(groups, inputs, answers, strict=True):
        beginnings = ((group, ids[:length]) for length in lengths if 0 < length <= len(ids) - size)
        parents.append(next((rows[beginning] for beginning in beginnings if beginning in rows), None))
    return parents


def spans_of(
    rows: Sequence[int], lengths: Sequence[int], answers: Sequence[int], parents: Sequence[int | None]
) -> list[RowSpan]:
    """The spans of ``rows`` of one group, each behind its parent, which is there before it."""
    place = {i: number for number, i in enumerate(rows)}
    spans = []
    for i in rows:
        parent = parents[i]
        if parent is None:
            spans.append(RowSpan(lengths[i], answers[i]))
        else:
            spans.append(RowSpan(lengths[i] - lengths[parent], answers[i], place[parent]))
    return spans


def chunks_of(
    lengths: Sequence[int],
    groups: Sequence[int],
    parents: Sequence[int | None],
    prefix: int,
    limit: int,
) -> Iterator[list[int]]:
    """Indices in the order of their groups, at most ``limit`` tokens in a chunk; a longer family is alone.

    A chunk holds the prefix once per group, so a group is split only where it is too long for one chunk. A
    row and its parent are in the same chunk, the parent first. lengths: with the parents' tokens.
    """
    chunk: list[int] = []
    tokens = 0
    for family in _families(lengths, groups, parents):
        group = groups[family[0]]
        own = sum(lengths[i] - (0 if (parent := parents[i]) is None else lengths[parent]) for i in family)
        cost = own + (prefix if not chunk or groups[chunk[-1]] != group else 0)
        if chunk and tokens + cost > limit:
            yield chunk
            chunk, tokens = [], 0
            cost = own + prefix
        chunk += family
        tokens += cost
    if chunk:
        yield chunk


def _families(
    lengths: Sequence[int], groups: Sequence[int], parents: Sequence[int | None]
) -> list[list[int]]:
    """The rows with all that continue them, parents first; by group, then short ones first."""
    families: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        root = i
        while (parent := parents[root]) is not None:
            root = parent
        families.setdefault(root, []).append(i)
    return sorted(families.values(), key=lambda family: (groups[family[0]], lengths[family[-1]]))


def inputs_of(example: WriteExample) -> tuple[int, ...]:
    """Without the last answer token: nothing is predicted from that."""
    return (*example.prompt_ids, *example.answer_ids[:-1])


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
