"""Small trajectories and a scripted worker for the tests of cluster/, which are not about sampling."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from actors.episodes.group_summary import GroupSummary
from actors.types import (
    ActionSpan,
    Answer,
    FailedEpisode,
    Outcome,
    Segment,
    Task,
    Timings,
    Trajectory,
    TrajectoryGroup,
    WriteExample,
    WriteOutcome,
    WriteRecord,
)
from cluster.fleet.contract import FinishedGroup


def task_at(position: int) -> Task:
    return Task(id=f"t{position}", environment="recall", payload={}, seed=position)


def trajectory(
    task: Task, version: int, reward: float, writes: Sequence[WriteOutcome] = (), seconds: float = 1.0
) -> Trajectory:
    """A segment of four tokens, the last two sampled."""
    mask = np.array([False, False, True, True])
    segment = Segment(
        np.arange(4, dtype=np.int32),
        mask,
        np.zeros(4, dtype=np.float32),
        version,
        0,
        (ActionSpan(2, 4, "act"),),
    )
    records = tuple(
        WriteRecord(
            *(0, (), (), "[]", 0, 3, 2, 2.0, 1.0, 5, 0.5),
            outcome,
            "" if outcome == "accepted" else "no card",
            preserved=(WriteExample((1,), (2,)),),
            preserved_kl=0.25,
        )
        for outcome in writes
    )
    answer = Answer("Where?", ("here",), "here", "home", {"f1": reward, "em": float(reward == 1.0)})
    return Trajectory(
        task=task,
        episode_id=f"{task.id}.{reward}",
        policy_version=version,
        segments=(segment,),
        revisions=(),
        writes=records,
        memory_events={},
        outcome=Outcome(reward, {"f1": reward}, (answer,)),
        stop_reason="done",
        timings=Timings(seconds, 0.3, 0.2, 0.2, 0.1, 0.1),
    )


def group(
    task: Task, version: int, finished: int = 2, failed: int = 0, rewards: Sequence[float] = ()
) -> TrajectoryGroup:
    values = rewards or [number / 10 for number in range(finished)]
    return TrajectoryGroup(
        task=task,
        policy_version=version,
        trajectories=tuple(trajectory(task, version, value) for value in values),
        failed=tuple(
            FailedEpisode(task.id, f"{task.id}.f{number}", "engine", "out of memory")
            for number in range(failed)
        ),
        worker="worker-0",
    )


def finished_group(content: TrajectoryGroup) -> FinishedGroup:
    """A group as a worker returns it. Without Ray the content itself stands for the reference to it."""
    return FinishedGroup(GroupSummary.of(content), cast("Any", content))


class ScriptedWorker:
    """Finishes a group at ``finish(position)``, sampled under ``version``."""

    def __init__(self, name: str, version: int = 0) -> None:
        self.name = name
        self.version = version
        self.asked: list[int] = []
        self._answers: dict[int, asyncio.Future[FinishedGroup]] = {}

    async def group(self, position: int, task: Task) -> FinishedGroup:
        self.asked.append(position)
        self._answers[position] = asyncio.get_running_loop().create_future()
        return await self._answers[position]

    def finish(self, position: int, finished: int = 2, failed: int = 0) -> None:
        self._answers.pop(position).set_result(
            finished_group(group(task_at(position), self.version, finished, failed))
        )

    def break_down(self, position: int, error: Exception) -> None:
        self._answers.pop(position).set_exception(error)

    @property
    def open(self) -> list[int]:
        return sorted(self._answers)


async def settle() -> None:
    """Let everything that can run, run."""
    for _ in range(20):
        await asyncio.sleep(0)
