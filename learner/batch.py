"""Scored trajectories -> rows -> microbatches of near-equal tokens, the same number on every rank.

    ScoredTrajectory --as_objective_sees--> ... --rows_of--> Row --pack--> Microbatch, per rank

Invariant: the gradient of an optimizer step does not depend on the packing, because each row carries its
share of the global denominator (Row.scale). All of it is a pure function of the groups. So every rank
computes the whole plan and takes its own part, without a word to the others.

Ablations (``as_objective_sees``) leave out one part of the method, to show what that part is worth:

    objective.tokens=answers    no gradient on extraction tokens: a good flashcard gets no credit
    objective.tokens=cards      no gradient on answers
    objective.snapshot=final    every segment is scored under the episode's last Delta, not under its own: a
                                biased gradient. `learner/engine_logprob_diff_mean` shows how far it is off
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from actors.types import Segment, SpanKind, Trajectory
from configs.schema import ObjectiveConfig
from learner.types import Microbatch, Row, ScoredTrajectory

Aggregate = Literal["token", "sequence"]

_KINDS: dict[Literal["both", "cards", "answers"], tuple[SpanKind, ...]] = {
    "both": ("act", "extract"),
    "cards": ("extract",),
    "answers": ("act",),
}

# One more microbatch costs a sixteenth of a full one, whatever its size: launches, and weights read again.
_PASS = 16
_EVEN = 64  # a full microbatch costs a 64th more than its tokens
_NEVER = np.int64(2**60)


def trained_kinds(objective: ObjectiveConfig, greedy_answers: bool) -> tuple[SpanKind, ...]:
    """Return which sampled tokens have a gradient. A greedy answer is no sample: it has none."""
    of_setting = _KINDS[objective.tokens]
    return tuple(kind for kind in of_setting if not (kind == "act" and greedy_answers))


def as_objective_sees(
    scored: Sequence[ScoredTrajectory], objective: ObjectiveConfig, greedy_answers: bool = False
) -> Sequence[ScoredTrajectory]:
    """Return the episodes with what is trained of them; ``scored`` itself for the method as it is."""
    kinds = trained_kinds(objective, greedy_answers)
    if len(kinds) == 2 and objective.snapshot == "own":
        return scored
    return [replace(episode, trajectory=_seen(episode.trajectory, objective, kinds)) for episode in scored]


def _seen(trajectory: Trajectory, objective: ObjectiveConfig, kinds: tuple[SpanKind, ...]) -> Trajectory:
    segments = trajectory.segments
    if len(kinds) < 2:
        segments = tuple(_only(segment, kinds) for segment in segments)
    if objective.snapshot == "final":
        segments = tuple(replace(segment, revision=len(trajectory.revisions)) for segment in segments)
    return replace(trajectory, segments=segments)


def _only(segment: Segment, kinds: tuple[SpanKind, ...]) -> Segment:
    spans = tuple(span for span in segment.spans if span.kind in kinds)
    mask = np.zeros_like(segment.action_mask)
    for span in spans:
        mask[span.start : span.end] = True
    logprobs = np.where(mask, segment.logprobs, np.float32(0))
    return replace(segment, action_mask=mask, logprobs=logprobs, spans=spans)


@dataclass(frozen=True, slots=True, eq=False)
class RowSet:
    """The rows of one optimizer step, and counts of what was left out."""

    rows: tuple[Row, ...]
    segments_without_actions: int
    trajectories_skipped: int
    extract_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Minibatch:
    """What one optimizer step consumes."""

    rows: RowSet  # of all ranks
    ranks: list[list[Microbatch]]  # by rank

    @property
    def is_idle(self) -> bool:
        """Whether no row has an advantage, so that none was kept. Every rank finds the same."""
        return not self.rows.rows


def rows_of(scored: Sequence[ScoredTrajectory], aggregate: Aggregate, skip_zero_advantage: bool) -> RowSet:
    """Return one row per segment with sampled tokens, under its own revision, with its tokens' advantages.

    "token": every sampled token of the step has the same weight.
    "sequence": every episode with sampled tokens has the same weight, shared by its tokens.
    A row whose advantages are all 0 has no policy gradient. ``skip_zero_advantage`` leaves it out, but not
    its share of the denominator, so skipping saves time and changes nothing else.
    """
    sampled = [
        sum(int(segment.action_mask.sum()) for segment in episode.trajectory.segments) for episode in scored
    ]
    all_tokens, acting = sum(sampled), sum(tokens > 0 for tokens in sampled)
    rows: list[Row] = []
    empty = skipped = extract = 0
    for episode, tokens in zip(scored, sampled, strict=True):
        if skip_zero_advantage and not has_signal(episode):
            skipped += 1
            continue
        for segment in episode.trajectory.segments:
            if not segment.action_mask.any():
                empty += 1
                continue
            advantage = _advantage(episode, segment)
            if skip_zero_advantage and not np.any(advantage):
                continue
            scale = 1 / all_tokens if aggregate == "token" else 1 / (acting * tokens)
            rows.append(Row(segment, episode.trajectory.weights_of(segment), advantage, scale))
            extract += sum(span.end - span.start for span in segment.spans if span.kind == "extract")
    return RowSet(tuple(rows), empty, skipped, extract)


def has_signal(episode: ScoredTrajectory) -> bool:
    """Whether a sampled token of the episode has an advantage."""
    acting = (segment for segment in episode.trajectory.segments if segment.action_mask.any())
    return any(np.any(_advantage(episode, segment)) for segment in acting)


def _advantage(episode: ScoredTrajectory, segment: Segment) -> float | NDArray[np.float32]:
    """Return the advantage of all tokens; with credit by question, [T] of each."""
    if not episode.by_question:
        return episode.advantage
    advantages = np.zeros(len(segment.token_ids), dtype=np.float32)
    for span in segment.spans:
        advantages[span.start : span.end] = episode.advantage_of(span)
    return advantages


def supervised_rows(segments: Sequence[Segment]) -> tuple[Row, ...]:
    """Return the rows of a warm start: Delta = 0, and every target token has the same weight."""
    targets = sum(int(segment.action_mask.sum()) for segment in segments)
    return tuple(Row(segment, None, 1.0, 1 / targets) for segment in segments if segment.action_mask.any())


def pack(
    rows: Sequence[Row],
    microbatch_tokens: int,
    ranks: int,
    temperature: float,
    answer_temperature: float | None = None,
) -> list[list[Microbatch]]:
    """Return microbatches per rank, of at most ``microbatch_tokens`` tokens each, padding included.

    ``answer_temperature``: of answers; None: ``temperature``, which is that of all other tokens.
    A longer row stands alone. Every rank gets the same number, at least one. The largest come first, and
    neighbours in size go to different ranks: so all ranks do equal work at each position.
    """
    ordered = sorted(rows, key=lambda row: -len(row.segment.token_ids))  # stable: equal on every rank
    parts = _cut([len(row.segment.token_ids) for row in ordered], microbatch_tokens, ranks)
    batches = sorted(
        (ordered[start:end] for start, end in parts),
        key=lambda batch: -len(batch) * len(batch[0].segment.token_ids),
    )
    while len(batches) % ranks or not batches:
        batches.append([])
    microbatches = [pad(batch, temperature, answer_temperature) for batch in batches]
    return [microbatches[rank::ranks] for rank in range(ranks)]


def _cut(lengths: Sequence[int], budget: int, ranks: int) -> list[tuple[int, int]]:
    """Cut ``lengths`` (descending) into the cheapest stretches [start, end).

    Their number is a multiple of ``ranks`` where that can be. A stretch costs its tokens with padding, a
    fixed price for one more pass, and a little for its size squared. The square prefers the more even of two
    cuts with like padding. Prices are integers, in units of 1 / (_EVEN * budget) tokens, so that every rank
    finds the same cut.
    """
    count = len(lengths)
    longest = np.asarray(lengths, dtype=np.int64)
    # Dynamic programming over (rows cut so far, stretches so far mod ranks).
    best = np.full((count + 1, ranks), _NEVER)
    came = np.zeros((count + 1, ranks), dtype=np.int64)  # the start of the last stretch
    best[0, 0] = first = 0
    for end in range(1, count + 1):
        # Lengths descend, so a stretch pads to its first row. A row over the budget may stand alone.
        while first < end - 1 and (end - first) * lengths[first] > budget:
            first += 1
        sizes = (end - np.arange(first, end)) * longest[first:end]
        prices = _EVEN * budget * (sizes + budget // _PASS) + sizes * sizes
        costs = np.roll(best[first:end], 1, axis=1) + prices[:, None]  # rolled: one stretch more
        came[end], best[end] = first + costs.argmin(axis=0), costs.min(axis=0)
    # Where no multiple is possible, each row stands alone, and empty microbatches make up the rest.
    end, state = count, 0 if best[count, 0] < _NEVER else count % ranks
    parts = []
    while end > 0:
        start = int(came[end, state])
        parts.append((start, end))
        end, state = start, (state - 1) % ranks
    return parts[::-1]


def pad(rows: Sequence[Row], temperature: float, answer_temperature: float | None = None) -> Microbatch:
    """Return one microbatch of ``rows``; of none, one row of two unsampled tokens, whose gradient is zero."""
    count, length = max(1, len(rows)), max((len(row.segment.token_ids) for row in rows), default=2)
    token_ids = np.zeros((count, length), dtype=np.int64)
    attention_mask = np.zeros((count, length), dtype=np.bool_)
    loss_mask = np.zeros((count, length), dtype=np.bool_)
    engine_logprobs = np.zeros((count, length), dtype=np.float32)
    advantages = np.zeros((count, length), dtype=np.float32)
    for place, row in enumerate(rows):
        end = len(row.segment.token_ids)
        token_ids[place, :end] = row.segment.token_ids
        attention_mask[place, :end] = True
        loss_mask[place, :end] = row.segment.action_mask
        engine_logprobs[place, :end] = row.segment.logprobs
        advantages[place, :end] = row.advantage
    return Microbatch(
        token_ids=token_ids,
        attention_mask=attention_mask,
        loss_mask=loss_mask,
        engine_logprobs=engine_logprobs,
        advantages=advantages,
        scales=np.array([row.scale for row in rows] or [0.0], dtype=np.float32),
        weights=tuple(row.weights for row in rows) or (None,),
        temperature=_temperatures(rows, temperature, answer_temperature),
    )


def _temperatures(
    rows: Sequence[Row], temperature: float, answer_temperature: float | None
) -> float | NDArray[np.float32]:
    """Return the one temperature of all sampled tokens, or one for each, in row-major order."""
    if answer_temperature is None or answer_temperature == temperature or not rows:
        return temperature
    # The log-prob of a greedy token is that of softmax(z), see Sampling.
    of_kind = {"extract": temperature, "act": answer_temperature or 1.0}
    spans = (span for row in rows for span in sorted(row.segment.spans, key=lambda span: span.start))
    tokens = [np.full(span.end - span.start, of_kind[span.kind], dtype=np.float32) for span in spans]
    return np.concatenate(tokens)


def split(
    scored: Sequence[ScoredTrajectory], parts: int, seed: Sequence[int]
) -> list[list[ScoredTrajectory]]:
    """Return ``parts`` near-equal minibatches, at most one per trajectory, shuffled by ``seed``.

    A single minibatch keeps the order.
    """
    if parts == 1 or len(scored) < 2:
        return [list(scored)]
    order = np.random.default_rng(seed).permutation(len(scored))
    return [[scored[place] for place in part] for part in np.array_split(order, min(parts, len(scored)))]
