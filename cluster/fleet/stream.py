"""Tasks out, fresh trajectory groups in, and a ledger that accounts for every task.

      tasks --fill()--> worker.group() ... worker.group()      at most ``credits`` groups per worker
                               |
                               v  finished, in any order
      take() <--gate-- ready groups      (those older than max_staleness are dropped, counted, replaced)

The invariant: a group leaves ``take`` only if the learner, at that moment, is at most ``max_staleness``
versions ahead of the policy that sampled it. Nothing here calls Ray: a worker is anything with a name and a
coroutine ``group``, and only the summary of a finished group is read. loop.py calls ``take``. Each wait in
it ends because a group finishes, a worker raises, or the stall deadline passes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from actors.episodes.group_summary import GroupSummary
from actors.types import PolicyVersion, Task
from cluster.common.errors import ClusterError, StreamError, WeightsLost
from cluster.common.failures import failure_text, most_common_failures
from cluster.common.patience import within
from cluster.fleet.contract import FinishedGroup, GroupSource, Lane, Openings, may_issue
from cluster.fleet.ledger import Ledger, LedgerSnapshot


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """``steps`` batches of ``per_step`` groups will be taken, so nothing is issued beyond them.

    ``credits`` bounds the groups in flight on one worker; ``stall_s`` is the longest time without any event
    before the stream gives up.
    """

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
class StreamCalls:
    """What the stream calls."""

    task_at: Callable[[int], Task]
    """The task at a position of the task source."""
    missing: Callable[[Sequence[FinishedGroup]], Awaitable[Sequence[int]]] | None = None
    """Bring a batch to the learner before ``take`` returns it; the places that are lost are issued again."""
    on_failures: Callable[[GroupSummary], None] = lambda summary: None
    """A group arrived in which episodes failed."""
    on_group: Callable[[], None] = lambda: None
    """A group arrived."""
    on_lost: Callable[[str, Exception], None] | None = None
    """A call to the worker of that name failed. None: that ends the stream."""


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """A finished group. ``version``: what its age is counted from, mostly the version that sampled it."""

    position: int
    version: PolicyVersion
    group: FinishedGroup


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one step trains on. ``positions`` and ``staleness`` have one value per group.

    ``dropped`` counts the stale groups since the last batch.
    """

    positions: tuple[int, ...]
    groups: tuple[FinishedGroup, ...]
    staleness: tuple[int, ...]
    dropped: int


class GroupStream:
    """Bounded-staleness stream over the workers. It lives on one asyncio loop; ``close`` ends it for good."""

    def __init__(
        self,
        plan: StreamPlan,
        workers: Sequence[GroupSource],
        version: PolicyVersion,
        ledger: Ledger,
        calls: StreamCalls,
    ) -> None:
        self._plan, self._version, self._calls = plan, version, calls
        self.ledger = ledger
        self._lanes: dict[str, Lane] = {}
        self._openings = Openings(plan.credits)
        for worker in workers:
            self._open_lane(worker, version)
        self._running: dict[int, asyncio.Task[None]] = {}  # by position
        self._ready: deque[_Ready] = deque()
        self._taken = 0  # groups of the batch that is being put together
        self._untrained: list[_Ready] = []  # these, and then those of the batch that the learner has
        self._kept: set[int] = set()  # positions that stayed in the last ``rewind``
        self._renamed: dict[PolicyVersion, PolicyVersion] = {}  # of checkpoints, by ``rewind``
        self._to_deliver = plan.steps * plan.per_step
        self._unusable = 0  # groups in a row
        self._messages: list[str] = []  # of those groups' failures
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._held = False

    # --- the workers --------------------------------------------------------------------------------------

    def add(self, worker: GroupSource, version: PolicyVersion) -> None:
        """Give tasks to ``worker``, which serves ``version``."""
        self._open_lane(worker, version)
        self._fill()
        self._changed.set()

    def remove(self, worker: str) -> None:
        """Forget ``worker``: it is gone, or about to be. Its tasks are issued again when its calls fail."""
        if (lane := self._lanes.pop(worker, None)) is not None:
            self._close_lane(lane)
            lane.idle.set()  # nobody needs to wait for it any longer

    def pause(self, worker: str) -> None:
        """Give ``worker`` nothing new: it is about to be refreshed, or ended."""
        if (lane := self._lanes.get(worker)) is not None:
            self._close_lane(lane)

    def resume(self, worker: str, version: PolicyVersion) -> None:
        """Give tasks to ``worker`` again, which serves ``version`` now."""
        lane = self._lanes[worker]
        self._openings.remove(lane)
        lane.admitting, lane.version = True, version
        self._openings.add(lane)
        self._fill()
        self._changed.set()

    async def delivered(self, worker: str) -> None:
        """Wait until ``worker`` has delivered all its groups, or is gone. Each group has its own deadline."""
        if (lane := self._lanes.get(worker)) is not None:
            await lane.idle.wait()

    def hold(self) -> None:
        """Issue nothing to any worker until ``release``: the workers are needed for something else."""
        self._held = True

    def release(self) -> None:
        """Issue tasks again."""
        self._held = False
        self._fill()
        self._changed.set()

    def _open_lane(self, worker: GroupSource, version: PolicyVersion) -> None:
        lane = self._lanes[worker.name] = Lane(worker, version, asyncio.Event())
        lane.idle.set()
        self._openings.add(lane)

    def _close_lane(self, lane: Lane) -> None:
        self._openings.remove(lane)
        lane.admitting = False

    # --- the learner --------------------------------------------------------------------------------------

    async def take(self) -> Batch:
        """The next ``per_step`` fresh groups, in task order; ``trained`` settles them.

        Raises StreamError, or what a worker raised.
        """
        fresh = self._untrained = list[_Ready]()
        dropped = 0
        while True:
            dropped += self._take_ready(fresh)
            if len(fresh) < self._plan.per_step:
                self._fill()
                await self._wait_for_change()
            elif not await self._drop_missing(fresh):
                break
        fresh.sort(key=lambda entry: entry.position)
        ages = tuple(self._version - entry.version for entry in fresh)
        self._taken = 0
        self._to_deliver -= len(fresh)
        self._version += 1
        self._fill()
        groups = tuple(entry.group for entry in fresh)
        return Batch(tuple(entry.position for entry in fresh), groups, ages, dropped)

    def trained(self, batch: Batch, version: PolicyVersion) -> None:
        """Settle the tasks of ``batch``: the learner has consumed it, and has ``version`` now.

        ``take`` counted on a new version. Where the batch had no signal there is none.
        """
        for position in batch.positions:
            self.ledger.settle(position, "trained")
        self._untrained = []
        self._version = version

    async def settled(self) -> None:
        """Wait until every group in flight has arrived, or was lost. The stream is held."""
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def rewind(self, books: LedgerSnapshot, saved: PolicyVersion, version: PolicyVersion, steps: int) -> None:
        """Go back to a checkpoint: its version was ``saved`` and is ``version`` from now on.

        Nothing is in flight, and ``steps`` are left. A finished group that was not trained stays, once, if it
        is at most ``max_staleness`` optimizer steps away from the checkpoint: before it, or after it on the
        way that was lost. The other tasks are issued again.
        """
        finished, origin = [*self._untrained, *self._ready], self._renamed.get(saved, saved)
        self.ledger.rewind(books)
        self._ready.clear()
        self._untrained, kept = [], set[int]()
        for entry in finished:
            away = abs(entry.version - origin)
            near = away <= self._plan.max_staleness and entry.position not in self._kept
            if near and self.ledger.adopt(entry.position):
                kept.add(entry.position)
                self._ready.append(_Ready(entry.position, version - away, entry.group))
        self._kept, self._renamed[saved], self._version = kept, version, version
        self._taken, self._to_deliver = 0, steps * self._plan.per_step
        if isinstance(self._error, WeightsLost):  # there are others now
            self._error = None

    def fail(self, error: Exception) -> None:
        """Make ``take`` raise ``error``: something that the stream depends on broke."""
        self._error = self._error or error
        self._changed.set()

    @property
    def has_failed(self) -> bool:
        """Whether something broke in the background: what a caller waits for may never come."""
        return self._error is not None

    def raise_failure(self) -> None:
        """Raise what broke in the background, if anything did."""
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        """Stop. What is in flight, unread or not learned from yet is settled as abandoned."""
        running = list(self._running.values())
        for worker in list(self._lanes):
            self.pause(worker)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self.ledger.abandon()
        self._running.clear()
        self._ready.clear()

    def _take_ready(self, fresh: list[_Ready]) -> int:
        """Move ready groups into ``fresh`` until a batch is full. Returns how many were stale and dropped."""
        dropped = 0
        while self._ready and len(fresh) < self._plan.per_step:
            entry = self._ready.popleft()
            if self._version - entry.version > self._plan.max_staleness:
                self.ledger.settle(entry.position, "stale")
                dropped += 1
            else:
                fresh.append(entry)
        self._taken = len(fresh)
        return dropped

    async def _drop_missing(self, fresh: list[_Ready]) -> bool:
        """Bring a full batch to the learner; drop the groups that are lost. Returns whether any was."""
        if self._calls.missing is None:
            return False
        lost = await self._calls.missing([entry.group for entry in fresh])
        for place in lost:
            worker = fresh[place].group.summary.worker
            self._reissue(fresh[place].position, f"{worker}'s node was lost with a finished group in it")
        fresh[:] = [entry for place, entry in enumerate(fresh) if place not in lost]
        self._taken = len(fresh)
        return bool(lost)

    async def _wait_for_change(self) -> None:
        """Wait for a finished group, a worker's error or a refreshed worker. Raises StreamError when late."""
        self.raise_failure()
        self._changed.clear()
        try:
            await within(self._plan.stall_s, self._changed.wait())
        except TimeoutError:
            lanes = ", ".join(
                f"{name} ({lane.outstanding} groups{'' if lane.admitting else ', refreshing'})"
                for name, lane in self._lanes.items()
            )
            raise StreamError(f"nothing arrived for {self._plan.stall_s:.0f} s; waited for {lanes}") from None
        self.raise_failure()

    # --- the groups ---------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Issue tasks to the least loaded workers that have a credit, while the result would be fresh."""
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
        """Count a group more or less on ``lane``."""
        self._openings.remove(lane)
        lane.outstanding += change
        self._openings.add(lane)
        if lane.outstanding == 0:
            lane.idle.set()
        else:
            lane.idle.clear()

    async def _run(self, lane: Lane, position: int) -> None:
        """Run a group on a worker. A lost worker's task goes to another.

        Any other failure wakes ``take``, which raises it in the loop.
        """
        try:
            group = await lane.source.group(position, self._calls.task_at(position))
        except ClusterError as error:
            self._give_back(lane, position, error)
            return
        except Exception as error:  # noqa: BLE001  any background failure must reach the loop
            self.fail(error)
            return
        finally:
            self._load(lane, -1)
        del self._running[position]
        self._calls.on_group()
        self._sort_in(position, group)
        self._fill()
        self._changed.set()

    def _give_back(self, lane: Lane, position: int, error: ClusterError) -> None:
        """The worker of ``position`` is lost: its task goes to another."""
        if self._calls.on_lost is None:
            self.fail(error)
            return
        del self._running[position]
        self._close_lane(lane)
        self._reissue(position, str(error))
        self._calls.on_lost(lane.source.name, error)
        self._fill()
        self._changed.set()

    def _reissue(self, position: int, reason: str) -> None:
        """Issue the task again; one that lost too many workers fails instead."""
        if not self.ledger.give_back(position):
            self.ledger.count_failures(["worker"])
            self._messages.append(f"worker: {reason}")

    def _sort_in(self, position: int, group: FinishedGroup) -> None:
        """Queue a finished group for ``take``.

        Fewer than two finished siblings cannot be compared: that group fails, and the next task replaces it.
        """
        boundaries = [failure.boundary for failure in group.summary.failed]
        self.ledger.count_failures(boundaries, group.summary.member)
        if group.summary.failed:
            self._calls.on_failures(group.summary)
        self.ledger.count_recovered(group.summary.recovered.continued, group.summary.recovered.restarted)
        if len(group.summary.episodes) >= 2:
            self._ready.append(_Ready(position, group.summary.policy_version, group))
            self._unusable = 0
            self._messages.clear()
            return
        self.ledger.settle(position, "failed")
        self._unusable += 1
        self._messages += map(failure_text, group.summary.failed)
        if self._unusable >= self._plan.hopeless_groups and self._error is None:
            common = "; ".join(
                f"{message} ({count} episodes)" for message, count in most_common_failures(self._messages, 3)
            )
            self._error = StreamError(
                f"the last {self._unusable} groups had fewer than two finished episodes each: {common}"
            )
