"""Rows and their weights in the loss, and the cut of rows into microbatches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from actors.fast_weights.delta import Basis
from actors.types import ActionSpan, Outcome, Segment, Timings, Trajectory
from learner.batch import Aggregate, _cut, pack, pad, rows_of, split, supervised_rows
from learner.types import Microbatch, Row, ScoredTrajectory
from tests.unit.learner_cases import TASK, trajectory


@pytest.fixture(scope="module")
def scored(llama_basis: Basis) -> list[ScoredTrajectory]:
    return [
        ScoredTrajectory(trajectory(llama_basis, seed, 0.0), advantage)
        for seed, advantage in ((1, 1.5), (2, -0.5), (3, 0.0), (4, -1.0))
    ]


def share(scored: list[ScoredTrajectory], aggregate: Aggregate, skip: bool) -> float:
    """The weight of all sampled tokens together."""
    rows = rows_of(scored, aggregate, skip).rows
    return sum(row.scale * int(row.segment.action_mask.sum()) for row in rows)


def test_shares_of_the_denominator_sum_to_one(scored: list[ScoredTrajectory]) -> None:
    assert share(scored, "token", False) == pytest.approx(1)
    assert share(scored, "sequence", False) == pytest.approx(1)


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_skipping_leaves_the_denominator_alone(scored: list[ScoredTrajectory], aggregate: Aggregate) -> None:
    rows = rows_of(scored, aggregate, skip_zero_advantage=True)
    assert rows.trajectories_skipped == 1
    assert share(scored, "sequence", True) == pytest.approx(3 / 4)
    kept = {id(row.segment): row.scale for row in rows.rows}
    all_rows = rows_of(scored, aggregate, skip_zero_advantage=False).rows
    every = {id(row.segment): row.scale for row in all_rows}
    assert kept.items() <= every.items() and len(kept) == len(every) - 3


def test_every_span_carries_the_episodes_advantage_and_its_own_revision(
    scored: list[ScoredTrajectory],
) -> None:
    rows = rows_of(scored[:1], "token", True).rows
    assert [row.advantage for row in rows] == [1.5] * 3
    assert [row.segment.spans[0].kind for row in rows] == ["extract", "extract", "act"]
    assert [None if row.weights is None else row.weights.revision for row in rows] == [None, 1, 2]
    microbatch = pad(rows, 1.0)
    assert set(microbatch.advantages[microbatch.loss_mask].tolist()) == {1.5}


def test_with_credit_by_question_tokens_carry_the_advantage_of_what_they_served(llama_basis: Basis) -> None:
    one = trajectory(llama_basis, 1, 0.0, lengths=(19, 11, 14, 9))
    served: tuple[tuple[int, ...] | None, ...] = ((0, 1), (), (1,), None)
    segments = tuple(
        replace(part, spans=tuple(replace(span, serves=serves) for span in part.spans))
        for part, serves in zip(one.segments, served, strict=True)
    )
    episode = ScoredTrajectory(replace(one, segments=segments), 0.25, by_question=(1.0, -0.5))
    rows = rows_of([episode], "token", skip_zero_advantage=False).rows
    microbatch = pad(rows, 1.0)
    found = [
        set(values[mask].tolist())
        for values, mask in zip(microbatch.advantages, microbatch.loss_mask, strict=True)
    ]
    assert found == [{0.25}, {0.0}, {-0.5}, {0.25}]
    assert not microbatch.advantages[~microbatch.loss_mask].any()
    kept = rows_of([episode], "token", skip_zero_advantage=True)
    assert [row.segment.token_ids.size for row in kept.rows] == [20, 15, 10], "without the idle extraction"
    assert [row.scale for row in kept.rows] == [rows[place].scale for place in (0, 2, 3)]
    idle = replace(episode, advantage=0.0, by_question=(0.0, 0.0))
    assert rows_of([idle], "token", skip_zero_advantage=True).trajectories_skipped == 1


def test_extraction_tokens_are_counted(scored: list[ScoredTrajectory]) -> None:
    rows = rows_of(scored[:1], "token", True)
    assert rows.extract_tokens == sum(
        int(part.action_mask.sum()) for part in scored[0].trajectory.segments[:2]
    )


def segment_of(length: int, sampled: int) -> Segment:
    """The last ``sampled`` of ``length`` tokens were sampled."""
    mask = np.arange(length) >= length - sampled
    spans = (ActionSpan(length - sampled, length, "act"),) if sampled else ()
    return Segment(np.zeros(length, np.int32), mask, np.zeros(length, np.float32), 0, 0, spans)


def episode_of(*segments: Segment) -> ScoredTrajectory:
    outcome, timings = Outcome(1, {}, ()), Timings(0, 0, 0, 0, 0, 0)
    return ScoredTrajectory(
        Trajectory(TASK, "e", 0, segments, (), (), {}, outcome, "done", timings), advantage=1.0
    )


def test_segments_without_sampled_tokens_are_dropped_and_counted() -> None:
    silent, spoken = segment_of(5, 0), segment_of(3, 1)
    rows = rows_of([episode_of(silent, spoken)], "token", True)
    assert (len(rows.rows), rows.segments_without_actions, rows.rows[0].scale) == (1, 1, 1.0)
    assert len(supervised_rows((silent, spoken))) == 1


def test_an_episode_without_a_sampled_token_has_no_weight_in_the_mean_over_episodes() -> None:
    silent, short, long = (episode_of(segment_of(9, sampled)) for sampled in (0, 1, 4))
    rows = rows_of([silent, short, long], "sequence", False)
    assert [row.scale for row in rows.rows] == [1 / 2, 1 / 8]  # half for each of two, shared by its tokens
    assert rows.segments_without_actions == 1


def test_target_tokens_of_a_warm_start_weigh_the_same() -> None:
    rows = supervised_rows((segment_of(5, 1), segment_of(7, 4)))
    assert [row.scale for row in rows] == [1 / 5, 1 / 5]
    assert all(row.weights is None and row.advantage == 1 for row in rows)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_packing_keeps_every_row_once_and_ranks_in_step(
    scored: list[ScoredTrajectory], ranks: int, budget: int
) -> None:
    rows = rows_of(scored, "token", False).rows
    plan = pack(rows, budget, ranks, 1.0)
    assert len(plan) == ranks and len({len(part) for part in plan}) == 1
    microbatches = [batch for part in plan for batch in part]
    packed = sorted(
        batch.token_ids[place][batch.attention_mask[place]].tobytes()
        for batch in microbatches
        for place in range(len(batch.scales))
        if batch.scales[place]
    )
    # the sampled ids themselves, unchanged
    assert packed == sorted(row.segment.token_ids.astype(np.int64).tobytes() for row in rows)
    assert all(batch.token_ids.size <= budget or len(batch.token_ids) == 1 for batch in microbatches)
    sizes = [[batch.token_ids.size for batch in part if batch.action_tokens] for part in plan]
    assert all(part == sorted(part, reverse=True) for part in sizes)


def sizes_of(lengths: Sequence[int], budget: int, ranks: int) -> list[list[tuple[int, ...]]]:
    rows = [Row(segment_of(length, 1), None, 1.0, 1.0) for length in lengths]
    return [[batch.token_ids.shape for batch in part] for part in pack(rows, budget, ranks, 1.0)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_few_short_rows_do_not_fill_up_a_microbatch_of_long_ones(ranks: int) -> None:
    """The recall workload: an episode has two extractions of about 180 tokens and one answer of about 56.

    Filling microbatches from the longest row on would pad a fifth.
    """
    lengths = [length for place in range(12) for length in (165 + place, 173 + place, 55 + place % 4)]
    shapes = [shape for part in sizes_of(lengths, 2048, ranks) for shape in part]
    assert 1 - sum(lengths) / sum(rows * longest for rows, longest in shapes) < 0.04
    # four are the least that 2,048 tokens allow; six are two for each of three ranks
    assert len(shapes) in (4, 6)


def test_equal_rows_are_shared_out_evenly() -> None:
    assert sizes_of([100] * 24, 1200, 1) == [[(12, 100), (12, 100)]]
    assert sizes_of([100] * 16, 1200, 1) == [[(8, 100), (8, 100)]]  # not twelve and four
    # one would hold them all, and three ranks would wait
    assert sizes_of([100] * 8, 1200, 4) == [[(2, 100)]] * 4
    assert sizes_of([100] * 2, 1200, 3) == [[(1, 100)], [(1, 100)], [(1, 2)]]  # the third has nothing to take


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_cut_is_the_cheapest_of_all(ranks: int) -> None:
    """Against a search through every cut of nine sorted rows."""
    draw = np.random.default_rng(ranks)
    for _ in range(20):
        lengths = sorted((int(length) for length in draw.integers(3, 60, 9)), reverse=True)
        cuts = [
            cut
            for count in range(9)
            for inner in itertools.combinations(range(1, 9), count)
            if (cut := checked([0, *inner, 9], lengths, ranks))
        ]
        best = _cut(lengths, BUDGET, ranks)
        assert price(best, lengths) == min(price(cut, lengths) for cut in cuts)
        assert best in cuts


BUDGET = 128


def checked(edges: list[int], lengths: list[int], ranks: int) -> list[tuple[int, int]] | None:
    """Return the cut between ``edges``, or None when it is not allowed."""
    cut = list(itertools.pairwise(edges))
    fits = all((end - start) * lengths[start] <= BUDGET or end - start == 1 for start, end in cut)
    return cut if fits and len(cut) % ranks == 0 else None


def price(cut: list[tuple[int, int]], lengths: list[int]) -> int:
    sizes = [(end - start) * lengths[start] for start, end in cut]
    return sum(64 * BUDGET * (size + BUDGET // 16) + size * size for size in sizes)


def test_no_rows_still_make_one_empty_microbatch_per_rank() -> None:
    plan = pack([], 100, 2, 1.0)
    assert [[batch.action_tokens for batch in part] for part in plan] == [[0], [0]]


def test_minibatches_part_the_trajectories(scored: list[ScoredTrajectory]) -> None:
    parts = split(scored, 3, (0, 7))
    assert sorted(len(part) for part in parts) == [1, 1, 2]
    assert {id(episode) for part in parts for episode in part} == {id(episode) for episode in scored}
    orders = [[id(episode) for part in split(scored, 3, (0, seed)) for episode in part] for seed in (7, 7, 8)]
    assert orders[0] == orders[1] != orders[2]
    assert split(scored, 1, (0, 7)) == [scored]
    assert len(split(scored, 99, (0, 0))) == len(scored)


def test_a_sampled_first_token_is_refused() -> None:
    ones = np.ones((1, 2), dtype=bool)
    zeros = np.zeros((1, 2), dtype=np.float32)
    with pytest.raises(ValueError, match="needs a token before it"):
        Microbatch(zeros.astype(np.int64), ones, ones, zeros, zeros, zeros[0, :1], (None,), 1.0)
