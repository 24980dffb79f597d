"""Measuring two things in turns, in this process or in children of it, so that whatever else the machine does falls on both.

in_turns({"baseline": f, "candidate": g}, repeats=5)      f g g f f g ...: one warm-up of each, then alternately, the order swapped each time
with child(build, arguments) as one:                      a process of its own that holds ``build(*arguments)``
    one.call("method", (1, 2), timeout_s=60)              and runs its methods, one at a time
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from cluster.bench.values import BenchError, Timing

START_S = 600.0


def timed(work: Callable[[], object]) -> Timing:
    """Run once, a GPU's queue included. CPU seconds are the whole process's: only where nothing else runs in it are they ``work``'s."""
    finish_gpu = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    finish_gpu()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    finish_gpu()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def in_turns(works: dict[str, Callable[[], Timing]], repeats: int) -> dict[str, list[Timing]]:
    """``repeats`` timings of each, taken alternately after one warm-up of each; every second round runs in the opposite order."""
    for work in works.values():
        work()
    timings: dict[str, list[Timing]] = {name: [] for name in works}
    for number in range(repeats):
        order = list(works) if number % 2 == 0 else list(reversed(works))
        for name in order:
            timings[name].append(works[name]())
    return timings


class Child:
    """A process that holds one object. Made by ``child``."""

    def __init__(self, name: str, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, arguments), name=name)
        self._process.start()
        theirs.close()  # so that a child that dies ends the wait

    def call(self, method: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        """What ``method`` of the held object returns. Raises BenchError: what it raised, a child that died, or ``timeout_s`` passed."""
        try:
            self._pipe.send((method, arguments))
        except BrokenPipeError:
            raise BenchError(
                f"{self._name} died before {method}: out of memory? Its own messages are above"
            ) from None
        return self.wait(method, timeout_s)

    def wait(self, what: str, timeout_s: float) -> Any:
        if not self._pipe.poll(timeout_s):
            raise BenchError(f"{self._name}: {what} took longer than {timeout_s:.0f} s")
        try:
            failure, value = self._pipe.recv()
        except EOFError:
            raise BenchError(
                f"{self._name} died during {what}: out of memory? Its own messages are above"
            ) from None
        if failure:
            raise BenchError(f"{self._name}: {what} failed: {failure}")
        return value

    def end(self) -> None:
        self._process.terminate()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
        self._pipe.close()


@contextmanager
def child(name: str, build: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[Child]:
    """A fresh process holding ``build(*arguments)`` (module-level function or class, picklable arguments) for the duration of the block."""
    one = Child(name, build, arguments)
    try:
        one.wait("its start", START_S)
        yield one
    finally:
        one.end()


def _serve(pipe: Connection, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The child's life: build, then one call after the other until it is terminated."""
    held: Any = None

    def construct() -> None:
        nonlocal held
        held = build(*arguments)

    _answer(pipe, construct)
    while True:
        method, given = pipe.recv()
        _answer(pipe, partial(getattr(held, method), *given))


def _answer(pipe: Connection, work: Callable[[], Any]) -> None:
    try:
        pipe.send(("", work()))
    except Exception as error:  # noqa: BLE001  (a process's boundary: the failure belongs to whoever waits, whatever it is)
        if not isinstance(error, BenchError):  # that one is a sentence for the user
            traceback.print_exc()
        pipe.send((f"{type(error).__name__}: {error}", None))
