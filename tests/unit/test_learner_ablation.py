"""Ablations of the update leave out what their names say, and a step shows the gap of a wrong snapshot."""

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
    segments = [segment for episode in scored for segment in episode.trajectory.segments]
    acts = [segment for segment in segments if segment.spans[0].kind == "act"]
    for row, segment in zip(rows.rows, acts, strict=True):
        assert np.array_equal(row.segment.logprobs, segment.logprobs)
        assert np.array_equal(row.segment.token_ids, segment.token_ids)


def test_the_final_snapshot_is_the_last_revision_for_all(scored: list[ScoredTrajectory]) -> None:
    rows = rows_of(as_objective_sees(scored, ObjectiveConfig(snapshot="final")), "token", False).rows
    assert [None if row.weights is None else row.weights.revision for row in rows] == [2] * 6
    assert [row.scale for row in rows] == [row.scale for row in rows_of(scored, "token", False).rows]
    first = scored[0].trajectory
    unwritten = replace(first, segments=first.segments[:1], revisions=(), writes=())
    seen = as_objective_sees([ScoredTrajectory(unwritten, 1.0)], ObjectiveConfig(snapshot="final"))
    (row,) = rows_of(seen, "token", False).rows
    assert row.weights is None


# --- a learner's step --------------------------------------------------------------------------------------


def test_a_step_with_credit_for_actions_has_the_gradient_of_episodes_that_sampled_nothing_else(
    llama: Path, llama_basis: Basis, tmp_path: Path
) -> None:
    whole = group(llama_basis, (1.0, 0.0, 0.25))
    acts = [
        replace(episode, segments=tuple(part for part in episode.segments if part.spans[0].kind == "act"))
        for episode in whole.trajectories
    ]
    assert all(len(episode.segments) == 1 for episode in acts)
    credit = replace(UNWEIGHTED, credit="actions")
    ablated = gradient_of_step(learner(llama, llama_basis, free(), credit), [whole], tmp_path / "ablated")
    alone, everything = (
        gradient_of_step(learner(llama, llama_basis, free()), [each], tmp_path / name)
        for name, each in (("alone", replace(whole, trajectories=tuple(acts))), ("everything", whole))
    )
    assert largest_relative_difference(ablated, alone) < 1e-4
    assert largest_relative_difference(ablated, everything) > 0.1


def test_a_step_with_credit_for_actions_counts_no_extraction(llama: Path, llama_basis: Basis) -> None:
    whole = group(llama_basis, (1.0, 0.0, 0.25))
    report, usual = (
        learner(llama, llama_basis, free(), objective).step([whole])
        for objective in (replace(UNWEIGHTED, credit="actions"), UNWEIGHTED)
    )
    assert (report.extract_tokens, report.action_tokens) == (0, usual.action_tokens - usual.extract_tokens)
    assert 0 < report.action_tokens < usual.action_tokens


def test_a_step_under_the_final_snapshot_reports_how_far_it_is_from_what_was_sampled(
    llama: Path, llama_basis: Basis
) -> None:
    """Here the engine's log-probs are those of each segment under its own revision.

    So the method as it is reports no difference.
    """
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
    """Return the episodes with the log-probs that ``made`` gives them."""
    trajectories = []
    for episode in sampled.trajectories:
        parts = zip(episode.segments, made.logprobs(episode), strict=True)
        segments = tuple(replace(part, logprobs=logprobs) for part, logprobs in parts)
        trajectories.append(replace(episode, segments=segments))
    return replace(sampled, trajectories=tuple(trajectories))
