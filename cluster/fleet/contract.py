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
    """``content`` leads to the group itself, in the object store of the worker's node; dropping the last reference frees it."""

    summary: GroupSummary
    content: ObjectRef[TrajectoryGroup]


class GroupSource(Protocol):
    """What the stream sees of a rollout worker."""

    @property
    def name(self) -> str: ...

    async def group(self, position: int, task: Task) -> FinishedGroup:
        """Run the siblings of ``task``; raises ClusterError when the worker is lost or late. ``position`` is the task's place in the task source."""
        ...


@dataclass(slots=True, eq=False)
class Lane:
    """One worker as the stream sees it: the version it serves, whether it takes new groups, how many it has; ``idle`` is set while it has none."""

    source: GroupSource
    version: PolicyVersion
    idle: asyncio.Event
    admitting: bool = True
    outstanding: int = 0


class Openings:
    """The lanes that could take a group, by load and version: choosing one costs the same with one worker and with 1,000.

    A lane is listed exactly while it admits and has a credit; ``remove`` it before a change and ``add`` it after.
    """

    def __init__(self, credits: int) -> None:
        self._credits = credits
        self._lanes: dict[tuple[int, PolicyVersion], dict[str, Lane]] = {}

    def add(self, lane: Lane) -> None:
        if lane.admitting and lane.outstanding < self._credits:
            self._lanes.setdefault((lane.outstanding, lane.version), {})[lane.source.name] = lane

    def remove(self, lane: Lane) -> None:
        key = (lane.outstanding, lane.version)
        if lanes := self._lanes.get(key):
            lanes.pop(lane.source.name, None)
            if not lanes:
                del self._lanes[key]

    def least_loaded(self, usable: Callable[[PolicyVersion], bool]) -> Lane | None:
        """Of the lanes whose version is ``usable``; among equals the one that has been listed longest."""
        key = min((key for key in self._lanes if usable(key[1])), key=lambda found: found[0], default=None)
        return None if key is None else next(iter(self._lanes[key].values()))
