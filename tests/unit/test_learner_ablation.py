"""Ablations of the update: what they leave out is what is left out, and the gap that a wrong snapshot opens is there to see."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from actors.fast_weights import Basis
from configs.schema import ObjectiveConfig
from learner.ablation import as_objective_sees
from learner.batch import rows_of
from learner.types import ScoredTrajectory
from tests.unit.learner_cases import trajectory, write_model


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> Basis:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def scored(basis: Basis) -> list[ScoredTrajectory]:
    return [ScoredTrajectory(trajectory(basis, seed, 0.0), advantage) for seed, advantage in ((1, 1.5), (2, -0.5))]


def test_the_method_as_it_is_sees_what_was_sampled(scored: list[ScoredTrajectory]) -> None:
    assert as_objective_sees(scored, ObjectiveConfig()) is scored


def test_credit_for_actions_leaves_the_extractions_out_and_shares_among_the_rest(scored: list[ScoredTrajectory]) -> None:
    rows = rows_of(as_objective_sees(scored, ObjectiveConfig(credit="actions")), "token", False)
    assert rows.extract_tokens == 0
    assert {span.kind for row in rows.rows for span in row.segment.spans} == {"act"}
    assert sum(row.scale * int(row.segment.action_mask.sum()) for row in rows.rows) == pytest.approx(1)
    before = [segment for one in scored for segment in one.trajectory.segments if segment.spans[0].kind == "act"]
    for row, segment in zip(rows.rows, before, strict=True):
        assert np.array_equal(row.segment.logprobs, segment.logprobs)
        assert np.array_equal(row.segment.token_ids, segment.token_ids)


def test_the_final_snapshot_is_the_last_revision_for_all(scored: list[ScoredTrajectory]) -> None:
    rows = rows_of(as_objective_sees(scored, ObjectiveConfig(snapshot="final")), "token", False).rows
    assert [None if row.weights is None else row.weights.revision for row in rows] == [2] * 6
    mine = rows_of(scored, "token", False).rows
    assert [row.scale for row in rows] == [row.scale for row in mine]
    nothing_written = replace(scored[0].trajectory, revisions=(), writes=(), segments=(replace(scored[0].trajectory.segments[0], revision=0),))
    (row,) = rows_of(as_objective_sees([ScoredTrajectory(nothing_written, 1.0)], ObjectiveConfig(snapshot="final")), "token", False).rows
    assert row.weights is None
