"""Ends a run in one line where Ray itself dies: the GCS of its cluster, or the raylet of the driver's node.

    a thread --each second--> GCS: does its port answer?   raylet: is its process there?
             --death--> the driver's task is cancelled, as by SIGTERM --> RayDied
             --not over after GRACE_S--> the line is printed, and the process ends

Without this, calls wait for their own deadlines, and after a minute Ray aborts the process without a word for
the user. Some of Ray's calls wait for a dead GCS with no deadline: for them there is the hard end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from cluster.common.errors import ClusterError
from cluster.common.processes import is_alive

GRACE_S = 30.0
_POLL_S = 1.0
_REFUSALS = 3  # in a row: nothing listens at the port of a local Ray, whose GCS nobody starts again
_REFUSALS_OF_A_CLUSTER = 60  # so long Ray waits for a GCS that is started again
_SILENT_S = 60.0  # a GCS that is busy, or a network that is away
_log = logging.getLogger(__name__)


class RayDied(ClusterError):
    """A process of Ray's own is gone. Nothing can be started or asked any more; what was saved is whole."""


class _Watch(threading.Thread):
    """Looks until something has died, or ``stop`` is called."""

    def __init__(self, gcs: tuple[str, int], refusals: int, raylet: psutil.Process | None) -> None:
        super().__init__(name="ray-watch", daemon=True)
        self.died = ""
        self._gcs, self._refusals, self._raylet = gcs, refusals, raylet
        self._over = threading.Event()
        self._task = asyncio.current_task() if _in_loop() else None
        self._loop = asyncio.get_running_loop() if _in_loop() else None

    def stop(self) -> None:
        self._over.set()

    def run(self) -> None:
        refused, silent = 0, 0.0
        while not self._over.wait(_POLL_S):
            if self._raylet is not None and not is_alive(self._raylet):
                return self._end("Ray's raylet on this machine died")
            answer = _asks(self._gcs)
            refused = refused + 1 if answer == "refused" else 0
            silent = silent + _POLL_S if answer == "silent" else 0.0
            if refused >= self._refusals or silent >= _SILENT_S:
                return self._end(f"Ray's GCS at {self._gcs[0]}:{self._gcs[1]} died")
        return None

    def _end(self, what: str) -> None:
        self.died = f"{what} (killed, or out of memory), so the run cannot go on; what was saved is whole"
        if self._loop is not None and self._task is not None:
            with suppress(RuntimeError):  # the loop has just ended
                self._loop.call_soon_threadsafe(self._task.cancel)
        if not self._over.wait(GRACE_S):
            # A warning reaches the user wherever a command has turned what libraries print (common/quiet.py).
            _log.critical("error: %s: go on with resume=auto (evaluate: --resume FOLDER)", self.died)
            sys.stdout.flush()
            os._exit(1)


@contextmanager
def watched(local: bool) -> Iterator[None]:
    """Watch Ray, which is up, for the block. Raises RayDied in place of what the death made of the block."""
    watch = _Watch(_gcs_address(), _REFUSALS if local else _REFUSALS_OF_A_CLUSTER, _raylet())
    watch.start()
    try:
        yield
    except BaseException as error:
        if watch.died:
            raise RayDied(watch.died) from error
        raise
    finally:
        watch.stop()


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _gcs_address() -> tuple[str, int]:
    import ray

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return host.strip("[]"), int(port)


def _raylet() -> psutil.Process | None:
    """The raylet of this driver's node; None where it cannot be seen."""
    from ray._private.worker import global_worker  # the driver's own socket has no public reader

    name = str(getattr(global_worker.node, "raylet_socket_name", ""))
    for process in psutil.process_iter(["cmdline"]) if name else ():
        words = process.info["cmdline"] or [""]
        if words[0].endswith("raylet") and f"--raylet_socket_name={name}" in words:
            return process
    return None


def _asks(address: tuple[str, int]) -> str:
    try:
        socket.create_connection(address, timeout=_POLL_S).close()
    except ConnectionRefusedError:
        return "refused"
    except OSError:
        return "silent"
    return "there"
