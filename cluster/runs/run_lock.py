"""Lets one process at a time write in a run's folder; a second one gets an error in one line.

The lock is the kernel's (flock on <folder>/.lock): it ends with its process, however that ends. The file's
content says which process has it.
"""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.common.errors import InUseError
from configs.files import FileError, dump_json, parse_json, read_json

LOCK_FILE = ".lock"


@dataclass(frozen=True, slots=True)
class _Holder:
    """The content of the lock file."""

    pid: int
    host: str


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder`` for the duration of the block.

    Raises InUseError at once when another process has it.
    """
    handle = _take(folder)
    try:
        yield
    finally:
        os.close(handle)


def require_free(folder: Path) -> None:
    """Raise InUseError when a process works in ``folder``. A folder that does not exist is free."""
    if folder.is_dir():
        os.close(_take(folder))


def is_held(folder: Path) -> bool:
    """Whether a process works in ``folder``. Looks only: writes nothing."""
    try:
        handle = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def last_taken(folder: Path) -> tuple[int, int] | None:
    """Who took the lock of ``folder`` last, and when: a pid, and ns since 1970. None where nobody did."""
    try:
        return read_json(folder / LOCK_FILE, _Holder).pid, (folder / LOCK_FILE).stat().st_mtime_ns
    except (OSError, FileError):
        return None


def _take(folder: Path) -> int:
    """Open the lock file and lock it.

    The handle is not inherited by child processes: they may outlive this process.
    """
    handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.pwrite(handle, dump_json(_Holder(os.getpid(), platform.node()), indent=None).encode(), 0)
    except BlockingIOError:
        holder = _name_holder(handle)
        os.close(handle)
        raise InUseError(
            f"{folder} is in use by {holder}: wait for it or stop it, "
            "or start anew (resume= or another output_dir)"
        ) from None
    except OSError:
        os.close(handle)
        raise
    return handle


def _name_holder(handle: int) -> str:
    try:
        holder = parse_json(os.pread(handle, 1000, 0), _Holder)
    except FileError:
        return "another process"
    return f"process {holder.pid} on {holder.host}"
