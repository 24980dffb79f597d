"""Where the episodes in flight keep their progress, outside of the workers that play them: one small actor beside the driver.

    worker --note--> JournalActor (a few kilobytes an episode, of the groups in flight)  --progress of a group that was lost--> its next worker

It holds at most ``MOST_TOKENS`` sampled tokens; beyond that the group that was noted longest ago is forgotten, and would start anew. When the actor
itself is lost, so is the progress: episodes start anew, and the run goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from actors.episodes.recovery import Event, Progress, Recovery
from actors.types import PolicyVersion
from cluster.common.errors import WorkerLost
from cluster.fleet.ray_runtime import answer

MOST_TOKENS = 4_000_000  # 32 MB
ASK_S = 30.0


class GroupJournal:
    """The logic, without Ray: the progress of each sibling by group. Single-threaded."""

    def __init__(self, most_tokens: int) -> None:
        self._most = most_tokens
        self._groups: dict[str, dict[int, Progress]] = {}  # the group noted last is the last

    def note(
        self, group_id: str, sibling: int, version: PolicyVersion, start: int, events: tuple[Event, ...]
    ) -> None:
        """See actors.episodes.recovery.Journal. A note that does not fit on what is here (another version, a gap) says that something is lost."""
        group = self._groups.pop(group_id, {})
        before = group.pop(sibling, Progress(version, ()))
        if start == 0 or (before.version == version and len(before.events) >= start):
            group[sibling] = Progress(version, (*before.events[:start], *events))
        self._groups[group_id] = group
        while len(self._groups) > 1 and self.tokens > self._most:
            del self._groups[next(iter(self._groups))]

    def progress(self, group_id: str) -> dict[int, Progress]:
        return dict(self._groups.get(group_id, {}))

    def forget(self, group_id: str) -> None:
        self._groups.pop(group_id, None)

    @property
    def tokens(self) -> int:
        return sum(progress.tokens for group in self._groups.values() for progress in group.values())


class _JournalActor:
    """One-line methods over GroupJournal."""

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
    """actors.episodes.recovery.Journal: a call that nobody waits for. ``actor`` has the methods of JournalActor."""

    actor: Any

    def note(
        self, group_id: str, sibling: int, version: PolicyVersion, start: int, events: tuple[Event, ...]
    ) -> None:
        self.actor.note.remote(group_id, sibling, version, start, events)


class EpisodeJournal:
    """The driver's side: which groups were issued before, and what is known of them."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._issued: set[str] = set()

    async def open(self, group_id: str) -> Recovery:
        """For a group that is about to be issued, for the first time or again. Raises nothing: what cannot be asked for is not known."""
        reissued = group_id in self._issued
        self._issued.add(group_id)
        progress: dict[int, Progress] = await self._ask(group_id) if reissued else {}
        return Recovery(RemoteJournal(self._actor), reissued, progress)

    def close(self, group_id: str) -> None:
        """The group is finished. One that is lost after that, with its node, starts anew."""
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


def start_journal() -> EpisodeJournal:
    """On the driver's node: it is lost when the driver is, and then nobody is left to ask. Ray is up."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = JournalActor
    return EpisodeJournal(actor.options(scheduling_strategy=here).remote())
