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


def pack(rows: Sequence[Row], microbatch_tokens: int, ranks: int, temperature: float) -> list[list[Microbatch]]:
    """Microbatches per rank: at most ``microbatch_tokens`` tokens each, padding included (a longer row stands alone).

    Rows are sorted by length, so a microbatch holds neighbours (little padding) and neighbours go to different ranks (equal work at each
    position). Every rank gets the same number, at least one; empty ones fill up.
    """
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.segment.token_ids)):  # stable: the plan is the same on every rank
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].segment.token_ids) <= microbatch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    while len(batches) % ranks or not batches:
        batches.append([])
    microbatches = [pad(batch, temperature) for batch in batches]
    return [microbatches[rank::ranks] for rank in range(ranks)]


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


def split(scored: Sequence[ScoredTrajectory], parts: int, seed: Sequence[int]) -> list[list[ScoredTrajectory]]:
    """``parts`` near-equal minibatches (at most one per trajectory), shuffled by ``seed``; a single one keeps the order."""
    if parts == 1 or len(scored) < 2:
        return [list(scored)]
    order = np.random.default_rng(seed).permutation(len(scored))
    return [[scored[place] for place in part] for part in np.array_split(order, min(parts, len(scored)))]
