"""The outbox: what MLflow has not yet taken of a run, in an SQLite file in the run's folder.

    tracker --append--> | 9 status | 8 point | ... | 2 point | 1 entity | --oldest--> sender --> MLflow
                          newest                               oldest    <--taken--- its answer deletes them

A record leaves the file only after MLflow has answered: an outage or a killed driver loses nothing.
SQLite keeps the order and never shows half a record. While the disk is full, memory holds the newest records.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter

_MOST_POINTS = 1000  # in one call: MLflow's limit
_MOST_IN_MEMORY = 50_000  # records; about 20 MB
# Exclusive: no shared memory, which a network file system lacks. Normal: no fsync for each record.
# The status that an earlier process left is outdated: the run goes on.
_OPEN = """
PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS outbox (number INTEGER PRIMARY KEY, kind TEXT, content BLOB);
DELETE FROM outbox WHERE kind = 'Status';
"""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one metric. ``time`` is that of its logging (ms since 1970), however late it is sent."""

    key: str
    value: float
    time: int
    step: int


@dataclass(frozen=True, slots=True)
class Entity:
    """A file, a dataset or a kept checkpoint. ``values["name"]`` is its path or its name in MLflow."""

    kind: Literal["artifact", "dataset", "model"]
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Status:
    """The end of the run, at ``time`` (ms since 1970)."""

    status: str
    time: int


Record = Point | Entity | Status
# NaN and the infinities stay what they are: MLflow shows them. No two kinds have the same fields.
_JSON: TypeAdapter[Record] = TypeAdapter(Record, config=ConfigDict(ser_json_inf_nan="constants"))


class Outbox:
    """The records in the order of logging. Safe from any thread.

    The constructor raises OSError and sqlite3.OperationalError; the other methods raise nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._database = _opened(path)
        bounds = "SELECT coalesce(min(number) - 1, 0), coalesce(max(number), 0) FROM outbox"
        self._taken, self._newest = self._database.execute(bounds).fetchone()
        self._offered = self._taken  # the last of what ``oldest`` returned. All three are numbers of records
        self._memory: list[tuple[int, str, bytes]] = []  # the newest rows, while the disk takes none
        self.lost = 0  # records for which neither the disk nor memory had room

    def __len__(self) -> int:
        """The number of records that MLflow has not taken."""
        return self._newest - self._taken

    def append(self, records: Sequence[Record]) -> None:
        """Keep ``records``, some 10 µs each. Where there is no room all but a status is lost, and counted."""
        with self._lock:
            for record in records:
                if len(self._memory) >= _MOST_IN_MEMORY and not isinstance(record, Status):
                    self.lost += 1
                    continue
                self._newest += 1
                self._memory.append((self._newest, type(record).__name__, _JSON.dump_json(record)))
            # In parts, so that an attempt on a disk that stays full is short.
            with suppress(sqlite3.Error):
                while rows := self._memory[:_MOST_POINTS]:
                    with self._database:
                        self._database.executemany("INSERT INTO outbox VALUES (?, ?, ?)", rows)
                    del self._memory[: len(rows)]

    def oldest(self) -> tuple[Record, ...]:
        """Read the oldest records that fit into one call: points together, all else alone. Empty: none."""
        query = "SELECT * FROM outbox WHERE number > ? ORDER BY number LIMIT ?"
        rows: list[tuple[int, str, bytes]] = []
        with self._lock, suppress(sqlite3.Error):  # a disk that cannot be read: the sender looks again
            rows = self._database.execute(query, (self._taken, _MOST_POINTS)).fetchall()
            rows += self._memory[:_MOST_POINTS]
        batch = list(takewhile(lambda row: row[1] == "Point", rows))[:_MOST_POINTS] or rows[:1]
        self._offered = batch[-1][0] if batch else self._taken
        return tuple(_JSON.validate_json(content) for _, _, content in batch)

    def taken(self) -> None:
        """Forget what ``oldest`` returned: MLflow has answered that it holds that."""
        with self._lock:
            self._taken = self._offered
            self._memory = [row for row in self._memory if row[0] > self._taken]
            # Rows that cannot be deleted now go with a later batch. Until then their numbers hide them.
            with suppress(sqlite3.Error), self._database:
                self._database.execute("DELETE FROM outbox WHERE number <= ?", (self._taken,))

    def close(self) -> None:
        """Close the file. It stays if it holds records for a later process."""
        with self._lock:
            self._database.close()
            if not len(self):
                self.path.unlink(missing_ok=True)


def _opened(path: Path) -> sqlite3.Connection:
    """Open the file, or create it. A damaged one is renamed with a warning."""
    database = sqlite3.connect(path, check_same_thread=False)
    try:
        database.executescript(_OPEN)
    except sqlite3.DatabaseError as error:
        database.close()
        if isinstance(error, sqlite3.OperationalError):  # it cannot be opened, which is no damage
            raise
        aside = path.replace(path.with_suffix(".damaged"))
        path.with_name(f"{path.name}-wal").unlink(missing_ok=True)  # it belongs to that file
        _log.warning("warning: %s is damaged (%s): its records stay in %s, unsent", path, error, aside)
        return _opened(path)
    return database
