"""Runs a user's functions where their waiting stops nobody: sync ones in a thread, async ones on a loop.

    rollout worker's loop:  engine, writer, episodes            never waits for a user's session
    a thread an episode:    sync functions of its session, in the order of their calls
    one loop in a thread:   async functions of all sessions

Why a thread an episode, not a pool: a database handle or a browser belongs to the thread that made it. Why a
loop of its own: an async function that blocks by mistake stops other sessions, but no engine and no health
check. A call that is given up keeps its thread until it ends; the threads are daemons and hold up no exit.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Raised:
    """What a function raised. A value, because a future refuses StopIteration, and SystemExit ends a loop."""

    error: BaseException


class CallThread:
    """The thread of one session. It starts with the first call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: Future[Any] | None = None

    @property
    def busy(self) -> bool:
        """Whether a call runs that nobody waits for any more."""
        return self._last is not None and not self._last.done()

    def submit(self, function: Callable[[], T]) -> Future[T | Raised]:
        """Run ``function`` after the calls before it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        future: Future[T | Raised] = Future()
        future.set_running_or_notify_cancel()  # whoever gives up the wait does not stop the function
        self._last = future
        self._calls.put((future, function))
        return future

    def hand_on(self, function: Callable[[Any], object]) -> None:
        """Call ``function`` with what the last call returns, behind it."""
        if (last := self._last) is not None:
            self.submit(lambda: function(last.result()))

    def end(self) -> None:
        """Let the thread end after its last call."""
        self._calls.put(None)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function = call
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001  SystemExit of a user's code ends no worker
                result = Raised(error)
            future.set_result(result)


async def run_apart(function: Callable[..., Any], arguments: tuple[Any, ...], thread: CallThread) -> Any:
    """Return what the user's ``function`` returns, or Raised. Cancelled, it does not wait for it.

    An async function, or an awaitable that a sync one returns, is awaited on the loop for such.
    """
    if is_async(function):
        return await asyncio.wrap_future(_start(_caught(lambda: function(*arguments))))
    result = await asyncio.wrap_future(thread.submit(lambda: function(*arguments)))
    if inspect.isawaitable(result):
        return await asyncio.wrap_future(_start(_caught(lambda: result)))
    return result


def close_late(session: Any) -> None:
    """Close, in its thread, a session that came when nobody waited for it. Nobody hears of a fault then."""
    close = getattr(session, "close", None)
    if callable(close) and inspect.isawaitable(closing := close()):
        _start(_caught(lambda: closing))


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling ``function`` gives a coroutine: an async method, or an object with an async call."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  the method itself is wanted
    )


def run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run our own ``coroutine`` to its end, with or without an event loop around."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    thread = CallThread("apart")
    result = thread.submit(lambda: asyncio.run(coroutine)).result()
    thread.end()
    if isinstance(result, Raised):
        raise result.error
    return result


async def _caught(function: Callable[[], Any]) -> Any:
    try:
        return await function()
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # given up from outside, not raised by the user's code
            raise
        return Raised(error)
    except BaseException as error:  # noqa: BLE001  as in CallThread
        return Raised(error)


def _start(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    return asyncio.run_coroutine_threadsafe(coroutine, _user_loop())


@cache
def _user_loop() -> asyncio.AbstractEventLoop:
    """The loop of all async functions of users, in a daemon thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="user-loop", daemon=True).start()
    return loop
