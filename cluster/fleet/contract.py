"""The rollout workers as the stream sees them: where groups come from, and who could take the next task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from actors.episodes.group_summary import GroupSummary
from actors.types import PolicyVersion, Task, TrajectoryGroup

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass(frozen=True, slots=True, eq=False)
class FinishedGroup:
    """A group's summary, and a reference to the group in the object store of the worker's node.

    Dropping the last reference frees the group.
    """

    summary: GroupSummary
    content: ObjectRef[TrajectoryGroup]


class GroupSource(Protocol):
    """What the stream sees of a rollout worker."""

    @property
    def name(self) -> str: ...

    async def group(self, position: int, task: Task) -> FinishedGroup:
        """Run the siblings of ``task``, which stands at ``position`` of the task source.

        Raises ClusterError when the worker is lost or late.
        """
        ...


@dataclass(slots=True, eq=False)
class Lane:
    """A worker in the stream: the version it serves, whether it takes new groups, and how many it has.

    ``idle`` is set while it has none.
    """

    source: GroupSource
    version: PolicyVersion
    idle: asyncio.Event
    admitting: bool = True
    outstanding: int = 0


class Openings:
    """The lanes that could take a group, by load and version.

    A choice costs the same with one worker and with 1,000. A lane is listed exactly while it admits and has a
    credit: ``remove`` it before a change and ``add`` it after.
    """

    def __init__(self, credits: int) -> None:
        self._credits = credits
        self._lanes: dict[tuple[int, PolicyVersion], dict[str, Lane]] = {}

    def add(self, lane: Lane) -> None:
        """List ``lane`` if it could take a group."""
        if lane.admitting and lane.outstanding < self._credits:
            self._lanes.setdefault((lane.outstanding, lane.version), {})[lane.source.name] = lane

    def remove(self, lane: Lane) -> None:
        """Take ``lane`` off the list; nothing happens when it is not listed."""
        key = (lane.outstanding, lane.version)
        if lanes := self._lanes.get(key):
            lanes.pop(lane.source.name, None)
            if not lanes:
                del self._lanes[key]

    def least_loaded(self, usable: Callable[[PolicyVersion], bool]) -> Lane | None:
        """The least loaded lane whose version is ``usable``; among equals the lane that was listed first."""
        keys = [key for key in self._lanes if usable(key[1])]
        if not keys:
            return None
        key = min(keys, key=lambda load_and_version: load_and_version[0])
        return next(iter(self._lanes[key].values()))


def may_issue(
    learner_version: int, worker_version: int, outstanding: int, per_step: int, max_staleness: int
) -> bool:
    """Whether a group issued now will still be fresh when its turn comes.

    ``learner_version`` is the version the learner will have at its next take. ``outstanding`` groups are
    ahead in the queue: they fill ``outstanding // per_step`` whole steps before this group is consumed.
    """
    return learner_version - worker_version + outstanding // per_step <= max_staleness
