"""Lets the processes that share an output folder take turns: to name a run, to make MLflow's store.

The lock is the kernel's (flock on <folder>/.lock): it ends with its process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.common.errors import InUseError
from configs.files import make_folder

LONGEST_S = 300.0
_PAUSE_S = 0.05


@contextmanager
def in_turn(folder: Path, longest_s: float = LONGEST_S) -> Iterator[None]:
    """Hold the lock of ``folder``, which is created, for the block.

    Raises OSError, and InUseError where another process holds the lock for ``longest_s``.
    """
    make_folder(folder)
    lock = folder / ".lock"
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + longest_s
    try:
        while not _taken(handle):
            if time.monotonic() > deadline:
                raise InUseError(f"{lock}: another process has held it for {longest_s:g} s: end that process")
            time.sleep(_PAUSE_S)
        yield
    finally:
        os.close(handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
