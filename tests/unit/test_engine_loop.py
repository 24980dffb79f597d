"""The step loop around an engine made of a list; the arithmetic of receipts; names and slot widths."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.engine.adapters import check_receipt
from actors.engine.start import WORKER_EXTENSION, engine_modules, slot_width
from actors.engine.step_loop import PHASES, StepLoop, WorkKind
from actors.protocols import EngineError, ReceiptError
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
    pause_s: float = 0.001
    steps: int = 0

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Output]:
        self.threads.add(threading.get_ident())
        if self.fault is not None:
            raise self.fault
        self.steps += 1
        time.sleep(self.pause_s)
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
    short = loop.request("a", "x", "act", 5, add("a", 3))
    long = loop.request("b", "y", "extract", 5, add("b", 30))
    assert short.result(5).request_id == "a"
    look = loop.call(lambda e: (threading.get_ident(), loop.running_labels()), "other")
    assert look.result(5) == (next(iter(engine.threads)), {"y"})
    assert long.result(5).request_id == "b" and engine.threads != {threading.get_ident()}
    assert loop.times.steps >= 30
    assert loop.call(lambda e: 7, "other").result(5) == 7
    loop.close(5)


def test_every_second_of_the_step_thread_has_a_phase() -> None:
    began = time.perf_counter()
    loop = loop_of(Countdown())
    started = time.perf_counter()
    kinds: tuple[WorkKind, ...] = ("write", "install", "install", "refresh", "other")
    for kind in kinds:
        loop.call(lambda e: time.sleep(0.03), kind).result(5)
    with pytest.raises(EngineError):
        loop.call(refuse_slowly, "write").result(5)
    assert loop.times.seconds["write"] >= 0.06  # charged before the caller is told, refused or not
    time.sleep(0.05)
    asked = time.perf_counter()
    loop.close(5)
    ended = time.perf_counter()
    seconds = loop.times.seconds
    assert tuple(seconds) == PHASES
    assert seconds["install"] >= 0.06 and seconds["idle"] >= 0.05
    assert min(seconds["refresh"], seconds["other"]) >= 0.03
    assert seconds["act"] == seconds["extract"] == seconds["receipt"] == 0
    assert asked - started <= sum(seconds.values()) <= ended - began


def refuse_slowly(engine: Countdown) -> None:
    time.sleep(0.03)
    raise EngineError("not now")


def test_a_steps_seconds_go_by_the_tokens_that_each_kind_of_request_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step of 9 + 1 prompt tokens, then steps of one token of each request.

    So 9/10 and 1/10 of the first step, and half of each later step.
    """
    engine = Countdown(pause_s=0.0)
    clock = SimpleNamespace(
        perf_counter=lambda: float(engine.steps)
    )  # a step takes a second, the rest no time
    monkeypatch.setattr("actors.engine.step_loop.time", clock)
    loop, gate = loop_of(engine), threading.Event()
    loop.call(lambda e: gate.wait(5), "other")
    both = loop.request("a", "x", "extract", 9, add("a", 3)), loop.request("b", "x", "act", 1, add("b", 3))
    gate.set()
    for future in both:
        future.result(5)
    loop.request("c", "x", "receipt", 30, add("c", 1)).result(5)
    loop.close(5)
    seconds = loop.times.seconds
    assert loop.times.steps == 4 and sum(seconds.values()) == pytest.approx(4.0)
    assert [seconds[kind] for kind in ("extract", "act", "receipt")] == pytest.approx(
        [0.9 + 0.5 + 0.5, 0.1 + 0.5 + 0.5, 1.0]
    )


def test_the_next_step_takes_along_callers_who_come_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten requests of one step each, one after the other, beside a long one: each is in the next step."""
    monkeypatch.setattr(
        "actors.engine.step_loop.PATIENCE", 1e5
    )  # of a millisecond's step: as good as for ever
    engine = Countdown()
    loop = loop_of(engine)
    long = loop.request("long", "x", "act", 1, add("long", 10**9))
    began = loop.call(lambda e: e.steps, "other").result(5)
    for number in range(10):
        loop.request(str(number), "x", "act", 1, add(str(number), 1)).result(5)
    assert engine.steps - began <= 12
    long.cancel()
    loop.close(5)


def test_the_next_step_waits_for_callers_of_a_write_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten episodes' turns: a write, a pause of many steps, a request. No step goes without the request."""
    monkeypatch.setattr("actors.engine.step_loop.PATIENCE", 1e5)
    engine = Countdown()
    loop = loop_of(engine)
    long = loop.request("long", "x", "act", 1, add("long", 10**9))
    loop.request("first", "x", "act", 1, add("first", 1)).result(5)
    began = engine.steps
    for number in range(10):
        loop.call(lambda e: None, "write").result(5)
        time.sleep(0.02)
        loop.request(str(number), "x", "act", 1, add(str(number), 1)).result(5)
    assert engine.steps - began <= 12
    long.cancel()
    loop.close(5)


def test_a_step_does_not_wait_for_callers_who_stay_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.engine.step_loop.PATIENCE", 1.0)
    engine = Countdown(pause_s=0.0)
    loop = loop_of(engine)
    short = loop.request("a", "x", "act", 1, add("a", 1))
    long = loop.request("b", "x", "act", 1, add("b", 200))
    assert short.result(5).request_id == "a" and long.result(5).request_id == "b"
    loop.close(5)
    assert engine.steps >= 200


def test_cancelling_a_coroutine_aborts_its_request() -> None:
    engine = Countdown()
    loop = loop_of(engine)

    async def story() -> None:
        with pytest.raises(TimeoutError):
            slow = loop.request("slow", "x", "act", 5, add("slow", 10**9))
            await asyncio.wait_for(asyncio.wrap_future(slow), timeout=0.05)
        look = loop.call(lambda e: (e.aborted, loop.running_labels()), "other")
        assert await asyncio.wrap_future(look) == (["slow"], set())

    asyncio.run(story())
    loop.close(5)


def test_a_request_that_is_cancelled_before_its_turn_never_reaches_the_engine() -> None:
    engine = Countdown()
    loop, gate = loop_of(engine), threading.Event()
    loop.call(lambda e: gate.wait(5), "other")
    assert loop.request("early", "x", "act", 1, add("early", 10**9)).cancel()
    gate.set()
    seen = loop.call(lambda e: (dict(e.left), list(e.aborted), loop.running_labels()), "other").result(5)
    assert seen == ({}, [], set())
    loop.close(5)


def test_a_step_that_fails_reaches_everyone_who_waits_and_every_later_call() -> None:
    engine = Countdown()
    loop = loop_of(engine)
    waiting = [loop.request(name, "x", "act", 5, add(name, 10**9)) for name in "abc"]
    loop.post(lambda e: setattr(e, "fault", RuntimeError("out of\nmemory")), "other")
    for future in waiting:
        with pytest.raises(EngineError, match=r"the engine is dead: RuntimeError: out of memory$"):
            future.result(5)
    with pytest.raises(EngineError, match="out of memory"):
        loop.call(lambda e: 1, "other")
    with pytest.raises(EngineError, match="out of memory"):
        loop.request("d", "x", "act", 5, add("d", 1))
    loop.post(lambda e: None, "other")
    assert loop.failure == "RuntimeError: out of memory"
    loop.close(5)


def test_refused_work_leaves_the_engine_alive_and_broken_work_ends_it() -> None:
    def refuse(engine: Countdown) -> None:
        raise EngineError("not now")

    def broken(engine: Countdown) -> None:
        raise KeyError("half-written")

    loop = loop_of(Countdown())
    with pytest.raises(EngineError, match=r"^not now$"):
        loop.call(refuse, "other").result(5)
    with pytest.raises(EngineError, match=r"^not now$"):
        loop.request("a", "x", "act", 5, refuse).result(5)
    assert loop.call(lambda e: 1, "other").result(5) == 1
    with pytest.raises(EngineError, match="the engine broke: KeyError: 'half-written'"):
        loop.call(broken, "other").result(5)
    with pytest.raises(EngineError, match="is dead: KeyError"):
        for _ in range(100):
            loop.call(lambda e: 1, "other")
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
    stuck = loop.call(lambda e: (inside.set(), time.sleep(0.5)), "other")
    inside.wait(5)
    with pytest.raises(EngineError, match="did not stop within 0 s"):
        loop.close(0.05)
    stuck.result(5)
    loop.close(5)
    with pytest.raises(EngineError, match=r"is dead: closed|is closed"):
        loop.call(lambda e: 1, "other")


def test_closing_fails_what_is_pending() -> None:
    engine = Countdown()
    loop = loop_of(engine)
    waiting = loop.request("a", "x", "act", 5, add("a", 10**9))
    loop.call(lambda e: None, "other").result(5)
    loop.close(5)
    with pytest.raises((EngineError, CancelledError), match="closed"):
        waiting.result(5)
    assert loop.failure == ""


def test_closing_fails_the_work_that_waits() -> None:
    loop, entered, gate = loop_of(Countdown()), threading.Event(), threading.Event()
    loop.call(lambda e: (entered.set(), gate.wait(5)), "other")
    assert entered.wait(5)
    pending = loop.call(lambda e: 1, "other")
    threading.Timer(0.05, gate.set).start()
    loop.close(5)
    with pytest.raises(EngineError, match="is dead: closed"):
        pending.result(5)


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


@pytest.mark.parametrize("tolerance", [0.02, 0.3])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_receipt_may_be_off_by_its_tolerance_and_no_more(tolerance: float, place: int, sign: int) -> None:
    """On any token of the probe, in either direction."""
    probe = Probe((1, 2, 3, 4), before=(-6.0, -5.0), after=(-2.5, -2.0))

    def off_by(share: float) -> list[float]:
        scored = list(probe.after)
        scored[place] += sign * share * tolerance
        return scored

    assert check_receipt(off_by(0.9), probe, tolerance) is True
    for share in (1.1, 1.5):
        with pytest.raises(ReceiptError, match=f"receipt_tolerance={tolerance}$"):
            check_receipt(off_by(share), probe, tolerance)


def test_the_worker_extension_is_where_its_name_says() -> None:
    """vLLM imports it by this name; the engine's tests start with it. Here without importing vLLM."""
    module, _, name = WORKER_EXTENSION.rpartition(".")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    assert name in [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def test_module_names_and_slot_widths() -> None:
    modules = [
        "model.layers.2.mlp.gate_proj",
        "model.layers.2.mlp.up_proj",
        "model.layers.2.mlp.down_proj",
        "model.layers.3.mlp.up_proj",
    ]
    assert engine_modules(modules) == [
        "model.layers.2.mlp.down_proj",
        "model.layers.2.mlp.gate_up_proj",
        "model.layers.3.mlp.gate_up_proj",
    ]
    assert [slot_width(rank) for rank in (1, 2, 6, 8, 9, 64)] == [1, 8, 8, 8, 16, 64]
