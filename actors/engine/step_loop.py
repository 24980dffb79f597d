"""A thread of its own for a stepping engine: callers hand it work, and it runs the work between two steps.

    caller (any thread, any event loop)                  step thread
    call(f, kind)      -> Future of f(engine)    --->    run all work that waits, have a moment's patience,
    request(id, add)   -> Future of the output   --->    take one engine.step(), and again
    its ``progress``   <---  each unfinished output
    future.cancel()                              --->    engine.abort_request([id])
    times                                        <---    where every second of the thread went, by phase

Every wait, and who unblocks it:

    the step thread waits, without a deadline, when there is nothing to do      a caller's work, or close
    it waits for PATIENCE of a step, when answered callers may come back        their work, or that time
    a caller waits for its future, with a deadline of its own                   the step thread, or its death

Work that refuses raises EngineError and must then have changed nothing. Any other exception ends the thread.
When the thread dies, every pending future and every later call raises EngineError with the reason.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args

from actors.protocols import EngineError

T = TypeVar("T")

RequestKind = Literal["act", "extract", "receipt"]
WorkKind = Literal["write", "install", "refresh", "other"]
Phase = RequestKind | WorkKind | Literal["idle"]
PHASES: tuple[Phase, ...] = (*get_args(RequestKind), *get_args(WorkKind), "idle")

_ANSWERED: tuple[Phase, ...] = ("write", "install")  # after such work its caller goes on with an episode

PATIENCE = 0.05
"""How long a step waits for callers who were answered since the step before, as a share of that step's time.

The next request of an episode is a moment away (its text is parsed, its next turn encoded). The coming step
takes it along for less than a step of its own would cost.
"""


class StepOutput(Protocol):
    """What ``step`` reports of one request."""

    request_id: str
    finished: bool


class StepEngine(Protocol):
    """The part of vLLM's LLMEngine that the loop drives."""

    def has_unfinished_requests(self) -> bool: ...

    def step(self) -> Sequence[Any]: ...

    def abort_request(self, request_ids: list[str]) -> None: ...


E = TypeVar("E", bound=StepEngine)


@dataclass(frozen=True, slots=True)
class LoopTimes:
    """Steps taken, and the step thread's seconds by phase. All phases are there; "idle" is waiting.

    They sum to the thread's wall time, up to the work that runs now. A step's seconds are shared out by the
    tokens that the running requests of each kind have to compute in it: a prompt in its first step, one token
    in each later step. What the prefix cache saves is not known here.
    """

    steps: int
    seconds: Mapping[Phase, float]


@dataclass(slots=True)
class _Running:
    done: Future[Any]
    label: str
    kind: RequestKind
    tokens: int  # to compute in the next step
    progress: Callable[[Any], None] | None


class _Account:
    """Charges every second since its construction to a phase."""

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._since = time.perf_counter()

    def charge(self, shares: Mapping[Phase, float]) -> None:
        """Charge what has passed since the last charge, in proportion to ``shares`` (positive)."""
        now = time.perf_counter()
        per_share = (now - self._since) / sum(shares.values())
        for phase, share in shares.items():
            self.seconds[phase] += share * per_share
        self._since = now


class StepLoop(Generic[E]):
    """Owns one engine: builds it, steps it and takes it down on one thread.

    Why one thread: settings that are bound to a thread, such as OpenMP's thread count, hold for all its work.
    Invariant: the step thread alone touches the engine. The constructor raises EngineError when ``build``
    fails or takes longer than ``start_timeout_s`` seconds.
    """

    def __init__(
        self, name: str, build: Callable[[], E], teardown: Callable[[E], None], start_timeout_s: float
    ) -> None:
        self._name = name
        self._wake = threading.Condition()
        self._work: deque[tuple[Future[Any], Callable[[E], Any], Phase]] = deque()
        self._requests: dict[str, _Running] = {}
        self._closing = False
        self._failure: str | None = None
        self._steps = 0
        self._account = _Account()
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(build, teardown, started), name=name, daemon=True
        )
        self._thread.start()
        try:
            started.result(timeout=start_timeout_s)
        except FutureTimeoutError as error:
            raise EngineError(
                f"{name} did not start within {start_timeout_s:.0f} s: "
                "is the machine overloaded or out of memory?"
            ) from error

    def call(self, work: Callable[[E], T], kind: WorkKind) -> Future[T]:
        """Run ``work`` on the step thread before the next step, after all that waits already.

        ``kind`` is the phase to which its seconds are charged.
        """
        return self._submit(work, kind)

    def request(
        self,
        request_id: str,
        label: str,
        kind: RequestKind,
        prompt_tokens: int,
        add: Callable[[E], None],
        progress: Callable[[Any], None] | None = None,
    ) -> Future[Any]:
        """Add a request; the future gets the engine's finished output, or what ``add`` raised.

        Cancelling the future aborts the request. ``label`` says what the request depends on, see
        ``running_labels``. ``kind`` and ``prompt_tokens`` are for the account of ``times``. ``progress`` gets
        every unfinished output, on the step thread: it must be quick, and must not raise.
        """
        done: Future[Any] = Future()

        def start(engine: E) -> None:
            if done.cancelled():
                return
            try:
                add(engine)
            except EngineError as error:  # refused: this request fails, the thread goes on
                if done.set_running_or_notify_cancel():
                    done.set_exception(error)
            else:
                self._requests[request_id] = _Running(done, label, kind, prompt_tokens, progress)

        def stop(engine: E) -> None:
            if self._requests.pop(request_id, None) is not None:
                engine.abort_request([request_id])

        self._submit(start, kind)
        done.add_done_callback(lambda future: self.post(stop, "other") if future.cancelled() else None)
        return done

    def post(self, work: Callable[[E], None], kind: WorkKind) -> None:
        """Call ``work`` without an answer, for clean-up. Dropped when the loop is closed or dead."""
        with self._wake:
            if self._failure is None and not self._closing:
                self._work.append((Future(), work, kind))
                self._wake.notify()

    def running_labels(self) -> set[str]:
        """Labels of the requests inside the engine.

        For work on the step thread, where the answer cannot change meanwhile.
        """
        return {running.label for running in self._requests.values()}

    @property
    def times(self) -> LoopTimes:
        """The account, for any thread. A step, or work, is counted when it ends."""
        return LoopTimes(self._steps, dict(self._account.seconds))

    def close(self, timeout_s: float) -> None:
        """End the thread after its running step. Pending work fails. Safe to call twice."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise EngineError(
                f"{self._name} did not stop within {timeout_s:.0f} s: "
                "a step of the engine hangs; end the process"
            )

    @property
    def failure(self) -> str:
        """Why the thread has ended; "" while it works, and after ``close``."""
        return "" if self._closing else self._failure or ""

    def _submit(self, work: Callable[[E], T], phase: Phase) -> Future[T]:
        future: Future[T] = Future()
        with self._wake:
            self._check_alive()
            self._work.append((future, work, phase))
            self._wake.notify()
        return future

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineError(f"{self._name} is dead: {self._failure}")
        if self._closing:
            raise EngineError(f"{self._name} is closed")

    def _run(self, build: Callable[[], E], teardown: Callable[[E], None], started: Future[None]) -> None:
        try:
            engine = build()
        except BaseException as error:  # noqa: BLE001  every failure goes to the callers
            self._die(_one_line(error))
            if not isinstance(error, EngineError):
                error = EngineError(f"{self._name} did not start: {_one_line(error)}")
            started.set_exception(error)
            return
        self._account = _Account()  # the thread starts to serve requests; its start is no phase
        started.set_result(None)
        reason = "closed"
        try:
            self._serve(engine)
        except BaseException as error:  # noqa: BLE001  (a thread's boundary)
            reason = f"{type(error).__name__}: {_one_line(error)}"
        self._die(reason)
        teardown(engine)

    def _serve(self, engine: E) -> None:
        expected = 0  # callers who were answered and did not come back yet
        patience_s = 0.0  # how long a step waits for them
        while (work := self._next_work(engine, patience_s if expected > 0 else 0.0)) is not None:
            for future, function, phase in work:
                self._perform(engine, future, function, phase)
                # A caller came back with this work; after a write or an install it will come back again.
                expected += (phase in _ANSWERED) - 1
            if not work and engine.has_unfinished_requests():
                began = time.perf_counter()
                outputs = engine.step()
                self._steps += 1
                patience_s = PATIENCE * (time.perf_counter() - began)
                self._account.charge(self._shares())
                expected = self._deliver(outputs)

    def _next_work(
        self, engine: E, patience_s: float
    ) -> deque[tuple[Future[Any], Callable[[E], Any], Phase]] | None:
        """All work that waits; empty when a step is due instead, None when the loop is closing.

        Waits as long as there is nothing to do at all.
        """
        with self._wake:
            timeout = patience_s if engine.has_unfinished_requests() else None
            if timeout != 0.0:
                self._wake.wait_for(lambda: self._work or self._closing, timeout)
            self._account.charge({"idle": 1.0})
            if self._closing:
                return None
            work, self._work = self._work, deque()
            return work

    def _shares(self) -> dict[Phase, float]:
        """The tokens of the step that was just taken, by kind of request."""
        tokens: dict[Phase, float] = {}
        for running in self._requests.values():
            tokens[running.kind] = tokens.get(running.kind, 0.0) + running.tokens
            running.tokens = 1
        return tokens or {"other": 1.0}

    def _perform(self, engine: E, future: Future[Any], function: Callable[[E], Any], phase: Phase) -> None:
        """Run one piece of work. Charge its seconds first, then tell the caller, who may read ``times``."""
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = function(engine)
        except EngineError as error:  # refused: the engine is as it was
            self._account.charge({phase: 1.0})
            future.set_exception(error)
        except BaseException as error:  # broke half-way: the caller is told, then the thread ends
            future.set_exception(
                EngineError(f"{self._name} broke: {type(error).__name__}: {_one_line(error)}")
            )
            raise
        else:
            self._account.charge({phase: 1.0})
            future.set_result(result)

    def _deliver(self, outputs: Sequence[StepOutput]) -> int:
        """Answer the callers whose requests are finished; returns how many."""
        answered = 0
        for output in outputs:
            if not output.finished:
                running = self._requests.get(output.request_id)
                if running is not None and running.progress is not None:
                    running.progress(output)
            else:
                running = self._requests.pop(output.request_id, None)
                if running is not None and running.done.set_running_or_notify_cancel():
                    running.done.set_result(output)
                    answered += 1
        return answered

    def _die(self, reason: str) -> None:
        with self._wake:
            self._failure = reason
            pending = [
                *(future for future, _, _ in self._work),
                *(running.done for running in self._requests.values()),
            ]
            self._work.clear()
            self._requests.clear()
        for future in pending:
            if not future.done() and future.set_running_or_notify_cancel():
                future.set_exception(EngineError(f"{self._name} is dead: {reason}"))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
