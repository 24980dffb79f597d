"""Examples of many episodes as one flat stream of tokens, without padding: matmuls see [N, d], only attention sees rectangles.

    group 0                            group 1
    [ prefix | row | row | row ]       [ prefix | row | row ]        N tokens; a row is one example without the prefix that all examples share
      P tokens                           P tokens, again

A row attends to its group's prefix and to itself, the prefix to itself. With all rows in one group the prefix runs once (below Delta it is the same
for everybody); with a group for each episode it runs once per episode, under that episode's Delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class RowSpan:
    """A row of ``length`` tokens; the answer is predicted from its last ``answers`` positions. Both at least 1."""

    length: int
    answers: int


@dataclass(frozen=True, slots=True, eq=False)
class FlatBatch:
    """Index tensors of one stream; see ``make_flat_batch``. G groups, R rows, Q and K the longest row without and with the prefix, A the longest answer.

    tokens of group g: ``offsets[g]:offsets[g + 1]``; answer positions of group g: ``answer_offsets[g]:answer_offsets[g + 1]`` of ``answers``.
    """

    prefix: int
    offsets: tuple[int, ...]
    answer_offsets: tuple[int, ...]
    positions: Tensor  # int64 [N]: of each token within its example
    prefixes: Tensor  # int64 [G, P]: where the prefix tokens are
    rows: Tensor  # int64 [R, Q]: where each row's tokens are; shorter rows repeat their last
    keys: Tensor  # int64 [R, P + Q]: what a row attends to
    mask: Tensor  # bool [R, 1, Q, P + Q]
    order: Tensor  # int64 [N]: place of each token in [prefixes, rows] flattened
    answers: Tensor  # int64 [sum of answers]: where the answer-predicting tokens are
    answer_rows: (
        Tensor  # int64 [R, A]: the same as indices into ``answers``; shorter answers repeat their last
    )
    answer_mask: Tensor  # bool [R, 1, A, P + Q]
    answer_order: Tensor  # int64 [sum of answers]: place of each in answer_rows flattened

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention. q [N, heads, head_dim]; k, v [N, kv heads, head_dim] -> [N, heads * head_dim]."""
        parts = []
        if self.prefix > 0:
            inside = [x[self.prefixes].transpose(1, 2) for x in (q, k, v)]
            parts.append(_attention(inside[0], inside[1], inside[2], mask=None).flatten(0, 1))
        parts.append(
            _attention(q[self.rows].transpose(1, 2), *self._keys(k, v), mask=self.mask).flatten(0, 1)
        )
        return torch.cat(parts)[self.order]

    def attend_answers(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same for the queries of the answer-predicting tokens: q [sum of answers, heads, head_dim] -> [sum of answers, heads * head_dim]."""
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
    """Streams one behind the other that do not see each other, as one: matmuls of few tokens read as much as those of many."""

    layouts: tuple[FlatBatch, ...]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each stream."""
        return [layout.offsets[-1] for layout in self.layouts]

    @property
    def positions(self) -> Tensor:
        return torch.cat([layout.positions for layout in self.layouts])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As FlatBatch.attend, for all of them."""
        parts = zip(self.layouts, *(x.split(self.sizes) for x in (q, k, v)), strict=True)
        return torch.cat([layout.attend(*parts_of) for layout, *parts_of in parts])


def make_flat_batch(prefix: int, groups: Sequence[Sequence[RowSpan]], device: torch.device) -> FlatBatch:
    """The layout of ``groups``, each one row or more, behind a shared prefix of ``prefix`` tokens."""
    spans = [row for group in groups for row in group]
    starts, prefix_starts, offsets = _places(prefix, groups)
    lengths, sizes = np.array([row.length for row in spans]), np.array([row.answers for row in spans])
    q_count, a_count = int(lengths.max()), int(sizes.max())
    column = np.arange(q_count)
    rows = starts[:, None] + np.minimum(column, lengths[:, None] - 1)
    group_of_row = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    prefixes = prefix_starts[:, None] + np.arange(prefix)
    keys = np.concatenate([prefixes[group_of_row], rows], axis=1)
    # Answer k of a row is predicted from place length - answers + k; shorter answers repeat their last.
    answer_place = np.minimum(lengths[:, None] - sizes[:, None] + np.arange(a_count), lengths[:, None] - 1)
    real = np.arange(a_count) < sizes[:, None]
    firsts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    answer_offsets = [0, *np.cumsum([sum(row.answers for row in group) for group in groups]).tolist()]
    return FlatBatch(
        prefix=prefix,
        offsets=tuple(offsets),
        answer_offsets=tuple(answer_offsets),
        positions=_index(_positions(prefix, groups), device),
        prefixes=_index(prefixes, device),
        rows=_index(rows, device),
        keys=_index(keys, device),
        mask=_mask(prefix, np.minimum(column, lengths[:, None] - 1), q_count, device),
        order=_index(_order(prefix, starts, prefix_starts, lengths, q_count, offsets[-1]), device),
        answers=_index((starts[:, None] + answer_place)[real], device),
        answer_rows=_index(firsts[:, None] + np.minimum(np.arange(a_count), sizes[:, None] - 1), device),
        answer_mask=_mask(prefix, answer_place, q_count, device),
        answer_order=_index((np.arange(len(spans))[:, None] * a_count + np.arange(a_count))[real], device),
    )


def _places(
    prefix: int, groups: Sequence[Sequence[RowSpan]]
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
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


def _positions(prefix: int, groups: Sequence[Sequence[RowSpan]]) -> NDArray[np.int64]:
    pieces = [
        piece
        for group in groups
        for piece in (np.arange(prefix), *(prefix + np.arange(row.length) for row in group))
    ]
    return np.concatenate(pieces)


def _order(
    prefix: int,
    starts: NDArray[np.int64],
    prefix_starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    q_count: int,
    total: int,
) -> NDArray[np.int64]:
    order = np.empty(total, dtype=np.int64)
    for number, start in enumerate(prefix_starts):
        order[start : start + prefix] = number * prefix + np.arange(prefix)
    behind = len(prefix_starts) * prefix
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        order[start : start + length] = behind + number * q_count + np.arange(length)
    return order


def _mask(prefix: int, places: NDArray[np.int64], q_count: int, device: torch.device) -> Tensor:
    """True where the query at ``places`` [R, n] of its row may look: the whole prefix, then no further than itself."""
    own = np.arange(q_count)[None, None] <= places[..., None]
    mask = np.concatenate([np.ones((*places.shape, prefix), dtype=bool), own], axis=-1)
    return torch.from_numpy(mask)[:, None].to(device)


def _index(array: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)
