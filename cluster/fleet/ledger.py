"""The books of a run: every task that was issued is accounted for, at every moment and over restarts."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from actors.types import Boundary

Fate = Literal["trained", "stale", "failed", "abandoned"]
MOST_LOSSES = 3
"""Workers that a task may be running on when they are lost, before it is held to be the cause."""


@dataclass(frozen=True, slots=True)
class LedgerSnapshot:
    """What a checkpoint keeps: settled counts, and the positions that were issued but not settled (to be issued again)."""

    next_position: int = 0
    pending: tuple[int, ...] = ()
    settled: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    reissued: int = 0
    recovered: Mapping[str, int] = field(default_factory=dict)


class Ledger:
    """Every issued task is trained, stale, failed, abandoned or still pending: exactly one of them."""

    def __init__(self, snapshot: LedgerSnapshot) -> None:
        self._next = snapshot.next_position
        self._again = deque(snapshot.pending)
        self._pending: set[int] = set()
        self.settled: Counter[str] = Counter(dict(snapshot.settled))
        self.failures: Counter[str] = Counter(dict(snapshot.failures))  # failed episodes by boundary
        self.issued = sum(self.settled.values())
        self.reissued = snapshot.reissued  # times that a task went back because its worker was lost
        self.recovered: Counter[str] = Counter(
            dict(snapshot.recovered)
        )  # of their finished episodes: continued from their progress, or restarted
        self._given_back: Counter[int] = Counter()

    def issue(self) -> int:
        """The position of the task to run next; positions left over by a checkpoint come first."""
        if self._again:
            position = self._again.popleft()
        else:
            position, self._next = self._next, self._next + 1
        self._pending.add(position)
        self.issued += 1
        return position

    def settle(self, position: int, fate: Fate) -> None:
        self._pending.remove(position)
        self.settled[fate] += 1

    def abandon(self) -> None:
        """The run ends here: nothing more comes of what is pending."""
        for position in tuple(self._pending):
            self.settle(position, "abandoned")

    def give_back(self, position: int) -> bool:
        """The worker of this task was lost: it is issued again. False, and settled as failed, when it took ``MOST_LOSSES`` workers with it."""
        self._given_back[position] += 1
        if self._given_back[position] >= MOST_LOSSES:
            self.settle(position, "failed")
            return False
        self._pending.remove(position)
        self._again.append(position)
        self.issued -= 1
        self.reissued += 1
        return True

    def count_failures(self, boundaries: Sequence[Boundary]) -> None:
        self.failures.update(boundaries)

    def count_recovered(self, continued: int, restarted: int) -> None:
        """Of a finished group: its episodes that a lost worker had begun."""
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
            self._next, pending, dict(self.settled), dict(self.failures), self.reissued, dict(self.recovered)
        )


def ledger_line(ledger: Ledger) -> str:
    """For the end of a run. Says so when the books do not balance."""
    settled = (
        ", ".join(f"{count} {fate}" for fate, count in sorted(ledger.settled.items()) if count)
        or "none settled"
    )
    books = "" if ledger.balanced else " THE LEDGER DOES NOT BALANCE: a task was lost or counted twice"
    failed = ", ".join(f"{count} {boundary}" for boundary, count in sorted(ledger.failures.items()))
    episodes = f"; failed episodes: {failed}" if failed else ""
    began = ledger.recovered
    again = (
        f" ({began['continued']} episodes recovered, {began['restarted']} restarted)" if began.total() else ""
    )
    return f"tasks: {ledger.issued} issued: {settled}, {ledger.in_flight} in flight; {ledger.reissued} re-issued after a loss{again}{episodes}{books}"
