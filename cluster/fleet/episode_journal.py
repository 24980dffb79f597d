"""Keeps the progress of the episodes in flight in a small actor beside the driver, outside of the workers.

    worker --note--> JournalActor --progress of a lost worker's group--> the worker that gets its task next

The actor holds a few kilobytes an episode, and at most ``MOST_TOKENS`` sampled tokens. Beyond that it
forgets the group that was noted longest ago: that group would start anew. When the actor itself is lost,
all episodes would start anew, and the run goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from actors.episodes.recovery import Event, Progress, Recovery
from actors.types import PolicyVersion
from cluster.common.errors import WorkerLost
from cluster.fleet.ray_runtime import answer
from configs.tolerances import REPLAY

MOST_TOKENS = 4_000_000  # 32 MB
ASK_S = 30.0


class GroupJournal:
    """The progress of each sibling by group, without Ray. Single-threaded."""

    def __init__(self, most_tokens: int) -> None:
        self._most = most_tokens
        self._groups: dict[str, dict[int, Progress]] = {}  # the group noted last is the last

    def note(
        self, group_id: str, sibling: int, version: PolicyVersion, start: int, events: tuple[Event, ...]
    ) -> None:
        """Add events of a sibling from its event ``start`` on; see actors.episodes.recovery.Journal.

        A note that does not continue what is here (another version, a gap) means that notes were lost: the
        sibling's progress is dropped.
        """
        group = self._groups.pop(group_id, {})
        before = group.pop(sibling, Progress(version, ()))
        if start == 0 or (before.version == version and len(before.events) >= start):
            group[sibling] = Progress(version, (*before.events[:start], *events))
        self._groups[group_id] = group
        while len(self._groups) > 1 and self.tokens > self._most:
            del self._groups[next(iter(self._groups))]

    def progress(self, group_id: str) -> dict[int, Progress]:
        """What is known of each sibling that was noted."""
        return dict(self._groups.get(group_id, {}))

    def forget(self, group_id: str) -> None:
        self._groups.pop(group_id, None)

    @property
    def tokens(self) -> int:
        return sum(progress.tokens for group in self._groups.values() for progress in group.values())


class _JournalActor:
    """GroupJournal as a Ray actor."""

    def __init__(self) -> None:
        self._journal = GroupJournal(MOST_TOKENS)

    def note(
        self, group_id: str, sibling: int, version: PolicyVersion, start: int, events: tuple[Event, ...]
    ) -> None:
        self._journal.note(group_id, sibling, version, start, events)

    def progress(self, group_id: str) -> dict[int, Progress]:
        return self._journal.progress(group_id)

    def forget(self, group_id: str) -> None:
        self._journal.forget(group_id)


JournalActor = ray.remote(max_restarts=0, num_cpus=0)(_JournalActor)


@dataclass(frozen=True, slots=True)
class RemoteJournal:
    """The worker's side (actors.episodes.recovery.Journal): a call that nobody waits for."""

    actor: Any  # with the methods of JournalActor

    def note(
        self, group_id: str, sibling: int, version: PolicyVersion, start: int, events: tuple[Event, ...]
    ) -> None:
        self.actor.note.remote(group_id, sibling, version, start, events)


class EpisodeJournal:
    """The driver's side: which groups were issued before, and the progress of their episodes.

    ``dtype``: of the model, whose rounding a write that is made again may differ by.
    """

    def __init__(self, actor: Any, dtype: str) -> None:
        self._actor, self._tolerance = actor, REPLAY[dtype]
        self._issued: set[str] = set()

    async def open(self, group_id: str) -> Recovery:
        """The recovery of a group that is about to be issued, for the first time or again.

        Raises nothing: without an answer of the actor the episodes start anew.
        """
        reissued = group_id in self._issued
        self._issued.add(group_id)
        progress: dict[int, Progress] = await self._ask(group_id) if reissued else {}
        return Recovery(RemoteJournal(self._actor), reissued, progress, self._tolerance)

    def close(self, group_id: str) -> None:
        """Forget a finished group. If it is lost after that, with its node, it starts anew."""
        self._issued.discard(group_id)
        self._actor.forget.remote(group_id)

    async def _ask(self, group_id: str) -> dict[int, Progress]:
        try:
            progress: dict[int, Progress] = await answer(
                self._actor.progress.remote(group_id), ASK_S, "the episodes' journal", f"group {group_id}"
            )
        except WorkerLost:
            return {}
        return progress


def start_journal(dtype: str) -> EpisodeJournal:
    """Start the journal's actor, for episodes of a model of ``dtype``. Ray is up.

    It stands on the driver's node: it is lost together with the driver, the only process that asks it.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = JournalActor
    return EpisodeJournal(actor.options(scheduling_strategy=here).remote(), dtype)
