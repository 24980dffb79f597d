"""Tasks out, fresh trajectory groups in, and a ledger that accounts for every task.

      tasks --fill()--> worker.group() ... worker.group()      at most ``credits`` groups per worker
                               |
                               v  finished, in any order
      take() <--gate-- ready groups                             older than max_staleness: dropped, counted, replaced

The invariant: a group leaves ``take`` only if the learner, at that moment, is at most ``max_staleness`` versions ahead of the policy that sampled it.
Nothing here calls Ray: a worker is anything with a name and a coroutine ``group``, and of what it finished only the summary is looked at. Called by
loop.py; every wait of ``take`` ends because a group finishes, a worker raises, or the stall deadline passes.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from actors.episodes.group_summary import GroupSummary
from actors.types import PolicyVersion, Task
from cluster.common.errors import ClusterError, StreamError
from cluster.fleet.contract import FinishedGroup, GroupSource, Lane, Openings
from cluster.fleet.ledger import Ledger


def may_issue(
    learner_version: int, worker_version: int, outstanding: int, per_step: int, max_staleness: int
) -> bool:
    """Whether a group issued now will still be fresh when its turn comes.

    ``learner_version`` is the version the learner will have at its next take; ``outstanding`` groups are ahead in the queue and fill
    ``outstanding // per_step`` whole steps before this one is consumed.
    """
    return learner_version - worker_version + outstanding // per_step <= max_staleness


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """``steps`` batches of ``per_step`` groups will be taken, so nothing is issued beyond them. ``credits`` is the most groups in flight on one
    worker; ``stall_s`` the longest time without any event before the stream gives up."""

    steps: int
    per_step: int
    max_staleness: int
    credits: int
    stall_s: float

    @property
    def hopeless_groups(self) -> int:
        """So many unusable groups in a row mean that the next ones will fail too."""
        return max(3, self.per_step)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one step trains on. ``positions`` and ``staleness`` have one value per group; ``dropped`` counts the stale groups since the last batch."""

    positions: tuple[int, ...]
    groups: tuple[FinishedGroup, ...]
    staleness: tuple[int, ...]
    dropped: int


class GroupStream:
    """Bounded-staleness stream over the workers. Lives on one asyncio loop; single use: ``close`` ends it."""

    def __init__(
        self,
        plan: StreamPlan,
        workers: Sequence[GroupSource],
        version: PolicyVersion,
        task_at: Callable[[int], Task],
        ledger: Ledger,
    ) -> None:
        self._plan = plan
        self._lanes = {worker.name: Lane(worker, version, asyncio.Event()) for worker in workers}
        self._openings = Openings(plan.credits)
        for lane in self._lanes.values():
            lane.idle.set()
            self._openings.add(lane)
        self._version = version
        self._task_at = task_at
        self.ledger = ledger
        self._running: dict[int, asyncio.Task[None]] = {}
        self._ready: deque[tuple[int, FinishedGroup]] = deque()
        self._taken = 0  # of the batch that is being put together
        self._to_deliver = plan.steps * plan.per_step
        self._unusable = 0
        self._messages: Counter[str] = Counter()
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._on_lost: Callable[[str, Exception], None] | None = None
        self._on_group: Callable[[], None] = lambda: None
        self._on_failures: Callable[[GroupSummary], None] = lambda summary: None
        self._held = False
        self._missing: Callable[[Sequence[FinishedGroup]], Awaitable[Sequence[int]]] | None = None

    def listen(self, on_lost: Callable[[str, Exception], None], on_group: Callable[[], None]) -> None:
        """``on_lost`` is told of a worker whose call failed (without it that ends the stream), ``on_group`` of every group that arrives."""
        self._on_lost, self._on_group = on_lost, on_group

    def deliver(self, missing: Callable[[Sequence[FinishedGroup]], Awaitable[Sequence[int]]]) -> None:
        """``missing`` brings a batch to the learner before ``take`` returns it, and says which places are lost: those tasks are issued again."""
        self._missing = missing

    def watch(self, on_failures: Callable[[GroupSummary], None]) -> None:
        """``on_failures`` is told of every group in which episodes failed."""
        self._on_failures = on_failures

    def add(self, worker: GroupSource, version: PolicyVersion) -> None:
        """``worker`` serves ``version`` and takes groups from now on."""
        lane = self._lanes[worker.name] = Lane(worker, version, asyncio.Event())
        lane.idle.set()
        self._openings.add(lane)
        self._fill()
        self._changed.set()

    def remove(self, worker: str) -> None:
        """``worker`` is gone, or about to be; what it had is issued again when its calls fail."""
        if (lane := self._lanes.pop(worker, None)) is not None:
            self._openings.remove(lane)
            lane.admitting = False
            lane.idle.set()  # who waits for it to drain need not wait any longer

    async def take(self) -> Batch:
        """The next ``per_step`` fresh groups, in task order; ``trained`` settles them. Raises StreamError, or what a worker raised."""
        fresh: list[tuple[int, int, FinishedGroup]] = []
        dropped = 0
        while True:
            while self._ready and len(fresh) < self._plan.per_step:
                position, group = self._ready.popleft()
                age = self._version - group.summary.policy_version
                if age > self._plan.max_staleness:
                    self.ledger.settle(position, "stale")
                    dropped += 1
                else:
                    fresh.append((position, age, group))
            self._taken = len(fresh)
            if self._taken == self._plan.per_step:
                lost = [] if self._missing is None else await self._missing([group for _, _, group in fresh])
                if not lost:
                    break
                for place in lost:
                    self._reissue(
                        fresh[place][0],
                        f"{fresh[place][2].summary.worker}'s node was lost with a finished group in it",
                    )
                fresh = [kept for place, kept in enumerate(fresh) if place not in lost]
                self._taken = len(fresh)
                continue
            self._fill()
            await self._wait_for_change()
        fresh.sort(key=lambda item: item[0])
        self._taken = 0
        self._to_deliver -= len(fresh)
        self._version += 1
        self._fill()
        positions, ages, groups = zip(*fresh, strict=True)
        return Batch(positions, groups, ages, dropped)

    def trained(self, batch: Batch) -> None:
        """The learner's step on ``batch`` is done."""
        for position in batch.positions:
            self.ledger.settle(position, "trained")

    def pause(self, worker: str) -> None:
        """Give ``worker`` nothing new: it is about to be refreshed, or ended."""
        if (lane := self._lanes.get(worker)) is not None:
            self._openings.remove(lane)
            lane.admitting = False

    def hold(self) -> None:
        """Issue nothing until ``release``, whichever workers are refreshed or added meanwhile: they are wanted for something else."""
        self._held = True

    def release(self) -> None:
        self._held = False
        self._fill()
        self._changed.set()

    async def drained(self, worker: str) -> None:
        """Until ``worker`` has no group left, or is gone; each of them ends at the latest with its own deadline."""
        if (lane := self._lanes.get(worker)) is not None:
            await lane.idle.wait()

    def resume(self, worker: str, version: PolicyVersion) -> None:
        """``worker`` serves ``version`` and takes groups again."""
        lane = self._lanes[worker]
        self._openings.remove(lane)
        lane.admitting, lane.version = True, version
        self._openings.add(lane)
        self._fill()
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """Something that the stream depends on broke: ``take`` raises it."""
        self._error = self._error or error
        self._changed.set()

    def raise_failure(self) -> None:
        """Raise what broke in the background, if anything did."""
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """Stop: what is in flight, unread or not learned from yet is settled as abandoned."""
        running = list(self._running.values())
        for worker in list(self._lanes):
            self.pause(worker)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self.ledger.abandon()
        self._running.clear()
        self._ready.clear()

    def _fill(self) -> None:
        """Issue tasks while some worker has a credit and the result would be fresh; the least loaded worker first."""
        plan = self._plan
        while self._error is None and not self._held:
            outstanding = len(self._running) + len(self._ready) + self._taken
            if outstanding >= self._to_deliver:
                return
            lane = self._openings.least_loaded(
                partial(
                    may_issue,
                    self._version,
                    outstanding=outstanding,
                    per_step=plan.per_step,
                    max_staleness=plan.max_staleness,
                )
            )
            if lane is None:
                return
            position = self.ledger.issue()
            self._load(lane, +1)
            self._running[position] = asyncio.create_task(self._run(lane, position))

    def _load(self, lane: Lane, change: int) -> None:
        self._openings.remove(lane)
        lane.outstanding += change
        self._openings.add(lane)
        if lane.outstanding == 0:
            lane.idle.set()
        else:
            lane.idle.clear()

    async def _run(self, lane: Lane, position: int) -> None:
        """One group on one worker. A lost worker's task goes to another; any other failure wakes ``take``, which raises it in the loop."""
        try:
            group = await lane.source.group(position, self._task_at(position))
        except ClusterError as error:
            self._give_back(lane, position, error)
            return
        except Exception as error:  # noqa: BLE001  a background failure of any kind must reach the loop, not die with its task
            self.fail(error)
            return
        finally:
            self._load(lane, -1)
        del self._running[position]
        self._on_group()
        self._sort_in(position, group)
        self._fill()
        self._changed.set()

    def _give_back(self, lane: Lane, position: int, error: ClusterError) -> None:
        if self._on_lost is None:
            self.fail(error)
            return
        del self._running[position]
        self._openings.remove(lane)
        lane.admitting = False
        self._reissue(position, str(error))
        self._on_lost(lane.source.name, error)
        self._fill()
        self._changed.set()

    def _reissue(self, position: int, reason: str) -> None:
        if not self.ledger.give_back(position):
            self.ledger.count_failures(["worker"])
            self._messages[f"worker: {reason}"] += 1

    def _sort_in(self, position: int, group: FinishedGroup) -> None:
        """Fewer than two finished siblings cannot be compared: counted as failed, replaced by the next task."""
        self.ledger.count_failures([failure.boundary for failure in group.summary.failed])
        if group.summary.failed:
            self._on_failures(group.summary)
        self.ledger.count_recovered(group.summary.recovered.continued, group.summary.recovered.restarted)
        if len(group.summary.episodes) >= 2:
            self._ready.append((position, group))
            self._unusable = 0
            self._messages.clear()
            return
        self.ledger.settle(position, "failed")
        self._unusable += 1
        self._messages.update(f"{failure.boundary}: {failure.message}" for failure in group.summary.failed)
        if self._unusable >= self._plan.hopeless_groups and self._error is None:
            common = "; ".join(
                f"{message} ({count} episodes)" for message, count in self._messages.most_common(3)
            )
            self._error = StreamError(
                f"the last {self._unusable} groups had fewer than two finished episodes each: {common}"
            )

    async def _wait_for_change(self) -> None:
        """Unblocked by a finished group, a worker's error or a refreshed worker; the deadline names whom we waited for."""
        self.raise_failure()
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), self._plan.stall_s)
        except TimeoutError:
            lanes = ", ".join(
                f"{name} ({lane.outstanding} groups{'' if lane.admitting else ', refreshing'})"
                for name, lane in self._lanes.items()
            )
            raise StreamError(f"nothing arrived for {self._plan.stall_s:.0f} s; waited for {lanes}") from None
        self.raise_failure()
