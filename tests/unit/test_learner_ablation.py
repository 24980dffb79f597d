"""Ablations of the update leave out what their names say, and a step shows the gap of a wrong snapshot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from actors.fast_weights.delta import Basis
from actors.types import ActionSpan, TrajectoryGroup
from configs.schema import ObjectiveConfig
from learner.advantage import shuffled
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
    merged_model,
    sampled_logprobs,
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


@pytest.mark.parametrize(
    ("tokens", "greedy", "kind"),
    [("answers", False, "act"), ("cards", False, "extract"), ("both", True, "extract")],
)
def test_what_is_not_trained_is_left_out_and_the_rest_shares_the_weight(
    scored: list[ScoredTrajectory], tokens: Literal["both", "cards", "answers"], greedy: bool, kind: str
) -> None:
    rows = rows_of(as_objective_sees(scored, ObjectiveConfig(tokens=tokens), greedy), "token", False)
    assert (rows.extract_tokens == 0) is (kind == "act")
    assert {span.kind for row in rows.rows for span in row.segment.spans} == {kind}
    assert sum(row.scale * int(row.segment.action_mask.sum()) for row in rows.rows) == pytest.approx(1)
    segments = [segment for episode in scored for segment in episode.trajectory.segments]
    trained = [segment for segment in segments if segment.spans[0].kind == kind]
    for row, segment in zip(rows.rows, trained, strict=True):
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


def test_a_step_on_answers_has_the_gradient_of_episodes_that_sampled_nothing_else(
    llama: Path, llama_basis: Basis, tmp_path: Path
) -> None:
    whole = group(llama_basis, (1.0, 0.0, 0.25))
    acts = [
        replace(episode, segments=tuple(part for part in episode.segments if part.spans[0].kind == "act"))
        for episode in whole.trajectories
    ]
    assert all(len(episode.segments) == 1 for episode in acts)
    answers = replace(UNWEIGHTED, tokens="answers")
    ablated = gradient_of_step(learner(llama, llama_basis, free(), answers), [whole], tmp_path / "ablated")
    alone, everything = (
        gradient_of_step(learner(llama, llama_basis, free()), [each], tmp_path / name)
        for name, each in (("alone", replace(whole, trajectories=tuple(acts))), ("everything", whole))
    )
    assert largest_relative_difference(ablated, alone) < 1e-4
    assert largest_relative_difference(ablated, everything) > 0.1


def test_a_step_on_answers_counts_no_extraction(llama: Path, llama_basis: Basis) -> None:
    whole = group(llama_basis, (1.0, 0.0, 0.25))
    report, usual = (
        learner(llama, llama_basis, free(), objective).step([whole])
        for objective in (replace(UNWEIGHTED, tokens="answers"), UNWEIGHTED)
    )
    assert (report.extract_tokens, report.action_tokens) == (0, usual.action_tokens - usual.extract_tokens)
    assert 0 < report.action_tokens < usual.action_tokens


def test_a_step_with_greedy_answers_trains_the_cards_alone(
    llama: Path, llama_basis: Basis, tmp_path: Path
) -> None:
    whole = group(llama_basis, (1.0, 0.0, 0.25))
    greedy = learner(llama, llama_basis, free(), answer_temperature=0.0)
    cards = learner(llama, llama_basis, free(), replace(UNWEIGHTED, tokens="cards"))
    found = gradient_of_step(greedy, [whole], tmp_path / "greedy")
    expected = gradient_of_step(cards, [whole], tmp_path / "cards")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    everything = gradient_of_step(learner(llama, llama_basis, free()), [whole], tmp_path / "everything")
    assert largest_relative_difference(found, everything) > 0.1


def test_a_step_without_a_card_that_could_be_trained_has_no_signal(llama: Path, llama_basis: Basis) -> None:
    whole = group(llama_basis, (1.0, 0.0))
    answers = [replace(one, segments=one.segments[-1:]) for one in whole.trajectories]
    made = learner(llama, llama_basis, free(), replace(UNWEIGHTED, tokens="cards"))
    report = made.step([replace(whole, trajectories=tuple(answers))])
    assert (report.optimizer_steps, report.version, report.action_tokens) == (0, 0, 0)
    assert (report.groups_used, report.groups_without_signal, report.trajectories_skipped) == (0, 1, 2)


def test_a_step_with_shuffled_rewards_is_that_of_the_exchanged_outcomes(
    llama: Path, llama_basis: Basis, tmp_path: Path
) -> None:
    whole = replace(group(llama_basis, (1.0, 0.0, 0.25)), policy_version=1)
    exchanged = shuffled(whole, seed=0)
    assert [one.outcome.reward for one in exchanged.trajectories] != [1.0, 0.0, 0.25]
    control = learner(llama, llama_basis, free(), shuffle_rewards=True)
    found = gradient_of_step(control, [whole], tmp_path / "control")
    expected = gradient_of_step(learner(llama, llama_basis, free()), [exchanged], tmp_path / "exchanged")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_each_kind_of_token_is_scored_at_its_own_temperature(llama: Path, llama_basis: Basis) -> None:
    """In one segment too: cards are often asked for behind answers. A greedy token counts as softmax(z)."""
    one = trajectory(llama_basis, 1, 0.0, lengths=(24,))
    (part,) = one.segments
    middle = part.spans[0].start + 3
    spans = (ActionSpan(part.spans[0].start, middle, "act"), ActionSpan(middle, 25, "extract"))
    mixed = replace(one, segments=(replace(part, spans=spans),))
    kinds = np.where(np.arange(25) < middle, "act", "extract")[part.action_mask]
    model = merged_model(llama, llama_basis, None)
    for answers, expected in ((0.5, 0.5), (0.0, 1.0)):
        made = learner(llama, llama_basis, free(), temperature=1.3, answer_temperature=answers)
        (found,) = made.logprobs(mixed)
        with torch.no_grad():
            of = {heat: sampled_logprobs(model, part, heat).numpy() for heat in (1.3, expected)}
        right = np.where(kinds == "act", of[expected], of[1.3])
        assert np.allclose(found[part.action_mask], right, atol=1e-5)


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
