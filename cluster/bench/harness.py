"""Measures two things in turns, in this process or in child processes.

Both then meet the same load: whatever else the machine does falls on both.

in_turns({"baseline": f, "candidate": g}, repeats=5)   f g f g g f f g ...: one warm-up each, then in turns,
                                                       every second round in the opposite order
with child(name, build, arguments) as process:         a process of its own that holds build(*arguments)
    process.call("method", (1, 2), timeout_s=60)       and runs its methods, one at a time

Every wait, and who unblocks it: a caller waits for its child's answer. The answer, the child's death (its
pipe closes) or the timeout ends the wait.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from cluster.bench.values import BenchError, Timing

START_S = 600.0


def timed(work: Callable[[], object]) -> Timing:
    """Time one run of ``work``, the GPU's queue included. The CPU seconds are those of the whole process."""
    import torch

    finish_gpu = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    finish_gpu()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    finish_gpu()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def in_turns(works: Mapping[str, Callable[[], Timing]], repeats: int) -> dict[str, list[Timing]]:
    """``repeats`` timings of each work, taken in turns after one warm-up of each."""
    for work in works.values():
        work()
    timings: dict[str, list[Timing]] = {name: [] for name in works}
    for number in range(repeats):
        order = list(works) if number % 2 == 0 else list(works)[::-1]
        for name in order:
            timings[name].append(works[name]())
    return timings


class Child:
    """A process that holds one object. Made by ``child``."""

    def __init__(self, name: str, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(far_end, build, arguments), name=name)
        self._process.start()
        far_end.close()  # the child now has the only copy: its death closes the pipe and ends a wait

    def call(self, method: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        """Run ``method`` of the held object; returns its result.

        Raises BenchError when the method raised, the child died, or ``timeout_s`` passed.
        """
        try:
            self._pipe.send((method, arguments))
        except BrokenPipeError:
            raise self._death(f"before {method}") from None
        return self.wait(method, timeout_s)

    def call_timed(self, method: str, arguments: tuple[Any, ...], timeout_s: float) -> Timing:
        """``call`` of a method that returns a Timing."""
        timing = self.call(method, arguments, timeout_s)
        assert isinstance(timing, Timing)
        return timing

    def wait(self, work: str, timeout_s: float) -> Any:
        if not self._pipe.poll(timeout_s):
            raise BenchError(f"{self._name}: {work} took longer than {timeout_s:.0f} s")
        try:
            failure, value = self._pipe.recv()
        except EOFError:
            raise self._death(f"during {work}") from None
        if failure:
            raise BenchError(f"{self._name}: {work} failed: {failure}")
        return value

    def end(self) -> None:
        self._process.terminate()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
        self._pipe.close()

    def _death(self, when: str) -> BenchError:
        return BenchError(f"{self._name} died {when}: out of memory? Its own messages are above")


@contextmanager
def child(name: str, build: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[Child]:
    """Hold ``build(*arguments)`` in a fresh process for the block.

    ``build`` is a function or class of a module, ``arguments`` can be pickled.
    """
    process = Child(name, build, arguments)
    try:
        process.wait("its start", START_S)
        yield process
    finally:
        process.end()


def _serve(pipe: Connection, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Build the object, then run one call after the other until the process is terminated."""
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
    except Exception as error:  # noqa: BLE001  (a process boundary: every failure goes to the waiting parent)
        if not isinstance(error, BenchError):  # a BenchError is a sentence for the user, without traceback
            traceback.print_exc()
        pipe.send((f"{type(error).__name__}: {error}", None))
