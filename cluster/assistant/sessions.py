"""The conversations of a server. Each has a name, a memory of its own, and one turn at a time.

    turn("ada") --> room in the table? --> ada's lock --> a slot of the engine --> the conversation

The table holds at most ``assistant.max_conversations``. When another one comes, the conversation that was
idle longest is put away. Each request also puts away those that were idle for ``assistant.idle_s``. A
conversation is saved in ``assistant.save_dir`` after every turn, and loaded when it is named again. Without
that folder, what is put away is dropped. A conversation in the middle of a turn is never put away.

Every wait, and who unblocks it: a turn waits for the turn before it and for a slot. Both are released at the
latest when their requests reach their deadlines.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from cluster.assistant.conversation import Conversation
from cluster.assistant.known import Line
from cluster.assistant.opening import AssistantError, Parts
from cluster.assistant.saved import SavedConversations

_log = logging.getLogger(__name__)


class BusyError(RuntimeError):
    """No room: every conversation in the table is in the middle of a turn."""


@dataclass(slots=True)
class _Entry:
    """``users`` counts turns that run or wait. ``begun``: it was loaded, or its first turn is over.

    ``problem``: why its last turn could not be saved, "" if it was.
    """

    conversation: Conversation
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)
    begun: bool = False
    problem: str = ""


class Sessions:
    """The table, for one event loop.

    ``slots``: how many conversations speak at once, at most the engine's.
    """

    def __init__(self, parts: Parts, slots: int) -> None:
        self._parts = parts
        self._settings = parts.opening.config.assistant
        self._saved = SavedConversations(self._settings)
        self._entries: dict[str, _Entry] = {}
        self._slots = asyncio.Semaphore(slots)
        self._anonymous = itertools.count()

    def __len__(self) -> int:
        """The conversations that have a name."""
        return sum(not _is_anonymous(name) for name in self._entries)

    def names(self) -> dict[str, bool]:
        """The conversations that have a name, and whether each is in memory, or else on the disk alone."""
        here = [name for name, entry in self._entries.items() if entry.begun and not _is_anonymous(name)]
        return dict.fromkeys(self._saved.names(), False) | dict.fromkeys(here, True)

    @property
    def unsaved(self) -> dict[str, str]:
        """By the names of the conversations whose last turn could not be saved: why."""
        return {name: entry.problem for name, entry in self._entries.items() if entry.problem}

    @asynccontextmanager
    async def turn(
        self,
        name: str | None,
        system_prompt: str | None,
        history: Sequence[Line] = (),
        looks_only: bool = False,
    ) -> AsyncIterator[tuple[Conversation, bool]]:
        """Give the block the conversation for itself, and whether it is new.

        Without a ``name`` it is the conversation in which ``history`` was said, or a new one. It is
        forgotten when it is put away. A new conversation gets ``system_prompt`` (None: the model's own). If
        its first turn fails, it is dropped. A block that ``looks_only`` is not saved.

        Raises BusyError; FullError for a new name where the bounds of ``save_dir`` leave no room;
        AssistantError for a damaged save (ForeignMemory for another model's), and if the conversation that
        must make room cannot be saved.
        """
        await self._put_away_idle()
        key = name or self._going_on(system_prompt, history) or f"~{next(self._anonymous)}"
        if key not in self._entries:
            await self._make_room()
        if (entry := self._entries.get(key)) is None:  # another request may have opened it meanwhile
            if name is not None:
                # a name cannot begin with "~": those conversations are never saved
                others = (other for other, entry in self._entries.items() if not entry.begun)
                self._saved.require_room(name, sum(not other.startswith("~") for other in others))
            entry = self._entries[key] = _Entry(self._open(key, system_prompt))
        entry.users += 1
        try:
            async with entry.lock, self._slots:
                if not entry.begun and name is not None and (saved := self._saved.find(name)) is not None:
                    await entry.conversation.load(saved)
                    entry.begun = True
                yield entry.conversation, not entry.begun
                entry.begun = entry.begun or not looks_only  # it may be deleted since it was seen
                if name is not None and not looks_only:
                    self._save(name, entry)
        finally:
            entry.users -= 1
            entry.last_used = time.monotonic()
            if entry.users == 0 and not entry.begun:
                await self._drop(key)

    def look(self, name: str) -> Conversation | None:
        """The conversation as it stands; None if it is not in memory."""
        entry = self._entries.get(name)
        return entry.conversation if entry is not None and entry.begun else None

    async def open(self, name: str) -> Conversation | None:
        """The conversation, from the disk if it is not in memory; None if it is nowhere."""
        if self.look(name) is None and self._saved.find(name) is not None:
            async with self.turn(name, None, looks_only=True):
                pass
        return self.look(name)

    async def forget(self, name: str) -> bool:
        """Drop a conversation from memory and disk; False if there is none.

        Raises BusyError during a turn, AssistantError where the disk keeps something of it.
        """
        entry = self._entries.get(name)
        if entry is not None and entry.users:
            raise BusyError(f"conversation {name} is in the middle of a turn: try again")
        was_saved = self._saved.delete(name)
        if entry is not None:
            await self._drop(name)
        return entry is not None or was_saved

    async def close(self) -> list[str]:
        """Put all conversations away; returns an error for each that could not be saved."""
        problems: list[str] = []
        while self._entries:
            name = next(iter(self._entries))
            try:
                await self._put_away(name)
            except AssistantError as error:
                problems.append(str(error))
                await self._drop(name)
        return problems

    def _open(self, name: str, system_prompt: str | None) -> Conversation:
        default = self._parts.opening.system_prompt
        return Conversation(self._parts, name, default if system_prompt is None else system_prompt)

    def _save(self, name: str, entry: _Entry) -> None:
        """Save a turn that has ended. It is answered all the same where the disk refuses it.

        The conversation stays in memory then, ``unsaved`` names it, and its next turn is saved with it.
        """
        if (folder := self._saved.folder(name)) is None:
            return
        try:
            entry.conversation.save(folder, overwrite=True)
            entry.problem = ""
        except AssistantError as error:
            if not entry.problem:
                _log.warning("a turn is answered but not saved: %s", error)
            entry.problem = str(error)

    def _idle(self) -> list[str]:
        """The conversations without a turn: first those without a name, and of these the longest idle."""
        idle = (name for name, entry in self._entries.items() if entry.users == 0)
        return sorted(idle, key=lambda name: (not _is_anonymous(name), self._entries[name].last_used))

    def _going_on(self, system_prompt: str | None, history: Sequence[Line]) -> str | None:
        """The conversation without a name in which ``history`` was said. Only who knows it all finds it.

        Where no conversation may go back, it must be all of what was said.
        """
        may_return = self._settings.edited_history == "return"
        prompt = self._parts.opening.system_prompt if system_prompt is None else system_prompt
        for name, entry in self._entries.items():
            idle = _is_anonymous(name) and entry.begun and entry.users == 0
            talk = entry.conversation
            if idle and talk.system_prompt == prompt and talk.known.has(history, may_return):
                return name
        return None

    async def _put_away_idle(self) -> None:
        for name in self._idle():
            # Putting the previous one away has waited: another request may have taken this one since.
            entry = self._entries.get(name)
            if entry is None or entry.users:
                continue
            if time.monotonic() - entry.last_used > self._settings.idle_s:
                with suppress(AssistantError):  # the disk refuses it: it stays here, and ``unsaved`` names it
                    await self._put_away(name)

    async def _make_room(self) -> None:
        most = self._settings.max_conversations
        while len(self._entries) >= most:
            idle = self._idle()
            if not idle:
                raise BusyError(
                    f"all {most} conversations are in the middle of a turn "
                    f"(assistant.max_conversations={most}): try again later"
                )
            await self._put_away(idle[0])

    async def _put_away(self, name: str) -> None:
        entry = self._entries[name]
        if entry.problem:  # before the first await: a request that names it during _drop finds it saved
            self._save(name, entry)
            if entry.problem:
                raise AssistantError(entry.problem)
        await self._drop(name)

    async def _drop(self, name: str) -> None:
        await self._entries.pop(name).conversation.close()


def _is_anonymous(name: str) -> bool:
    return name.startswith("~")
