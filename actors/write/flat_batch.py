"""Examples of many episodes as one flat stream of tokens, without padding: only attention sees rectangles.

    group 0                            group 1
    [ prefix | row | row | row ]       [ prefix | row | row ]        N tokens
      P tokens                           P tokens, again

All examples share the prefix; a row is one example without it. A row attends to its group's prefix and to
itself, the prefix to itself. With all rows in one group the prefix runs once: below Delta it is the same for
everybody. With a group for each episode it runs once per episode, under that episode's Delta.

An example may begin with all tokens of another: a card behind another card and its answer. Then its row has
only the tokens that follow, behind its *parent*, and attends to the parent's tokens too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

_Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowSpan:
    """A row of ``length`` tokens. Its last ``answers`` tokens predict the answer. Both at least 1.

    parent: the place of an earlier row in the same group, whose tokens it continues.
    """

    length: int
    answers: int
    parent: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class FlatBatch:
    """The index tensors of one stream, made by ``make_flat_batch``.

    G groups, R rows, N tokens; Q the longest row; A the longest answer; K the most that a row attends to.
    Tokens of group g are ``offsets[g]:offsets[g + 1]``. Its answer positions are
    ``answer_offsets[g]:answer_offsets[g + 1]`` of ``answers``.
    """

    prefix: int
    offsets: tuple[int, ...]
    answer_offsets: tuple[int, ...]
    positions: Tensor  # int64 [N]: of each token within its example
    prefixes: Tensor  # int64 [G, P]: where the prefix tokens are
    rows: Tensor  # int64 [R, Q]: where each row's tokens are; shorter rows repeat their last
    keys: Tensor  # int64 [R, K]: prefix, ancestors, row; shorter ones repeat their last
    mask: Tensor  # bool [R, 1, Q, K]
    order: Tensor  # int64 [N]: place of each token in [prefixes, rows] flattened
    answers: Tensor  # int64 [sum of answers]: where the answer-predicting tokens are
    answer_rows: Tensor  # int64 [R, A]: as indices into ``answers``; shorter answers repeat their last
    answer_mask: Tensor  # bool [R, 1, A, K]
    answer_order: Tensor  # int64 [sum of answers]: place of each in ``answer_rows`` flattened

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention. q [N, heads, head_dim]; k, v [N, kv heads, head_dim] -> [N, heads * head_dim]."""
        parts = []
        if self.prefix > 0:
            q_prefix, k_prefix, v_prefix = (x[self.prefixes].transpose(1, 2) for x in (q, k, v))
            parts.append(_attention(q_prefix, k_prefix, v_prefix, mask=None).flatten(0, 1))
        of_rows = _attention(q[self.rows].transpose(1, 2), *self._keys(k, v), mask=self.mask)
        parts.append(of_rows.flatten(0, 1))
        # The repeats of shorter rows are not named in ``order``, so they fall away here.
        return torch.cat(parts)[self.order]

    def attend_answers(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same for the queries of the answer-predicting tokens alone.

        q [sum of answers, heads, head_dim] -> [sum of answers, heads * head_dim]; k and v of all N tokens.
        """
        attended = _attention(q[self.answer_rows].transpose(1, 2), *self._keys(k, v), mask=self.answer_mask)
        return attended.flatten(0, 1)[self.answer_order]

    def answers_of(self, stream: Tensor) -> Tensor:
        """The answer-predicting tokens of [N, ...]."""
        return stream.index_select(0, self.answers)

    def _keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k[self.keys].transpose(1, 2), v[self.keys].transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[n, heads, t, head_dim] -> [n, t, heads * head_dim]; without a mask, causal."""
    attended = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return attended.transpose(1, 2).flatten(2)


@dataclass(frozen=True, slots=True, eq=False)
class ConcatenatedBatches:
    """Several streams, one behind the other, that do not see each other.

    Why: a matmul of few tokens reads as much of the weights as a matmul of many.
    """

    batches: tuple[FlatBatch, ...]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each stream."""
        return [batch.offsets[-1] for batch in self.batches]

    @property
    def positions(self) -> Tensor:
        return torch.cat([batch.positions for batch in self.batches])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As FlatBatch.attend, for all of them."""
        streams = zip(self.batches, *(x.split(self.sizes) for x in (q, k, v)), strict=True)
        return torch.cat([batch.attend(*stream) for batch, *stream in streams])


def make_flat_batch(prefix: int, groups: Sequence[Sequence[RowSpan]], device: torch.device) -> FlatBatch:
    """The batch of ``groups``, each one row or more, behind a shared prefix of ``prefix`` tokens."""
    spans = [row for group in groups for row in group]
    starts, prefix_starts, offsets = _places(prefix, groups)
    lengths, sizes = np.array([row.length for row in spans]), np.array([row.answers for row in spans])
    q_count, a_count = int(lengths.max()), int(sizes.max())
    last = lengths[:, None] - 1
    place = np.minimum(
        np.arange(q_count), last
    )  # of each query within its row; shorter rows repeat their last
    rows = starts[:, None] + place
    prefixes = prefix_starts[:, None] + np.arange(prefix)
    contexts = _contexts(prefixes, starts, groups)
    context_sizes = np.array([len(context) for context in contexts])
    k_count = int((context_sizes + lengths).max())
    keys = np.empty((len(spans), k_count), dtype=np.int64)
    for number, (context, start, length) in enumerate(zip(contexts, starts, lengths, strict=True)):
        seen = np.concatenate([context, start + np.arange(length)])
        keys[number] = seen[np.minimum(np.arange(k_count), len(seen) - 1)]
    # Answer k of a row is predicted from place length - answers + k; shorter answers repeat their last.
    answer_place = np.minimum(lengths[:, None] - sizes[:, None] + np.arange(a_count), last)
    real = np.arange(a_count) < sizes[:, None]
    firsts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    answer_offsets = [0, *np.cumsum([sum(row.answers for row in group) for group in groups]).tolist()]
    return FlatBatch(
        prefix=prefix,
        offsets=tuple(offsets),
        answer_offsets=tuple(answer_offsets),
        positions=_index(_positions(prefix, groups, context_sizes), device),
        prefixes=_index(prefixes, device),
        rows=_index(rows, device),
        keys=_index(keys, device),
        mask=_mask(context_sizes, place, k_count, device),
        order=_index(_order(prefix, starts, prefix_starts, lengths, q_count, offsets[-1]), device),
        answers=_index((starts[:, None] + answer_place)[real], device),
        answer_rows=_index(firsts[:, None] + np.minimum(np.arange(a_count), sizes[:, None] - 1), device),
        answer_mask=_mask(context_sizes, answer_place, k_count, device),
        answer_order=_index((np.arange(len(spans))[:, None] * a_count + np.arange(a_count))[real], device),
    )


def _places(prefix: int, groups: Sequence[Sequence[RowSpan]]) -> tuple[_Indices, _Indices, list[int]]:
    """Where each row starts, where each group's prefix starts, and the groups' offsets."""
    starts, prefix_starts, offsets = [], [], [0]
    for group in groups:
        place = offsets[-1]
        prefix_starts.append(place)
        place += prefix
        for row in group:
            starts.append(place)
            place += row.length
        offsets.append(place)
    return np.array(starts, dtype=np.int64), np.array(prefix_starts, dtype=np.int64), offsets


def _contexts(prefixes: _Indices, starts: _Indices, groups: Sequence[Sequence[RowSpan]]) -> list[_Indices]:
    """Where the tokens are that each row continues: its group's prefix, then its ancestors."""
    contexts: list[_Indices] = []
    for of_group, group in zip(prefixes, groups, strict=True):
        first = len(contexts)
        for row in group:
            if row.parent is None:
                contexts.append(of_group)
                continue
            parent = first + row.parent
            own = starts[parent] + np.arange(group[row.parent].length)
            contexts.append(np.concatenate([contexts[parent], own]))
    return contexts


def _positions(prefix: int, groups: Sequence[Sequence[RowSpan]], context_sizes: _Indices) -> _Indices:
    contexts = iter(context_sizes)
    pieces = [
        piece
        for group in groups
        for piece in (np.arange(prefix), *(next(contexts) + np.arange(row.length) for row in group))
    ]
    return np.concatenate(pieces)


def _order(
    prefix: int, starts: _Indices, prefix_starts: _Indices, lengths: _Indices, q_count: int, total: int
) -> _Indices:
    order = np.empty(total, dtype=np.int64)
    for number, start in enumerate(prefix_starts):
        order[start : start + prefix] = number * prefix + np.arange(prefix)
    behind = len(prefix_starts) * prefix
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        order[start : start + length] = behind + number * q_count + np.arange(length)
    return order


def _mask(context_sizes: _Indices, places: _Indices, k_count: int, device: torch.device) -> Tensor:
    """True where the query at ``places`` [R, n] of its row looks: at all that it continues, up to itself."""
    last = context_sizes[:, None] + places
    return torch.from_numpy(np.arange(k_count)[None, None] <= last[..., None])[:, None].to(device)


def _index(array: _Indices, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)
