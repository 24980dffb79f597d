"""What an environment gives as outcome: a fault in it fails its episode, in the user's words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from actors.environments.recall import RecallEnvironment, RecallSession
from actors.text.chat_template import ChatFormat
from actors.types import (
    Outcome,
    Task,
)
from tests.unit.rollout_cases import (
    RECALL,
    TASK,
    group_in,
    request,
    with_outcome,
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda outcome: replace(outcome, reward=float("nan")), "the reward nan"),
        (lambda outcome: replace(outcome, reward=-np.inf), "the reward -inf"),
        (lambda outcome: replace(outcome, reward_parts={"f1": np.float32("nan")}), "the reward part f1 nan"),
        (
            lambda outcome: replace(outcome, answers=(replace(outcome.answers[0], scores={"em": np.inf}),)),
            "the score em inf",
        ),
    ],
)
def test_a_number_that_is_not_finite_fails_its_own_episode(
    chat: ChatFormat, change: Callable[[Outcome], Outcome], said: str
) -> None:
    class Broken(RecallSession):
        def outcome(self) -> Outcome:
            return change(super().outcome())

    class Trap(RecallEnvironment):
        def start(self, task: Task) -> RecallSession:
            return Broken(task) if next(starts) == 0 else super().start(task)

    starts = iter(range(9))
    group = group_in(chat, Trap(RECALL))
    message = f"task {TASK.id}: the environment recall gave {said}, it must be a finite number"
    assert [(failed.boundary, failed.message) for failed in group.failed] == [("environment", message)]
    assert len(group.trajectories) == request().group_size - 1


def test_scores_in_numpys_numbers_are_kept_like_pythons_own(chat: ChatFormat) -> None:
    def in_numpy(outcome: Outcome) -> Outcome:
        scores = {"f1": np.float32(0.5), "em": np.bool_(False)}
        answers = tuple(replace(answer, scores=scores) for answer in outcome.answers)
        parts = {"f1": np.float32(0.5), "hits": np.int64(3)}
        return Outcome(np.float32(0.25), parts, answers)  # type: ignore[arg-type]

    outcome = group_in(chat, with_outcome(in_numpy)).trajectories[0].outcome
    scores = [score for answer in outcome.answers for score in answer.scores.values()]
    assert {type(value) for value in (outcome.reward, *outcome.reward_parts.values(), *scores)} == {float}
    assert (outcome.reward, outcome.reward_parts) == (0.25, {"f1": 0.5, "hits": 3.0})
    assert outcome.answers[0].scores == {"f1": 0.5, "em": 0.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda outcome: replace(outcome, reward="high"), "the reward as str"),
        (lambda outcome: replace(outcome, reward=10**400), "the reward as int"),
        (lambda outcome: replace(outcome, reward=torch.zeros(2)), "the reward as Tensor"),
        (
            lambda outcome: replace(outcome, reward_parts={"f1": np.zeros(2000)}),
            "the reward part f1 as ndarray",
        ),
        (lambda outcome: replace(outcome, reward_parts={"f1": None}), "the reward part f1 as NoneType"),
        (
            lambda outcome: replace(outcome, answers=(replace(outcome.answers[0], scores={"em": "yes"}),)),
            "the score em as str",
        ),
    ],
)
def test_a_score_that_is_no_number_is_named(
    chat: ChatFormat, change: Callable[[Outcome], Outcome], said: str
) -> None:
    group = group_in(chat, with_outcome(change))
    message = f"task {TASK.id}: the environment recall gave {said}, it must be one number"
    assert {(failed.boundary, failed.message) for failed in group.failed} == {("environment", message)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda outcome: replace(outcome, reward_parts=None),
            "the reward parts as NoneType, it must be a mapping of names to numbers",
        ),
        (lambda outcome: replace(outcome, answers=None), "answers as NoneType, it must be a tuple of Answer"),
        (lambda outcome: replace(outcome, answers=({},)), "an answer as dict, it must be an Answer"),
        (
            lambda outcome: replace(outcome, answers=(replace(outcome.answers[0], gold=7),)),
            "gold as int, it must be a tuple of texts",
        ),
        (
            lambda outcome: replace(outcome, answers=(replace(outcome.answers[0], scores=[1.0]),)),
            "the scores as list, it must be a mapping of names to numbers",
        ),
    ],
)
def test_an_outcome_of_another_shape_is_said_in_the_users_words(
    chat: ChatFormat, change: Callable[[Outcome], Outcome], said: str
) -> None:
    group = group_in(chat, with_outcome(change))
    message = f"task {TASK.id}: the environment recall gave {said}"
    assert {failed.message.partition(" (")[0] for failed in group.failed} == {message}


@pytest.mark.parametrize("listed", [list, set, np.array, iter])
def test_answers_and_gold_may_be_any_collection(
    chat: ChatFormat, listed: Callable[[Sequence[str]], Any]
) -> None:
    def change(outcome: Outcome) -> Outcome:
        answers = (replace(answer, gold=listed(["Oslo"])) for answer in outcome.answers)
        return replace(outcome, answers=answers)  # type: ignore[arg-type]

    group = group_in(chat, with_outcome(change))
    assert not group.failed
    assert {answer.gold for one in group.trajectories for answer in one.outcome.answers} == {("Oslo",)}


def test_a_number_as_a_gold_answer_is_named(chat: ChatFormat) -> None:
    group = group_in(
        chat,
        with_outcome(lambda outcome: replace(outcome, answers=(replace(outcome.answers[0], gold=(3,)),))),
    )
    assert "outcome gave int as a gold answer, it must be a text" in group.failed[0].message
