"""The conversations of a server: each has a name, a memory of its own, and one turn at a time.

    turn("ada") --> room in the table? --> ada's lock --> a slot of the engine --> the conversation

The rule for room: at most ``assistant.max_conversations`` at once. When one more comes, the one that was idle longest is put away; so is, when any
request comes, one that was idle for ``assistant.idle_s``. Put away means saved in ``assistant.save_dir`` and loaded when it is named again; without
that folder it is dropped. None is put away in the middle of a turn.

Waits: a turn waits for the one before it and for a slot, both of which end at the latest with their requests' deadlines.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.assistant.conversation import Conversation
from cluster.assistant.values import AssistantError, Parts


class BusyError(RuntimeError):
    """No room: every conversation in the table is in the middle of a turn."""


@dataclass(slots=True)
class _Entry:
    """``users``: turns that run or wait. ``begun``: whether the conversation was loaded, or its first turn is over."""

    conversation: Conversation
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)
    begun: bool = False


class Sessions:
    """For one event loop. ``slots``: how many conversations speak at once, at most the engine's."""

    def __init__(self, parts: Parts, slots: int) -> None:
        self._parts = parts
        self._settings = parts.opening.config.assistant
        self._folder = (
            Path(self._settings.save_dir).expanduser().absolute() if self._settings.save_dir else None
        )
        self._entries: dict[str, _Entry] = {}
        self._slots = asyncio.Semaphore(slots)
        self._anonymous = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    @asynccontextmanager
    async def turn(
        self, name: str | None, system_prompt: str | None
    ) -> AsyncIterator[tuple[Conversation, bool]]:
        """The conversation, for this block alone, and whether it is new. ``name`` None: one that is forgotten afterwards.

        A new one is told ``system_prompt`` (None: the model's own); if its first turn fails it never was. Raises BusyError; AssistantError for a
        damaged save, and where an earlier conversation cannot be saved.
        """
        await self._put_away_idle()
        key = f"~{next(self._anonymous)}" if name is None else name
        if key not in self._entries:
            await self._make_room()
        entry = self._entries.get(key) or self._entries.setdefault(
            key, _Entry(self._open(key, system_prompt))
        )
        entry.users += 1
        try:
            async with entry.lock, self._slots:
                if not entry.begun and name is not None and (saved := self._saved(name)) is not None:
                    await entry.conversation.load(saved)
                    entry.begun = True
                yield entry.conversation, not entry.begun
                entry.begun = True
        finally:
            entry.users -= 1
            entry.last_used = time.monotonic()
            if entry.users == 0 and (name is None or not entry.begun):
                await self._drop(key)

    def look(self, name: str) -> Conversation | None:
        """A conversation as it stands; None where it is not in memory."""
        entry = self._entries.get(name)
        return entry.conversation if entry is not None and entry.begun else None

    async def forget(self, name: str) -> bool:
        """Drop it, from memory and from the disk; whether there was any. Raises BusyError in the middle of a turn."""
        entry, saved = self._entries.get(name), self._saved(name)
        if entry is not None and entry.users:
            raise BusyError(f"conversation {name} is in the middle of a turn: try again")
        if saved is not None:
            import shutil

            shutil.rmtree(saved, ignore_errors=True)
        if entry is not None:
            await self._drop(name)
        return entry is not None or saved is not None

    async def close(self) -> list[str]:
        """Put all away; returns why some could not be saved."""
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
        return Conversation(
            self._parts, name, self._parts.opening.system_prompt if system_prompt is None else system_prompt
        )

    def _saved(self, name: str) -> Path | None:
        folder = None if self._folder is None else self._folder / name
        return folder if folder is not None and folder.is_dir() else None

    def _idle(self) -> list[str]:
        """Those that may be put away, the longest idle first."""
        return sorted(
            (name for name, entry in self._entries.items() if entry.users == 0),
            key=lambda name: self._entries[name].last_used,
        )

    async def _put_away_idle(self) -> None:
        for name in self._idle():
            entry = self._entries.get(
                name
            )  # another request may have taken it while one before it was closed
            if (
                entry is not None
                and entry.users == 0
                and time.monotonic() - entry.last_used > self._settings.idle_s
            ):
                await self._put_away(name)

    async def _make_room(self) -> None:
        while len(self._entries) >= self._settings.max_conversations:
            idle = self._idle()
            if not idle:
                most = self._settings.max_conversations
                raise BusyError(
                    f"all {most} conversations are in the middle of a turn (assistant.max_conversations={most}): try again later"
                )
            await self._put_away(idle[0])

    async def _put_away(self, name: str) -> None:
        """Saved before anyone else runs: who names it next finds it on the disk."""
        if self._folder is not None and self._entries[name].begun:
            self._entries[name].conversation.save(self._folder / name, overwrite=True)
        await self._drop(name)

    async def _drop(self, name: str) -> None:
        await self._entries.pop(name).conversation.close()
