"""Ablations of the update: what they leave out is what is left out, a step does so, and the gap that a wrong snapshot opens is there to see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.fast_weights.delta import Basis
from actors.types import TrajectoryGroup
from configs.schema import ObjectiveConfig
from learner.batch import as_objective_sees, rows_of
from learner.learner import Learner
from learner.types import ScoredTrajectory
from tests.unit.learner_cases import (
    UNWEIGHTED,
    free,
    gradient_of_step,
    group,
    largest_relative_difference,
    learner,
    trajectory,
)


@pytest.fixture(scope="module")
def scored(llama_basis: Basis) -> list[ScoredTrajectory]:
    return [
        ScoredTrajectory(trajectory(llama_basis, seed, 0.0), advantage)
        for seed, advantage in ((1, 1.5), (2, -0.5))
    ]


def test_the_method_as_it_is_sees_what_was_sampled(scored: list[ScoredTrajectory]) -> None:
    assert as_objective_sees(scored, ObjectiveConfig()) is scored


def test_credit_for_actions_leaves_the_extractions_out_and_shares_among_the_rest(
    scored: list[ScoredTrajectory],
) -> None:
    rows = rows_of(as_objective_sees(scored, ObjectiveConfig(credit="actions")), "token", False)
    assert rows.extract_tokens == 0
    assert {span.kind for row in rows.rows for span in row.segment.spans} == {"act"}
    assert sum(row.scale * int(row.segment.action_mask.sum()) for row in rows.rows) == pytest.approx(1)
    before = [
        segment for one in scored for segment in one.trajectory.segments if segment.spans[0].kind == "act"
    ]
    for row, segment in zip(rows.rows, before, strict=True):
        assert np.array_equal(row.segment.logprobs, segment.logprobs)
        assert np.array_equal(row.segment.token_ids, segment.token_ids)


def test_the_final_snapshot_is_the_last_revision_for_all(scored: list[ScoredTrajectory]) -> None:
    rows = rows_of(as_objective_sees(scored, ObjectiveConfig(snapshot="final")), "token", False).rows
    assert [None if row.weights is None else row.weights.revision for row in rows] == [2] * 6
    mine = rows_of(scored, "token", False).rows
    assert [row.scale for row in rows] == [row.scale for row in mine]
    nothing_written = replace(
        scored[0].trajectory,
        revisions=(),
        writes=(),
        segments=(replace(scored[0].trajectory.segments[0], revision=0),),
    )
    (row,) = rows_of(
        as_objective_sees([ScoredTrajectory(nothing_written, 1.0)], ObjectiveConfig(snapshot="final")),
        "token",
        False,
    ).rows
    assert row.weights is None


# --- a learner's step ----------------------------------------------------------------------------------------------------------------------------


def test_a_step_with_credit_for_actions_has_the_gradient_of_episodes_that_sampled_nothing_else(
    llama: Path, llama_basis: Basis, tmp_path: Path
) -> None:
    whole = group(llama_basis, (1.0, 0.0, 0.25))
    acts = [
        replace(one, segments=tuple(part for part in one.segments if part.spans[0].kind == "act"))
        for one in whole.trajectories
    ]
    assert all(
        0 < len(kept.segments) < len(one.segments) for kept, one in zip(acts, whole.trajectories, strict=True)
    )
    credit = replace(UNWEIGHTED, credit="actions")
    found = gradient_of_step(learner(llama, llama_basis, free(), credit), [whole], tmp_path / "credit")
    alone = gradient_of_step(
        learner(llama, llama_basis, free()), [replace(whole, trajectories=tuple(acts))], tmp_path / "alone"
    )
    everything = gradient_of_step(learner(llama, llama_basis, free()), [whole], tmp_path / "everything")
    assert largest_relative_difference(found, alone) < 1e-4
    assert largest_relative_difference(found, everything) > 0.1

    report, usual = (
        learner(llama, llama_basis, free(), objective).step([whole]) for objective in (credit, UNWEIGHTED)
    )
    assert (report.extract_tokens, report.action_tokens) == (0, usual.action_tokens - usual.extract_tokens)
    assert 0 < report.action_tokens < usual.action_tokens


def test_a_step_under_the_final_snapshot_reports_how_far_it_is_from_what_was_sampled(
    llama: Path, llama_basis: Basis
) -> None:
    """The engine's log-probs are here those of each segment under its own revision, so that a step as it should be reports no difference."""
    sampled = truthful(group(llama_basis, (1.0, 0.0, 0.25)), learner(llama, llama_basis, free()))
    assert {segment.revision for one in sampled.trajectories for segment in one.segments} == {0, 1, 2}
    own, final = (
        learner(llama, llama_basis, free(), replace(UNWEIGHTED, snapshot=snapshot)).step([sampled])
        for snapshot in ("own", "final")
    )
    assert own.engine_logprob_diff_mean < 1e-4
    assert final.engine_logprob_diff_mean > 0.01
    assert final.action_tokens == own.action_tokens


def truthful(sampled: TrajectoryGroup, made: Learner) -> TrajectoryGroup:
    """The same episodes with the log-probs that ``made`` gives them."""
    told = [
        replace(
            one,
            segments=tuple(
                replace(part, logprobs=values)
                for part, values in zip(one.segments, made.logprobs(one), strict=True)
            ),
        )
        for one in sampled.trajectories
    ]
    return replace(sampled, trajectories=tuple(told))
