"""Accounts for every task that was issued, at every moment and over restarts."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import NonNegativeInt

from actors.types import Boundary

Fate = Literal["trained", "stale", "failed", "abandoned"]
MOST_LOSSES = 3
"""A task whose worker was lost this many times is held to be the cause, and fails."""


@dataclass(frozen=True, slots=True)
class LedgerSnapshot:
    """What a checkpoint keeps of a ledger.

    ``pending`` tasks were issued but not settled: they are issued again. ``settled`` counts tasks by fate,
    ``failures`` failed episodes by boundary, ``failed_members`` by environment of environment.mix,
    ``reissued`` the times that a task went back because its
    worker was lost, ``recovered`` the episodes that another worker took over.
    """

    next_position: NonNegativeInt = 0
    pending: tuple[NonNegativeInt, ...] = ()
    settled: Mapping[str, NonNegativeInt] = field(default_factory=dict)
    failures: Mapping[str, NonNegativeInt] = field(default_factory=dict)
    reissued: NonNegativeInt = 0
    recovered: Mapping[str, NonNegativeInt] = field(default_factory=dict)
    failed_members: Mapping[str, NonNegativeInt] = field(default_factory=dict)


class Ledger:
    """Every issued task is trained, stale, failed, abandoned or still pending: exactly one of them."""

    def __init__(self, snapshot: LedgerSnapshot) -> None:
        self._next = snapshot.next_position
        self._again = deque(snapshot.pending)
        self._pending: set[int] = set()
        self._losses: Counter[int] = Counter()  # by position
        self.settled: Counter[str] = Counter(dict(snapshot.settled))
        self.failures: Counter[str] = Counter(dict(snapshot.failures))
        self.failed_members: Counter[str] = Counter(dict(snapshot.failed_members))
        self.issued = sum(self.settled.values())
        self.reissued = snapshot.reissued
        self.recovered: Counter[str] = Counter(dict(snapshot.recovered))

    def issue(self) -> int:
        """The position of the task to run next; tasks that are to be issued again come first."""
        if self._again:
            position = self._again.popleft()
        else:
            position, self._next = self._next, self._next + 1
        self._pending.add(position)
        self.issued += 1
        return position

    def settle(self, position: int, fate: Fate) -> None:
        """Close the account of a pending task. Raises KeyError when it is not pending."""
        self._pending.remove(position)
        self.settled[fate] += 1

    def abandon(self) -> None:
        """Settle all pending tasks: the run ends here."""
        for position in tuple(self._pending):
            self.settle(position, "abandoned")

    def give_back(self, position: int) -> bool:
        """Take back a task whose worker was lost, to issue it again.

        Returns False, and settles the task as failed, when that happened ``MOST_LOSSES`` times.
        """
        self._losses[position] += 1
        if self._losses[position] >= MOST_LOSSES:
            self.settle(position, "failed")
            return False
        self._pending.remove(position)
        self._again.append(position)
        self.issued -= 1
        self.reissued += 1
        return True

    def rewind(self, snapshot: LedgerSnapshot) -> None:
        """Go back to the books of a checkpoint: what was settled since is issued again.

        What happened stays counted: failures, re-issues, recoveries.
        """
        self._next, self._again = snapshot.next_position, deque(snapshot.pending)
        self._pending.clear()
        self.settled = Counter(dict(snapshot.settled))
        self.issued = sum(self.settled.values())

    def adopt(self, position: int) -> bool:
        """Count a task as pending that is finished already. False where the books have settled it."""
        if position in self._again:
            self._again.remove(position)
        elif position >= self._next:
            self._again.extend(range(self._next, position))
            self._next = position + 1
        else:
            return False
        self._pending.add(position)
        self.issued += 1
        return True

    def count_failures(self, boundaries: Sequence[Boundary], member: str = "") -> None:
        """Count failed episodes by the boundary that failed. ``member``: of environment.mix, their own."""
        self.failures.update(boundaries)
        if member and boundaries:
            self.failed_members[member] += len(boundaries)

    def count_recovered(self, continued: int, restarted: int) -> None:
        """Count episodes of a finished group that a lost worker had begun, by how they went on."""
        self.recovered.update(continued=continued, restarted=restarted)

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    @property
    def balanced(self) -> bool:
        return self.issued == sum(self.settled.values()) + len(self._pending)

    def snapshot(self) -> LedgerSnapshot:
        pending = tuple(sorted([*self._pending, *self._again]))
        return LedgerSnapshot(
            next_position=self._next,
            pending=pending,
            settled=dict(self.settled),
            failures=dict(self.failures),
            reissued=self.reissued,
            recovered=dict(self.recovered),
            failed_members=dict(self.failed_members),
        )


def ledger_line(ledger: Ledger) -> str:
    """The books in one line, for the end of a run. It says so when they do not balance."""
    fates = ", ".join(f"{count} {fate}" for fate, count in sorted(ledger.settled.items()) if count)
    episodes = ledger.recovered
    recovered = (
        f" ({episodes['continued']} episodes recovered, {episodes['restarted']} restarted)"
        if episodes.total()
        else ""
    )
    boundaries = ", ".join(f"{count} {boundary}" for boundary, count in sorted(ledger.failures.items()))
    members = ", ".join(f"{count} of {name}" for name, count in sorted(ledger.failed_members.items()))
    failed = f"; failed episodes: {boundaries}" if boundaries else ""
    failed += f" ({members})" if members else ""
    problem = "" if ledger.balanced else " THE LEDGER DOES NOT BALANCE: a task was lost or counted twice"
    return (
        f"tasks: {ledger.issued} issued: {fates or 'none settled'}, {ledger.in_flight} in flight; "
        f"{ledger.reissued} re-issued after a loss{recovered}{failed}{problem}"
    )
