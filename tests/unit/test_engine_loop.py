"""The step loop with an engine made of a list (the loop is what is tested), the receipt's arithmetic, names and slot widths."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field

import pytest

from actors.engine_loop import StepLoop
from actors.engine_start import engine_modules, slot_width
from actors.protocols import EngineError, ReceiptError
from actors.receipt import check_receipt
from actors.types import Probe


@dataclass
class Output:
    request_id: str
    finished: bool = True


@dataclass
class Countdown:
    """Finishes each request after its number of steps; ``fault`` is raised by the next step."""

    left: dict[str, int] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    fault: Exception | None = None

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Output]:
        self.threads.add(threading.get_ident())
        if self.fault is not None:
            raise self.fault
        time.sleep(0.001)
        self.left = {name: steps - 1 for name, steps in self.left.items()}
        done = [name for name, steps in self.left.items() if steps <= 0]
        for name in done:
            del self.left[name]
        return [Output(name) for name in done] + [Output(name, finished=False) for name in self.left]

    def abort_request(self, request_ids: list[str]) -> None:
        for name in request_ids:
            self.left.pop(name, None)
            self.aborted.append(name)


def add(name: str, steps: int) -> Callable[[Countdown], None]:
    return lambda engine: engine.left.update({name: steps})


def loop_of(engine: Countdown) -> StepLoop[Countdown]:
    return StepLoop("the engine", lambda: engine, lambda _: None, start_timeout_s=5)


def test_requests_finish_and_work_runs_between_steps_on_one_thread() -> None:
    engine = Countdown()
    loop = loop_of(engine)
    short, long = loop.request("a", "x", add("a", 3)), loop.request("b", "y", add("b", 30))
    assert short.result(5).request_id == "a"
    assert loop.call(lambda e: (threading.get_ident(), loop.running_labels())).result(5) == (next(iter(engine.threads)), {"y"})
    assert long.result(5).request_id == "b" and engine.threads != {threading.get_ident()}
    times = loop.times
    assert times.steps >= 30 and times.busy_s > 0
    time.sleep(0.05)
    assert loop.call(lambda e: 7).result(5) == 7
    loop.close(5)
    assert loop.times.idle_s > times.idle_s


def test_cancelling_a_coroutine_aborts_its_request() -> None:
    engine = Countdown()
    loop = loop_of(engine)

    async def story() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(loop.request("slow", "x", add("slow", 10**9))), timeout=0.05)
        assert await asyncio.wrap_future(loop.call(lambda e: (e.aborted, loop.running_labels()))) == (["slow"], set())

    asyncio.run(story())
    loop.close(5)


def test_a_step_that_fails_reaches_everyone_who_waits_and_every_later_call() -> None:
    engine = Countdown()
    loop = loop_of(engine)
    waiting = [loop.request(name, "x", add(name, 10**9)) for name in "abc"]
    loop.post(lambda e: setattr(e, "fault", RuntimeError("out of\nmemory")))
    for future in waiting:
        with pytest.raises(EngineError, match=r"the engine is dead: RuntimeError: out of memory$"):
            future.result(5)
    with pytest.raises(EngineError, match="out of memory"):
        loop.call(lambda e: 1)
    with pytest.raises(EngineError, match="out of memory"):
        loop.request("d", "x", add("d", 1))
    loop.post(lambda e: None)
    loop.close(5)


def test_refused_work_leaves_the_engine_alive_and_broken_work_ends_it() -> None:
    def refuse(engine: Countdown) -> None:
        raise EngineError("not now")

    def broken(engine: Countdown) -> None:
        raise KeyError("half-written")

    loop = loop_of(Countdown())
    with pytest.raises(EngineError, match=r"^not now$"):
        loop.call(refuse).result(5)
    with pytest.raises(EngineError, match=r"^not now$"):
        loop.request("a", "x", refuse).result(5)
    assert loop.call(lambda e: 1).result(5) == 1
    with pytest.raises(EngineError, match="the engine broke: KeyError: 'half-written'"):
        loop.call(broken).result(5)
    with pytest.raises(EngineError, match="is dead: KeyError"):
        for _ in range(100):
            loop.call(lambda e: 1)
            time.sleep(0.01)


def test_an_engine_that_does_not_start_or_stop_says_so() -> None:
    def fail() -> Countdown:
        raise RuntimeError("no memory")

    with pytest.raises(EngineError, match="did not start: no memory"):
        StepLoop("the engine", fail, lambda _: None, start_timeout_s=5)
    release = threading.Event()

    def hang() -> Countdown:
        release.wait(10)
        return Countdown()

    with pytest.raises(EngineError, match="did not start within 0 s"):
        StepLoop("the engine", hang, lambda _: None, start_timeout_s=0.05)
    release.set()

    loop = loop_of(Countdown())
    inside = threading.Event()
    stuck = loop.call(lambda e: (inside.set(), time.sleep(0.5)))
    inside.wait(5)
    with pytest.raises(EngineError, match="did not stop within 0 s"):
        loop.close(0.05)
    stuck.result(5)
    loop.close(5)
    with pytest.raises(EngineError, match=r"is dead: closed|is closed"):
        loop.call(lambda e: 1)


def test_closing_fails_what_is_pending() -> None:
    engine = Countdown()
    loop = loop_of(engine)
    waiting = loop.request("a", "x", add("a", 10**9))
    loop.call(lambda e: None).result(5)
    loop.close(5)
    with pytest.raises((EngineError, CancelledError), match="closed"):
        waiting.result(5)


def test_a_receipt_needs_agreement_and_movement() -> None:
    probe = Probe((1, 2, 3, 4), before=(-3.0, -2.0), after=(-2.5, -2.0))
    assert check_receipt([-2.51, -2.0], probe, tolerance=0.02) is True
    with pytest.raises(ReceiptError, match=r"difference 0\.0500.*moved 0\.5000"):
        check_receipt([-2.45, -2.0], probe, tolerance=0.02)
    with pytest.raises(ReceiptError):
        check_receipt([float("nan"), -2.0], probe, tolerance=0.02)
    small = Probe((1, 2), before=(-3.0,), after=(-2.975,))
    with pytest.raises(ReceiptError, match="did not move"):
        check_receipt([-2.991], small, tolerance=0.02)
    assert check_receipt([-3.0], Probe((1, 2), before=(-3.0,), after=(-2.99,)), tolerance=0.02) is False


def test_module_names_and_slot_widths() -> None:
    modules = ["model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj", "model.layers.3.mlp.up_proj"]
    assert engine_modules(modules) == ["model.layers.2.mlp.down_proj", "model.layers.2.mlp.gate_up_proj", "model.layers.3.mlp.gate_up_proj"]
    assert [slot_width(rank) for rank in (1, 2, 6, 8, 9, 64)] == [1, 8, 8, 8, 16, 64]
