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

from configs.files import make_folder

LONGEST_S = 120.0
_PAUSE_S = 0.05


@contextmanager
def in_turn(folder: Path, longest_s: float = LONGEST_S) -> Iterator[None]:
    """Hold the lock of ``folder``, which is created, for the block; wait for it at most ``longest_s``.

    Goes on without the lock then: a process that hangs must not stop all others. Raises OSError.
    """
    make_folder(folder)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + longest_s
    try:
        while not _taken(handle) and time.monotonic() < deadline:
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
