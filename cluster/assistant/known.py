"""Recognises the history that a client sends again, so that nothing is read or written twice.

    known         u1 a1 u2 a2
    u1 a1 u2 a2 | u3              goes on
                | u3              goes on: a client that keeps no history
    u1 a1       | u2              the newest turn again: back to where it began, then answered anew
    u1 a1       | u4              another branch: back to where u2 began, with the Delta of that time
    u1 b1 u2 a2 | u3              an edited history: back to where u1 began, and read from there
    u1 a1 .. u9 | u10             long, with a gap far back: refused, a client has trimmed it

What cannot be recognised is refused (409): a conversation never mixes two histories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING

from actors.endpoint.requests import RequestError
from actors.environments.base import TurnRole

if TYPE_CHECKING:
    from cluster.assistant.conversation import Conversation, Standing

KEPT_TURNS = 8
"""So many of the newest turns are kept as they began. Each holds a context, and shares the Delta of its time.

Of older ones ever fewer are kept, and always the first. So one goes back any distance: what lies between
the turn that was kept and the edit is read, and written, again.
"""


@dataclass(frozen=True, slots=True)
class Line:
    """What one side has said. A tool's result is said by "tool", the calls before it stand in a text.

    ``place``: where it stands in its request, e.g. messages[3].
    """

    role: TurnRole
    text: str
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """Where a turn begins: behind ``at`` known lines. ``unread`` lines of its history come first."""

    at: int
    unread: tuple[Line, ...]
    standing: Standing


class Known:
    """What was said in one conversation, and where it stood before its newest turns.

    ``from_the_beginning``: no line is missing. A conversation that was loaded has forgotten its lines.
    """

    def __init__(self, from_the_beginning: bool = True) -> None:
        self._whole = from_the_beginning
        self._lines: tuple[Line, ...] = ()
        self._standings: dict[int, Standing] = {}

    def has(self, history: Sequence[Line], may_return: bool) -> bool:
        """True for a history that is all of what was said, or that ends where one may return to."""
        size = len(history)
        is_known = self._whole and size > 0 and self._lines[:size] == tuple(history)
        return is_known and (size == len(self._lines) or (may_return and size in self._standings))

    async def start(
        self,
        conversation: Conversation,
        history: tuple[Line, ...],
        turns: tuple[Line, ...],
        may_return: bool,
    ) -> Start:
        """Bring ``conversation`` to where the new ``turns`` begin. Raises RequestError, EngineError."""
        lines = self._lines
        if not lines and self._whole:
            return Start(0, history, conversation.standing())
        resent = self._whole and len(turns) > 0 and lines[:-1] == history + turns
        if not resent and (not history or _ends_with(lines, history) or _ends_with(history, lines)):
            return Start(len(lines), (), conversation.standing())
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(lines, history, strict=False))))
        if not self._whole or (same == 0 and not resent):
            raise _conflict(
                "the messages before the last turn are not this conversation's: send the new turns "
                "alone, or name a new conversation",
                turns,
            )
        if not may_return:
            first = (*history, *turns)[same]
            raise _conflict(
                f"{first.place} is not what was said then, or was answered already: append to the "
                "conversation, or start the server with assistant.edited_history=return",
                turns,
            )
        if self._leaves_out(history, same):
            raise _conflict(
                f"{history[same].place} is not what was said then, more than {KEPT_TURNS} turns back, and "
                "others are left out: send the new turns alone, or name a new conversation",
                turns,
            )
        at = max(size for size in self._standings if size <= same)  # the first turn's is always there
        await conversation.return_to(self._standings[at])
        return Start(at, history[at:], conversation.standing())

    def _leaves_out(self, history: tuple[Line, ...], same: int) -> bool:
        """Whether a client has trimmed or summed up its history: to go back for that would lose the memory.

        Nearer than KEPT_TURNS it is taken for an edit. A branch ends where it was the same, and an edit in
        place has as many lines as before.
        """
        far_back = same < sorted(self._standings)[-KEPT_TURNS:][0]
        return far_back and same < len(history) < len(self._lines)

    def went_on(self, start: Start, lines: Sequence[Line]) -> None:
        """Take in a turn that has ended: its unread history, its turns and the reply."""
        self._standings = {at: kept for at, kept in self._standings.items() if at < start.at}
        self._standings[start.at] = start.standing
        self._standings = {at: self._standings[at] for at in _kept(sorted(self._standings))}
        self._lines = (*self._lines[: start.at], *lines)


def _ends_with(lines: tuple[Line, ...], end: tuple[Line, ...]) -> bool:
    return len(end) <= len(lines) and lines[len(lines) - len(end) :] == end


def _kept(places: Sequence[int]) -> list[int]:
    """The newest KEPT_TURNS of ``places``, and of older ones the first of each doubling of their distance.

    Example: of 0, 2, 4, ... 98 there remain 0, 36, 68, and 84 to 98
    """
    older: dict[int, int] = {}
    for place in places[:-KEPT_TURNS]:
        older.setdefault((places[-1] - place).bit_length(), place)
    return [*older.values(), *places[-KEPT_TURNS:]]


def _conflict(message: str, turns: Sequence[Line]) -> RequestError:
    field = turns[0].place.partition("[")[0] if turns else ""
    return RequestError(409, message, field or "messages", "history_conflict")
