"""Replies of a judge, kept on disk so that the same question is asked and paid for once: by any process, in any run."""

from __future__ import annotations

import sqlite3
from typing import Any

import diskcache
from diskcache.core import MODE_RAW, MODE_TEXT

from actors.protocols import TaskError


class _TextDisk(diskcache.Disk):
    """Stores texts only. diskcache pickles what is no text, and unpickles whatever a folder says is a pickle: a cache may come from elsewhere."""

    def store(self, value: Any, read: bool, key: Any = diskcache.UNKNOWN) -> Any:
        if not isinstance(value, str):
            raise TypeError(f"a text is stored, got {type(value).__name__}")
        return super().store(value, read, key=key)

    def get(self, key: Any, raw: Any) -> Any:
        if not raw or not isinstance(key, str):
            raise ValueError("its key is no text")
        return key

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode not in (MODE_RAW, MODE_TEXT):
            raise ValueError(f"its mode is {mode}, and texts have {MODE_RAW} or {MODE_TEXT}")
        return super().fetch(mode, filename, value, read)


class ReplyCache:
    """A folder of replies by key. Safe for threads and processes that share it."""

    def __init__(self, folder: str) -> None:
        """Raises TaskError when the folder cannot be used."""
        self._folder = folder
        try:
            self._cache = diskcache.Cache(folder, disk=_TextDisk, eviction_policy="none")
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None

    def find(self, key: str) -> str | None:
        """The reply kept under ``key``; None also for an entry that is no text. Raises TaskError."""
        try:
            reply = self._cache.get(key)
        except ValueError:
            return None
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            raise self._unusable(error) from None
        return reply if isinstance(reply, str) else None

    def keep(self, key: str, reply: str) -> None:
        """Raises TaskError."""
        try:
            self._cache.set(key, reply)
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> TaskError:
        cause = " ".join(str(error).split()) or type(error).__name__
        return TaskError(
            f"the folder {self._folder} cannot keep verdicts ({cause}): change environment.rubric.judge.cache_dir, or empty it"
        )
