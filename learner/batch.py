"""Scored trajectories -> rows -> microbatches of near-equal tokens, the same number on every rank.

Invariant: the gradient of an optimizer step does not depend on the packing, because each row carries its share of the global denominator (Row.scale).
All of it is a pure function of the groups, so every rank computes the whole plan and takes its own part without a word to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from actors.types import Segment
from learner.types import Microbatch, Row, ScoredTrajectory

Aggregate = Literal["token", "sequence"]

_PASS = 16  # one more microbatch costs a sixteenth of a full one, whatever its size: launches, and weights read once more
_EVEN = 64  # a full microbatch costs a 64th more than its tokens
_NEVER = np.int64(2**60)


@dataclass(frozen=True, slots=True, eq=False)
class RowSet:
    """The rows of one optimizer step, and what was left out of it."""

    rows: tuple[Row, ...]
    segments_without_actions: int
    trajectories_skipped: int
    extract_tokens: int


def rows_of(scored: Sequence[ScoredTrajectory], aggregate: Aggregate, skip_zero_advantage: bool) -> RowSet:
    """One row per segment with sampled tokens, each under its own revision and with its episode's advantage.

    "token": every sampled token of the step weighs the same. "sequence": every episode weighs the same, its tokens share it. A trajectory with
    advantage 0 has no policy gradient: skipped when asked, but it stays in the denominator, so skipping changes nothing but the time.
    """
    sampled = [sum(int(segment.action_mask.sum()) for segment in one.trajectory.segments) for one in scored]
    all_tokens, acting = sum(sampled), sum(tokens > 0 for tokens in sampled)
    rows: list[Row] = []
    empty = skipped = extract = 0
    for one, tokens in zip(scored, sampled, strict=True):
        if skip_zero_advantage and one.advantage == 0:
            skipped += 1
            continue
        for segment in one.trajectory.segments:
            if not segment.action_mask.any():
                empty += 1
                continue
            scale = 1 / all_tokens if aggregate == "token" else 1 / (acting * tokens)
            rows.append(Row(segment, one.trajectory.weights_of(segment), one.advantage, scale))
            extract += sum(span.end - span.start for span in segment.spans if span.kind == "extract")
    return RowSet(tuple(rows), empty, skipped, extract)


def supervised_rows(segments: Sequence[Segment]) -> tuple[Row, ...]:
    """Rows of a warm start: Delta = 0, every target token weighs the same."""
    targets = sum(int(segment.action_mask.sum()) for segment in segments)
    return tuple(Row(segment, None, 1.0, 1 / targets) for segment in segments if segment.action_mask.any())


def pack(
    rows: Sequence[Row], microbatch_tokens: int, ranks: int, temperature: float
) -> list[list[Microbatch]]:
    """Microbatches per rank: at most ``microbatch_tokens`` tokens each, padding included (a longer row stands alone).

    Every rank gets the same number, at least one. The largest come first and neighbours in size go to different ranks: equal work at each position.
    """
    ordered = sorted(
        rows, key=lambda row: -len(row.segment.token_ids)
    )  # stable: the plan is the same on every rank
    parts = _cut([len(row.segment.token_ids) for row in ordered], microbatch_tokens, ranks)
    batches = sorted(
        (ordered[start:end] for start, end in parts),
        key=lambda batch: -len(batch) * len(batch[0].segment.token_ids),
    )
    while len(batches) % ranks or not batches:
        batches.append([])
    microbatches = [pad(batch, temperature) for batch in batches]
    return [microbatches[rank::ranks] for rank in range(ranks)]


def _cut(lengths: Sequence[int], budget: int, ranks: int) -> list[tuple[int, int]]:
    """The cheapest cut of ``lengths`` (descending) into stretches [start, end), their number a multiple of ``ranks`` where that can be.

    A stretch costs its tokens with padding, what one more pass costs whatever its size, and a little for its size squared, so that of two cuts with
    like padding the more even one is taken. In integers (of 1 / (_EVEN * budget) tokens), so that every rank finds the same cut. Dynamic programming
    over (rows cut, stretches mod ranks).
    """
    count = len(lengths)
    longest = np.asarray(lengths, dtype=np.int64)
    best = np.full((count + 1, ranks), _NEVER)
    came = np.zeros((count + 1, ranks), dtype=np.int64)
    best[0, 0] = first = 0
    for end in range(1, count + 1):
        while first < end - 1 and (end - first) * lengths[first] > budget:
            first += 1
        sizes = (end - np.arange(first, end)) * longest[first:end]
        prices = _EVEN * budget * (sizes + budget // _PASS) + sizes * sizes
        costs = np.roll(best[first:end], 1, axis=1) + prices[:, None]
        came[end], best[end] = first + costs.argmin(axis=0), costs.min(axis=0)
    end, state = (
        count,
        0 if best[count, 0] < _NEVER else count % ranks,
    )  # one row each is always possible; empty microbatches make up the rest
    parts = []
    while end > 0:
        start = int(came[end, state])
        parts.append((start, end))
        end, state = start, (state - 1) % ranks
    return parts[::-1]


def pad(rows: Sequence[Row], temperature: float) -> Microbatch:
    """One microbatch of ``rows``; of none, a two-token row without a sampled token: its gradient is zero."""
    count, length = max(1, len(rows)), max((len(row.segment.token_ids) for row in rows), default=2)
    token_ids = np.zeros((count, length), dtype=np.int64)
    attention_mask = np.zeros((count, length), dtype=np.bool_)
    loss_mask = np.zeros((count, length), dtype=np.bool_)
    engine_logprobs = np.zeros((count, length), dtype=np.float32)
    for place, row in enumerate(rows):
        end = len(row.segment.token_ids)
        token_ids[place, :end] = row.segment.token_ids
        attention_mask[place, :end] = True
        loss_mask[place, :end] = row.segment.action_mask
        engine_logprobs[place, :end] = row.segment.logprobs
    return Microbatch(
        token_ids=token_ids,
        attention_mask=attention_mask,
        loss_mask=loss_mask,
        engine_logprobs=engine_logprobs,
        advantages=np.array([row.advantage for row in rows] or [0.0], dtype=np.float32),
        scales=np.array([row.scale for row in rows] or [0.0], dtype=np.float32),
        weights=tuple(row.weights for row in rows) or (None,),
        temperature=temperature,
    )


def split(
    scored: Sequence[ScoredTrajectory], parts: int, seed: Sequence[int]
) -> list[list[ScoredTrajectory]]:
    """``parts`` near-equal minibatches (at most one per trajectory), shuffled by ``seed``; a single one keeps the order."""
    if parts == 1 or len(scored) < 2:
        return [list(scored)]
    order = np.random.default_rng(seed).permutation(len(scored))
    return [[scored[place] for place in part] for part in np.array_split(order, min(parts, len(scored)))]
