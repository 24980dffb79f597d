"""The states of the rollout workers, and what the controller should do next. Pure: no Ray, no clock.

    starting --ready--> refreshing --refreshed--> healthy <--answered-- suspect
                            ^                      |   |                  |
                            '------refresh---------'   '----missed--------'--missed again--> dead
    any state --lost--> dead          healthy, suspect --drain--> draining --gone--> (removed)

A dead worker is replaced while fewer are alive than wanted; a name is never used twice. Only a healthy
worker is given tasks, so a replacement never serves before it holds the current weights.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from actors.types import PolicyVersion

WorkerState = Literal["starting", "refreshing", "healthy", "suspect", "draining", "dead"]
_MOVES: dict[WorkerState, frozenset[WorkerState]] = {
    "starting": frozenset({"refreshing", "dead"}),
    "refreshing": frozenset({"healthy", "dead"}),
    "healthy": frozenset({"refreshing", "suspect", "draining", "dead"}),
    "suspect": frozenset({"healthy", "refreshing", "draining", "dead"}),
    "draining": frozenset({"dead"}),
    "dead": frozenset(),
}
ALIVE: tuple[WorkerState, ...] = ("starting", "refreshing", "healthy", "suspect")
SERVING: tuple[WorkerState, ...] = ("healthy", "suspect")


@dataclass(frozen=True, slots=True)
class Member:
    """A worker. ``version`` is what it serves (None until it serves); ``reason`` says why it is dead.

    ``misses`` counts the health checks in a row that it did not answer.
    """

    name: str
    state: WorkerState
    version: PolicyVersion | None
    reason: str
    misses: int


@dataclass(frozen=True, slots=True)
class Change:
    """What brings the fleet to its target: how many workers to start, and which to drain."""

    launch: int
    drain: tuple[str, ...]


class FleetState:
    """All workers that were ever started. A move that the drawing above does not show raises ValueError."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.members: dict[str, Member] = {}
        self.lost = 0  # workers that died, over the whole run
        self.replaced = 0  # workers started in the place of a dead one
        self.losses_in_a_row = 0

    def launch(self, name: str) -> None:
        """A worker called ``name`` is starting."""
        if name in self.members:
            raise ValueError(f"{name} was used before: a name that comes back would hide a death")
        if self.lost > self.replaced and len(self._in(ALIVE)) < self.target:
            self.replaced += 1
        self.members[name] = Member(name, "starting", None, "", 0)

    def next_name(self) -> str:
        """One above all that there were: a worker that was replaced before this fleet had one too."""
        return f"worker-{1 + max((int(name.rpartition('-')[2]) for name in self.members), default=-1)}"

    def ready(self, name: str) -> None:
        """It is up, and gets the current weights before it serves."""
        self._move(name, "refreshing")

    def refresh(self, name: str) -> None:
        """It stops serving to take newer weights."""
        self._move(name, "refreshing")

    def unrefreshed(self, name: str) -> None:
        """It got no newer weights, and serves what it served."""
        self._move(name, "healthy")

    def refreshed(self, name: str, version: PolicyVersion) -> None:
        """It serves ``version``."""
        earlier = self.members[name].version
        if earlier is not None and version < earlier:
            raise ValueError(f"{name} would go back from version {earlier} to {version}")
        self._move(name, "healthy")
        self.members[name] = replace(self.members[name], version=version, misses=0)

    def missed(self, name: str) -> bool:
        """It did not answer a health check. True after two missed checks in a row."""
        if self.members[name].state == "healthy":
            self._move(name, "suspect")
        misses = self.members[name].misses + 1
        self.members[name] = replace(self.members[name], misses=misses)
        return misses >= 2

    def answered(self, name: str) -> None:
        """It answered a health check."""
        if self.members[name].state == "suspect":
            self._move(name, "healthy")
        self.members[name] = replace(self.members[name], misses=0)

    def progress(self) -> None:
        """A group arrived: the fleet works, so losses before it do not add up with later ones."""
        self.losses_in_a_row = 0

    def lose(self, name: str, reason: str) -> bool:
        """It is dead. Returns False when that was known."""
        member = self.members[name]
        if member.state == "dead":
            return False
        if member.state != "draining":
            self.lost += 1
            self.losses_in_a_row += 1
        self._move(name, "dead")
        self.members[name] = replace(self.members[name], reason=reason)
        return True

    def drain(self, name: str) -> None:
        """It gets no new task and ends after those that it has."""
        self._move(name, "draining")

    def plan(self) -> Change:
        """How many workers are missing, or which of too many go: the newest of those that serve.

        A surplus worker that is starting or refreshing goes once it is healthy.
        """
        surplus = len(self._in(ALIVE)) - self.target
        if surplus <= 0:
            return Change(-surplus, ())
        return Change(0, tuple(self._in(SERVING)[::-1][:surplus]))

    @property
    def hopeless(self) -> bool:
        """So many deaths without a single group in between mean that the next worker will die too."""
        return self.losses_in_a_row > max(3, 2 * self.target)

    def counts(self) -> Counter[str]:
        return Counter(member.state for member in self.members.values())

    def reasons(self) -> list[str]:
        """Why workers died, newest last."""
        return [
            f"{member.name}: {member.reason}"
            for member in self.members.values()
            if member.state == "dead" and member.reason
        ]

    def _in(self, states: tuple[WorkerState, ...]) -> list[str]:
        """The workers in one of ``states``, oldest first."""
        return [name for name, member in self.members.items() if member.state in states]

    def _move(self, name: str, state: WorkerState) -> None:
        member = self.members[name]
        if state not in _MOVES[member.state]:
            raise ValueError(f"{name} is {member.state} and cannot become {state}")
        self.members[name] = replace(member, state=state)
