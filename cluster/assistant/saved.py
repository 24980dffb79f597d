"""The conversations that a server has saved: one folder each, below ``assistant.save_dir``.

Invariant: a conversation's folder is whole, or it does not exist. Nobody but this server writes there.

The folder is bounded in number and in bytes. Where it is full, a new conversation is refused: making room
would take away what somebody else had told.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from cluster.assistant.opening import AssistantError
from configs.files import recover_folder, remove_folder
from configs.schema import AssistantConfig

_MIB = 2**20


class FullError(RuntimeError):
    """The folder has no room for one more conversation."""


class SavedConversations:
    """Finds, counts and deletes. Without ``save_dir`` there are none."""

    def __init__(self, settings: AssistantConfig) -> None:
        self._settings = settings
        save_dir = settings.save_dir
        self._root = Path(save_dir).expanduser().absolute() if save_dir else None

    def folder(self, name: str) -> Path | None:
        """Where the conversation ``name`` belongs; None where none is saved."""
        return None if self._root is None else self._root / name

    def find(self, name: str) -> Path | None:
        """The folder of the conversation ``name``, if it is saved."""
        if (folder := self.folder(name)) is None:
            return None
        with suppress(OSError):
            recover_folder(folder)  # a server was killed while it saved the conversation again
        return folder if folder.is_dir() else None

    def names(self) -> list[str]:
        """The conversations that are saved."""
        return [] if self._root is None else names_in(self._root)

    def require_room(self, name: str, coming: int) -> None:
        """Raise FullError if the conversation ``name`` is new here, and the bounds leave no room for it.

        ``coming``: other conversations that are in their first turn, so that they may be saved soon.
        """
        if self._root is None or self.find(name) is not None or not self._root.is_dir():
            return
        count, size = _usage(self._root)
        most, most_mib = self._settings.max_saved, self._settings.max_saved_mib
        if count + coming >= most:
            held, bound = f"{count} conversations", f"assistant.max_saved={most}"
        elif size >= most_mib * _MIB:
            held, bound = f"{size / _MIB:.1f} MiB", f"assistant.max_saved_mib={most_mib:g}"
        else:
            return
        raise FullError(
            f"no room for the new conversation {name}: {held} are saved ({bound}); "
            "delete some (DELETE /v1/conversations/ID), or raise the bound"
        )

    def delete(self, name: str) -> bool:
        """Delete what is saved of ``name``, leftovers of a killed save too. False if there was nothing.

        Raises AssistantError where the disk keeps something of it.
        """
        folder, found = self.folder(name), self.find(name) is not None
        if folder is not None:
            try:
                remove_folder(folder)
            except OSError as error:
                reason = error.strerror or error
                raise AssistantError(f"{folder}: cannot be deleted ({reason}); delete it by hand") from error
        return found


def names_in(root: Path) -> list[str]:
    """The conversations in ``root``, also one whose save was cut off: ``find`` recovers it."""
    names = {path.name for path in root.iterdir() if path.is_dir()} if root.is_dir() else set()
    cut_off = {match[1] for name in names if (match := re.fullmatch(r"\.(.+)\.old", name))}
    return sorted({name for name in names if not name.startswith(".")} | cut_off)


def _usage(root: Path) -> tuple[int, int]:
    """How many conversations ``root`` holds, and the bytes of all its files."""
    count = sum(path.is_dir() and not path.name.startswith(".") for path in root.iterdir())
    size = 0
    for path in root.rglob("*"):
        with suppress(FileNotFoundError):  # another turn has replaced it
            size += path.lstat().st_size
    return count, size
