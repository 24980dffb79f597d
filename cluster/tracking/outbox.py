"""What the store has not yet taken: JSON lines in the run's folder, in the order of logging, so that an outage or a killed driver loses nothing.

    {"sent": 4711                }      how far the store has taken the file (bytes from its start), rewritten in place
    {"kind": "metrics", ...}            one line a record; the tracker appends, the sender (backfill.py) reads from "sent" on

A record counts as taken only after the store's answer. Lines are whole: each is one write, and a torn last one (the driver was killed, the disk was
full in its middle) is cut off. Memory holds records only while the disk takes none, and only ``_MOST_IN_MEMORY``.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

_HEADER_BYTES = 32
_MOST_IN_MEMORY = 2000  # records; a few MB
_PARTIAL_READ = 1 << 20  # bytes looked at for one batch
_CONTENT = {
    "metrics": ("metrics", "time", "step"),
    "params": ("params",),
    "artifact": ("path",),
    "dataset": ("entity",),
    "model": ("entity",),
    "status": ("status", "time"),
}


class Record(TypedDict, total=False):
    """One call of the tracker. ``time`` is when it was made (ms since 1970): a back-filled point keeps it."""

    kind: Literal["metrics", "params", "artifact", "dataset", "model", "status"]
    time: int
    step: int
    metrics: dict[str, float]
    params: dict[str, str]
    path: str
    entity: dict[str, str]
    status: str


@dataclass(frozen=True, slots=True)
class Batch:
    """The oldest records that are of one kind; what is neither metrics nor params comes alone. ``sizes``: of their lines (bytes)."""

    records: tuple[Record, ...]
    sizes: tuple[int, ...]
    doubtful: (
        bool  # the store may hold some already: an earlier attempt got no answer, or another process made it
    )


class Spool:
    """The file and its bookkeeping. Every method is safe from any thread. Raises OSError only when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._memory: deque[bytes] = deque()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._closed = False
        self._lost = 0
        self._sent, self._end = self._recover()
        self._in_file = os.pread(self._file, self._end - self._sent, self._sent).count(b"\n")
        self._doubtful = self._in_file  # so many of the oldest records may have reached the store

    def __len__(self) -> int:
        """Records that the store has not taken."""
        with self._lock:
            return self._in_file + len(self._memory)

    @property
    def lost(self) -> int:
        """Records that neither the disk nor memory had room for."""
        return self._lost

    def append(self, record: Record) -> None:
        """About 0.1 ms. A full disk keeps records in memory; with that full too, points are lost and counted (the run's end never is)."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if self._closed:
                return
            self._memory.append(line)
            while self._memory and self._write(self._memory[0]):
                self._memory.popleft()
            if len(self._memory) > _MOST_IN_MEMORY and record["kind"] != "status":
                self._memory.pop()
                self._lost += 1

    def oldest(self, most_values: int) -> Batch | None:
        """Records of one kind with at most ``most_values`` metrics or params between them (one record may hold more); None when all are taken."""
        with self._lock:
            if self._closed or not (self._in_file or self._memory):
                return None
            records: list[Record] = []
            sizes: list[int] = []
            values = 0
            for line in self._lines() if self._in_file else self._memory:
                record = _parsed(line)
                content = record.get("metrics", record.get("params"))
                values += most_values + 1 if content is None else len(content)
                if records and (record.get("kind") != records[0].get("kind") or values > most_values):
                    break
                records.append(record)
                sizes.append(len(line))
            return Batch(tuple(records), tuple(sizes), doubtful=self._doubtful > 0)

    def attempted(self, batch: Batch) -> None:
        """The store was asked to take ``batch`` and did not answer, or refused for now."""
        with self._lock:
            self._doubtful = max(self._doubtful, len(batch.records))

    def taken(self, batch: Batch) -> None:
        """The store has answered that it holds ``batch``, the last one of ``oldest``."""
        with self._lock:
            if self._closed:
                return
            self._doubtful = max(0, self._doubtful - len(batch.records))
            for size in batch.sizes:
                if self._in_file:
                    self._in_file -= 1
                    self._sent += size
                else:
                    self._memory.popleft()
            with suppress(
                OSError
            ):  # a header that is behind only means that more is compared with the store when the file is opened again
                if (
                    self._sent == self._end
                ):  # shortened before the header says so: to whoever opens it in between, all is taken
                    os.ftruncate(self._file, _HEADER_BYTES)
                    self._sent = self._end = _HEADER_BYTES
                self._write_header()

    def close(self) -> None:
        """The file stays where it holds something for a later run."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.close(self._file)
            if not self._in_file:
                self.path.unlink(missing_ok=True)

    def _recover(self) -> tuple[int, int]:
        """(sent, end) of the file as it was left; new, empty or without a readable header: nothing of it is taken."""
        size = os.fstat(self._file).st_size
        try:
            sent = int(json.loads(os.pread(self._file, _HEADER_BYTES, 0))["sent"])
        except (ValueError, KeyError, TypeError):
            sent = _HEADER_BYTES
        text = os.pread(self._file, max(0, size - _HEADER_BYTES), _HEADER_BYTES)
        end = _HEADER_BYTES + text.rfind(b"\n") + 1
        os.ftruncate(self._file, end)
        self._sent = min(max(sent, _HEADER_BYTES), end)
        self._write_header()
        return self._sent, end

    def _write_header(self) -> None:
        header = b'{"sent": ' + str(self._sent).encode()
        os.pwrite(self._file, header.ljust(_HEADER_BYTES - 2) + b"}\n", 0)

    def _write(self, line: bytes) -> bool:
        """Whether the disk took all of ``line``; none of it stays otherwise."""
        written = 0
        with suppress(OSError):
            written = os.pwrite(self._file, line, self._end)
        if written < len(line):
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            return False
        self._end += written
        self._in_file += 1
        return True

    def _lines(self) -> list[bytes]:
        """The next lines of the file: about ``_PARTIAL_READ`` bytes of them, one whole line at least."""
        size = _PARTIAL_READ
        while b"\n" not in (text := os.pread(self._file, size, self._sent)):
            size *= 2
        return text[: text.rfind(b"\n") + 1].splitlines(keepends=True)


def _parsed(line: bytes) -> Record:
    """A line that is no record (somebody edited the file) becomes one without content: it is passed over."""
    try:
        record: Record = json.loads(line)
        return record if all(key in record for key in _CONTENT[record["kind"]]) else {}
    except (ValueError, TypeError, KeyError):
        return {}
