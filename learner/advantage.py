"""Advantages of the siblings of one task: pure functions of their rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence

from actors.types import TrajectoryGroup
from learner.types import ScoredTrajectory

_EQUAL = 1e-8  # rewards whose spread is rounding only carry no signal; dividing by that spread would invent one


def grpo(rewards: Sequence[float], normalize_by_std: bool) -> list[float]:
    """Reward minus the group's mean, over the group's (population) standard deviation if asked (GRPO, arXiv 2402.03300, section 4.1.2).

    Equal rewards and a single survivor give zeros. Raises ValueError for a reward that is not finite.
    """
    _check(rewards)
    if not rewards:
        return []
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    if std <= _EQUAL:
        return [0.0] * len(rewards)
    return [(reward - mean) / (std if normalize_by_std else 1.0) for reward in rewards]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Reward minus the mean of the *other* siblings (RLOO, arXiv 2402.14740). A single survivor gives zero."""
    _check(rewards)
    if len(rewards) < 2:
        return [0.0] * len(rewards)
    total = sum(rewards)
    return [reward - (total - reward) / (len(rewards) - 1) for reward in rewards]


def score(group: TrajectoryGroup, normalize_by_std: bool) -> tuple[ScoredTrajectory, ...]:
    """The group's trajectories with their GRPO advantages. Failed siblings take no part: they are no reward of 0."""
    rewards = [trajectory.outcome.reward for trajectory in group.trajectories]
    try:
        advantages = grpo(rewards, normalize_by_std)
    except ValueError as error:
        raise ValueError(f"task {group.task.id}: {error}") from error
    return tuple(ScoredTrajectory(trajectory, advantage) for trajectory, advantage in zip(group.trajectories, advantages, strict=True))


def _check(rewards: Sequence[float]) -> None:
    for place, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise ValueError(f"reward {place} is {reward}: a reward must be a finite number; mend the environment's outcome()")
