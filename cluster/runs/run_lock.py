"""One process at a time writes in a run's folder: a second one, or a job that was submitted twice, is told so in a line.

The lock is the kernel's (flock on <folder>/.lock), so it goes with its process however that ends; the file holds who has it.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.common.errors import InUseError

LOCK_FILE = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """``folder`` belongs to this process for the duration of the block. Raises InUseError at once when another has it."""
    handle = _take(folder)
    try:
        yield
    finally:
        os.close(handle)


def require_free(folder: Path) -> None:
    """Raises InUseError when a process works in ``folder``; one that does not exist is free."""
    if folder.is_dir():
        os.close(_take(folder))


def _take(folder: Path) -> int:
    """An open handle that has the lock. Not inherited by the processes that are started from here: they may outlive this one."""
    handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode(), 0)
    except BlockingIOError:
        holder = _holder(handle)
        os.close(handle)
        raise InUseError(
            f"{folder} is in use by {holder}: wait for it or stop it, or start anew (resume= or another output_dir)"
        ) from None
    except OSError:
        os.close(handle)
        raise
    return handle


def _holder(handle: int) -> str:
    try:
        content = json.loads(os.pread(handle, 1000, 0))
        return f"process {content['pid']} on {content['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
