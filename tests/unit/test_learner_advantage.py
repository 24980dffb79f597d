"""Advantages by hand, and what a group's siblings and its failures contribute."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.types import (
    ActionSpan,
    Answer,
    FailedEpisode,
    Outcome,
    Task,
    Timings,
    Trajectory,
    TrajectoryGroup,
)
from configs.schema import ObjectiveConfig
from learner.advantage import estimator, grpo, leave_one_out, positive_only, score, shuffled
from learner.types import LearnerError

REWARDS = st.lists(st.floats(-10, 10), min_size=1, max_size=16)


def test_grpo_by_hand() -> None:
    # mean 0.5, population deviation sqrt((0.25 + 0.25 + 0 + 0) / 4) = 0.353553
    assert grpo([1.0, 0.0, 0.5, 0.5], normalize_by_std=True) == pytest.approx(
        [math.sqrt(2), -math.sqrt(2), 0, 0]
    )
    assert grpo([1.0, 0.0, 0.5, 0.5], normalize_by_std=False) == pytest.approx([0.5, -0.5, 0, 0])


@pytest.mark.parametrize("rewards", [[0.3], [1.0, 1.0, 1.0], [0.1 + 0.2, 0.3], []])
def test_no_signal_gives_exact_zeros(rewards: list[float]) -> None:
    assert grpo(rewards, normalize_by_std=True) == [0.0] * len(rewards)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="reward 1 is"):
        grpo([0.0, bad], normalize_by_std=True)
    with pytest.raises(ValueError, match="reward 1 is"):
        leave_one_out([0.0, bad])


def test_leave_one_out_by_hand() -> None:
    assert leave_one_out([1.0, 0.0, 0.5]) == pytest.approx([0.75, -0.75, 0.0])
    assert leave_one_out([1.0]) == [0.0]


@given(REWARDS)
def test_grpo_is_centred_and_keeps_the_order(rewards: list[float]) -> None:
    advantages = grpo(rewards, normalize_by_std=True)
    assert sum(advantages) == pytest.approx(0, abs=1e-6)
    for (reward_a, a), (reward_b, b) in zip(
        zip(rewards, advantages, strict=True), zip(rewards[1:], advantages[1:], strict=True), strict=False
    ):
        assert (reward_a - reward_b) * (a - b) >= 0


@given(REWARDS)
def test_positive_only_is_grpo_without_what_lies_below_the_mean(rewards: list[float]) -> None:
    advantages = grpo(rewards, normalize_by_std=True)
    assert positive_only(rewards, normalize_by_std=True) == [max(advantage, 0.0) for advantage in advantages]


def test_positive_only_by_hand() -> None:
    assert positive_only([1.0, 0.0, 0.5, 0.5], normalize_by_std=False) == pytest.approx([0.5, 0, 0, 0])


def siblings(rewards: list[float], failures: int) -> TrajectoryGroup:
    task, timings = Task("t", "recall", {}, 0), Timings(0, 0, 0, 0, 0, 0)
    played = tuple(
        Trajectory(task, f"g.{place}", 0, (), (), (), {}, Outcome(reward, {}, ()), "done", timings)
        for place, reward in enumerate(rewards)
    )
    failed = tuple(FailedEpisode("t", f"f.{place}", "engine", "gone") for place in range(failures))
    return TrajectoryGroup(task, 0, played, failed, "worker-0")


@pytest.mark.parametrize("name", ["grpo", "positive", "rloo"])
def test_a_failed_sibling_is_no_reward_of_0(name: str) -> None:
    estimate = estimator(ObjectiveConfig(advantage=name))
    scored = score(siblings([1.0, 0.5], failures=2), estimate)
    assert [one.trajectory.outcome.reward for one in scored] == [1.0, 0.5]
    assert [one.advantage for one in scored] == list(estimate([1.0, 0.5]))


def asked(*scores: tuple[float, ...]) -> TrajectoryGroup:
    """Siblings by the f1 of their answers; the reward is the mean."""
    group = siblings([sum(of_one) / len(of_one) for of_one in scores], failures=1)
    answers = [tuple(Answer("q", ("a",), "", "c", {"f1": f1, "em": 0.0}) for f1 in one) for one in scores]
    return replace(
        group,
        trajectories=tuple(
            replace(one, outcome=replace(one.outcome, answers=of_one))
            for one, of_one in zip(group.trajectories, answers, strict=True)
        ),
    )


def test_credit_by_question_compares_each_answer_with_its_siblings() -> None:
    estimate = estimator(ObjectiveConfig(advantage="grpo", normalize_by_std=False))
    group = asked((1.0, 0.0), (0.0, 1.0), (0.5, 0.5))
    assert not any(one.advantage for one in score(group, estimate)), "the rewards are equal"
    scored = score(group, estimate, "question")
    assert [one.by_question for one in scored] == [(0.5, -0.5), (-0.5, 0.5), (0.0, 0.0)]
    assert [one.advantage for one in scored] == [0.0] * 3
    first = scored[0]
    serves: list[tuple[int, ...] | None] = [(0,), (1,), (0, 1), (), None]
    found = [first.advantage_of(ActionSpan(0, 1, "act", serves=served)) for served in serves]
    assert found == [0.5, -0.5, 0.0, 0.0, 0.0]


def test_shuffled_rewards_are_the_siblings_own_and_say_nothing_of_an_episode() -> None:
    group = asked((1.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.0, 1.0))
    outcomes = [one.outcome for one in group.trajectories]
    first, again = ([one.outcome for one in shuffled(group, 3).trajectories] for _ in range(2))
    assert first == again
    centred, positive = (
        estimator(ObjectiveConfig(advantage=name, normalize_by_std=False)) for name in ("grpo", "positive")
    )
    found: list[list[float]] = []  # of each draw: by reward, by question, and at least 0
    for version in range(3000):
        seen = shuffled(replace(group, policy_version=version), 0)
        assert sorted(one.outcome.reward for one in seen.trajectories) == [0.0, 0.5, 0.5, 1.0]
        assert [one.episode_id for one in seen.trajectories] == [one.episode_id for one in group.trajectories]
        assert all(one.outcome in outcomes for one in seen.trajectories), "reward and answers stay together"
        scored, raised = score(seen, centred, "question"), score(seen, positive)
        found.append(
            [one.advantage for one in scored]
            + [advantage for one in scored for advantage in one.by_question]
            + [one.advantage for one in raised]
        )
    means = np.mean(found, axis=0)  # of advantages of 0.5 at most
    assert means == pytest.approx([0.0] * 12 + [0.125] * 4, abs=0.05)


def test_credit_by_question_needs_the_same_questions() -> None:
    with pytest.raises(LearnerError, match=r"siblings of task t have \[1, 2\] answers.*credit=episode"):
        score(asked((1.0,), (0.0, 1.0)), estimator(ObjectiveConfig()), "question")


@pytest.mark.parametrize("advantages", [[1.0], [1.0, 2.0, 3.0], [1.0, math.nan]])
def test_an_estimator_must_give_one_finite_advantage_for_each(advantages: list[float]) -> None:
    with pytest.raises(LearnerError, match=r"for the rewards .* of task t: one finite number for each"):
        score(siblings([1.0, 0.5], failures=0), lambda rewards: advantages)
