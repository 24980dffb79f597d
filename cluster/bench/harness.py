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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Child:
    """A process that holds one object. Made by ``child``."""

    name: str
    pipe: Connection

    def call(self, method: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        """Run ``method`` of the held object; returns its result.

        Raises BenchError when the method raised, the child died, or ``timeout_s`` passed.
        """
        with suppress(BrokenPipeError):  # it is dead: its pipe has ended too
            self.pipe.send((method, arguments))
        return self.wait(method, timeout_s)

    def wait(self, work: str, timeout_s: float) -> Any:
        if not self.pipe.poll(timeout_s):
            raise BenchError(f"{self.name}: {work} took longer than {timeout_s:.0f} s")
        try:
            failure, value = self.pipe.recv()
        except EOFError:
            raise BenchError(
                f"{self.name} died during {work}: out of memory? Its own messages are above"
            ) from None
        if failure:
            raise BenchError(f"{self.name}: {work} failed: {failure}")
        return value


@contextmanager
def child(name: str, build: Callable[..., Any], arguments: tuple[Any, ...]) -> Iterator[Child]:
    """Hold ``build(*arguments)`` in a fresh process for the block.

    ``build`` is a function or class of a module, ``arguments`` can be pickled.
    """
    context = multiprocessing.get_context("spawn")
    pipe, far_end = context.Pipe()
    process = context.Process(target=_serve, args=(far_end, build, arguments), name=name)
    process.start()
    far_end.close()  # the child now has the only copy: its death closes the pipe and ends a wait
    try:
        held = Child(name, pipe)
        held.wait("its start", START_S)
        yield held
    finally:
        process.terminate()
        process.join(10)
        process.kill()
        pipe.close()


def _serve(pipe: Connection, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Build the object, then run one call after the other until the process is terminated."""
    held: list[Any] = []
    _answer(pipe, lambda: held.append(build(*arguments)))
    while True:
        method, given = pipe.recv()
        _answer(pipe, partial(getattr(held[0], method), *given))


def _answer(pipe: Connection, work: Callable[[], Any]) -> None:
    try:
        pipe.send(("", work()))
    except Exception as error:  # noqa: BLE001  (a process boundary: every failure goes to the waiting parent)
        if not isinstance(error, BenchError):  # a BenchError is a sentence for the user, without traceback
            traceback.print_exc()
        pipe.send((f"{type(error).__name__}: {error}", None))
