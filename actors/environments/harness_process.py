"""Runs a user's agent harness for one episode: a command in a process of its own, or a function of theirs.

    command    a process group; stdin has the task as JSON, stdout's last line is the result; killed with its
               children when the episode ends
    function   in a thread of its own, an async one on a loop of its own: it may block without stopping others

Both find the policy at ``Visit.base_url`` under ``Visit.key``, and end with ``Ended``.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import IO, Any, Protocol

from actors.environments.user_calls import is_async
from actors.protocols import TaskError
from actors.types import Task

_KEY = "OPENAI_API_KEY"
_GRACE_S = 3.0  # between SIGTERM and SIGKILL
_TAIL = 4096  # bytes of a stream's end that are read
_SHOWN = 300  # characters of a line in a message


@dataclass(frozen=True, slots=True)
class Visit:
    """Where one episode's harness finds the policy."""

    base_url: str
    key: str
    task: Task
    has_answer: bool  # whether the task brings its right answers


@dataclass(frozen=True, slots=True)
class Ended:
    """How a harness ended: with what it gave (None: nothing), or with an error."""

    result: object
    error: BaseException | None


class Running(Protocol):
    """A harness at work."""

    def stop(self) -> None:
        """End it, with all that it has started. Blocks for seconds at most."""
        ...


class Harness(Protocol):
    def start(self, visit: Visit, ended: Callable[[Ended], None]) -> Running:
        """Begin; ``ended`` is called once, from another thread."""
        ...


# --- a command -----------------------------------------------------------------------------------------


class Command:
    """A program with its arguments."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(map(os.path.expanduser, words))  # as a shell would

    def start(self, visit: Visit, ended: Callable[[Ended], None]) -> Running:
        """Raises TaskError if the program cannot be started."""
        shown = shlex.join(self._words)
        task = visit.task
        told = {"id": task.id, "seed": task.seed, "payload": dict(task.payload)}
        with ExitStack() as files:
            # files, not pipes: a child that outlives the harness would hold a pipe open
            into, out, err = (files.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            into.write(json.dumps(told, default=str).encode() + b"\n")
            into.seek(0)
            try:
                process = subprocess.Popen(
                    self._words,
                    stdin=into,
                    stdout=out,
                    stderr=err,
                    env=_variables(visit, os.environ),
                    start_new_session=True,
                )
            except (OSError, ValueError) as error:
                message = f"environment.harness.command={shown} cannot be started: {error}"
                raise TaskError(message) from None
            running = _Process(process, visit.key)
            kept = files.pop_all()

        def follow() -> None:
            with kept:
                status = running.wait()
                ended(_ended(shown, status, _last_line(out), _last_line(err), visit.has_answer))

        threading.Thread(target=follow, name=f"harness of {task.id}", daemon=True).start()
        return running


class _Process:
    """A process group. It is signalled only while its leader is not reaped: later its id may be another's."""

    def __init__(self, process: subprocess.Popen[bytes], key: str) -> None:
        self._process, self._key = process, key
        self._lock = threading.Lock()
        self._over = threading.Event()

    def wait(self) -> int:
        """Wait for its end, then end what it has left behind. Returns its status."""
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            self._signal(signal.SIGKILL)
            status = self._process.wait()
            self._over.set()
        _kill_holders(self._key)
        return status

    def stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with self._lock:
                if not self._over.is_set():
                    self._signal(number)
            if self._over.wait(_GRACE_S):
                return

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def _kill_holders(key: str) -> None:
    """Kill the processes that have the episode's key in their environment: children that left the group."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(_KEY) == key:
                process.kill()


def _variables(visit: Visit, own: Mapping[str, str]) -> dict[str, str]:
    """The worker's environment variables, with those by which OpenAI's clients find a server."""
    direct = ",".join(filter(None, (own.get("NO_PROXY") or own.get("no_proxy"), "127.0.0.1")))
    return {
        **own,
        "OPENAI_BASE_URL": visit.base_url,
        "OPENAI_API_BASE": visit.base_url,
        _KEY: visit.key,
        "NO_PROXY": direct,
        "no_proxy": direct,
    }


def _ended(shown: str, status: int, last_out: str, last_err: str, has_answer: bool) -> Ended:
    """What the last lines say. Where the task has an answer, "1984" is one and no reward."""
    if status:
        how = f"exited with status {status}" if status > 0 else f"was ended by signal {-status}"
        why = last_err[:_SHOWN] or "it wrote nothing on stderr"
        return Ended(None, TaskError(f"the harness {shown} {how}: {why}"))
    try:
        result = json.loads(last_out)
        is_answer = has_answer and isinstance(result, (int, float))
        return Ended(last_out if is_answer else result, None)
    except ValueError:
        if last_out.startswith(("{", "[", '"')):  # meant as a result: not to be taken for a log
            line = last_out[:_SHOWN]
            return Ended(None, TaskError(f"the harness {shown}: its last line is not JSON: {line}"))
        return Ended(last_out if has_answer and last_out else None, None)


def _last_line(stream: IO[bytes]) -> str:
    """The last line that is not empty."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _TAIL))
    lines = stream.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


# --- a function ----------------------------------------------------------------------------------------


class Function:
    """``function(base_url, api_key, task)``, async or not."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def start(self, visit: Visit, ended: Callable[[Ended], None]) -> Running:
        running = _Thread()
        work = self._loop if is_async(self._function) else self._call
        name = f"harness of {visit.task.id}"
        threading.Thread(target=lambda: ended(work(visit, running)), name=name, daemon=True).start()
        return running

    def _call(self, visit: Visit, running: _Thread) -> Ended:
        try:
            return Ended(self._function(visit.base_url, visit.key, visit.task), None)
        except BaseException as error:  # noqa: BLE001  the user's code: it fails one episode
            return Ended(None, error)

    def _loop(self, visit: Visit, running: _Thread) -> Ended:
        async def work() -> object:
            running.begin(asyncio.get_running_loop(), asyncio.current_task())
            return await self._function(visit.base_url, visit.key, visit.task)

        try:
            return Ended(asyncio.run(work()), None)
        except BaseException as error:  # noqa: BLE001  as above
            return Ended(None, error)


class _Thread:
    """A coroutine is cancelled. No thread can be: a sync function ends with its next call, a refused one."""

    def __init__(self) -> None:
        self._cancel: Callable[[], object] = lambda: None

    def begin(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any] | None) -> None:
        if task is not None:
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)

    def stop(self) -> None:
        with suppress(RuntimeError):  # its loop is closed already
            self._cancel()
