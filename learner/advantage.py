"""Advantages of the siblings of one task: pure functions of their rewards.

objective.advantage --estimator()--> rewards of the finished siblings, in order -> one advantage each
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from actors.types import TrajectoryGroup
from configs.schema import ObjectiveConfig
from configs.user_code import load_extension
from learner.types import LearnerError, ScoredTrajectory

Credit = Literal["episode", "question"]
Estimator = Callable[[Sequence[float]], Sequence[float]]
"""Finite rewards of a group's finished siblings -> as many finite advantages."""

_EQUAL = 1e-8  # a spread of rewards that is only rounding; dividing by it would invent a signal


def grpo(rewards: Sequence[float], normalize_by_std: bool) -> list[float]:
    """Return reward minus the group's mean (GRPO, arXiv 2402.03300, section 4.1.2).

    With ``normalize_by_std`` it is divided by the group's population standard deviation. Equal rewards and a
    single sibling give zeros. Raises ValueError for a reward that is not finite.
    """
    _check(rewards)
    if not rewards:
        return []
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    if std <= _EQUAL:
        return [0.0] * len(rewards)
    return [(reward - mean) / (std if normalize_by_std else 1.0) for reward in rewards]


def positive_only(rewards: Sequence[float], normalize_by_std: bool) -> list[float]:
    """Return GRPO's advantages where they are positive, 0 elsewhere.

    So the learner learns only from episodes that did better than their siblings: the rejection of RAFT
    (arXiv 2304.06767) with GRPO's weights. arXiv 2504.11343 compares the two. It is no policy gradient:
    nothing is pushed down, so larger steps stay safe, and entropy falls faster.
    """
    return [max(0.0, advantage) for advantage in grpo(rewards, normalize_by_std)]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Return reward minus the mean of the *other* siblings (RLOO, arXiv 2402.14740); 0 for an only one."""
    _check(rewards)
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    total = sum(rewards)
    return [reward - (total - reward) / (len(rewards) - 1) for reward in rewards]


def estimator(config: ObjectiveConfig) -> Estimator:
    """Return the estimator that ``config.advantage`` names. Raises ExtensionError."""
    shipped: Mapping[str, Estimator] = {
        "grpo": partial(grpo, normalize_by_std=config.normalize_by_std),
        "positive": partial(positive_only, normalize_by_std=config.normalize_by_std),
        "rloo": leave_one_out,
    }
    return shipped.get(config.advantage) or load_extension("objective.advantage", config.advantage)


def shuffled(group: TrajectoryGroup, seed: int) -> TrajectoryGroup:
    """Return the group with its siblings' outcomes exchanged by lot: the control of ``train.control``.

    Each permutation is equally likely, so an episode's expected advantage is the same whatever it did: 0 of
    an estimator that is centred, more than 0 of "positive". Answers move with their reward: siblings were
    asked the same questions, so with credit by question this holds of each.
    """
    outcomes = [trajectory.outcome for trajectory in group.trajectories]
    random.Random(f"{seed}/{group.task.id}/{group.policy_version}").shuffle(outcomes)
    pairs = zip(group.trajectories, outcomes, strict=True)
    return replace(group, trajectories=tuple(replace(one, outcome=outcome) for one, outcome in pairs))


def score(
    group: TrajectoryGroup, estimate: Estimator, credit: Credit = "episode"
) -> tuple[ScoredTrajectory, ...]:
    """Return the group's trajectories with their advantages. A failed sibling is left out: it has no reward.

    With ``credit`` "question" each answer's f1 is compared with its siblings' too.
    Raises ValueError for a reward that is not finite, and LearnerError for an estimator that does not return
    one finite advantage for each, or for siblings that were asked different numbers of questions.
    """
    outcomes = [trajectory.outcome for trajectory in group.trajectories]
    advantages = _advantages([outcome.reward for outcome in outcomes], group, estimate)
    if credit == "episode":
        return tuple(map(ScoredTrajectory, group.trajectories, advantages))
    asked = {len(outcome.answers) for outcome in outcomes}
    if len(asked) > 1:
        raise LearnerError(
            f"objective.credit=question: siblings of task {group.task.id} have {sorted(asked)} answers, "
            "so their questions cannot be compared; set objective.credit=episode"
        )
    scores = zip(*([answer.scores["f1"] for answer in outcome.answers] for outcome in outcomes), strict=True)
    columns = [_advantages(list(of_question), group, estimate) for of_question in scores]
    by_question = zip(*columns, strict=True) if columns else [()] * len(outcomes)
    return tuple(map(ScoredTrajectory, group.trajectories, advantages, by_question))


def _advantages(rewards: Sequence[float], group: TrajectoryGroup, estimate: Estimator) -> list[float]:
    try:
        _check(rewards)
    except ValueError as error:
        raise ValueError(f"task {group.task.id}: {error}") from error
    advantages = [float(advantage) for advantage in estimate(rewards)]
    if len(advantages) != len(rewards) or not all(map(math.isfinite, advantages)):
        raise LearnerError(
            f"objective.advantage gave {advantages} for the rewards {rewards} of task {group.task.id}: "
            "one finite number for each"
        )
    return advantages


def _check(rewards: Sequence[float]) -> None:
    for place, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise ValueError(
                f"reward {place} is {reward}: a reward must be a finite number; "
                "mend the environment's outcome()"
            )
