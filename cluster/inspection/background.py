"""Work beside a run and never in its way: one thread behind a bounded queue. What it cannot do is counted."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Calls ``work`` with each item, in order, on a thread that starts with the first one.

    Nothing raises into the caller. ``explain`` turns an exception of ``work`` into one line.
    """

    def __init__(
        self, name: str, work: Callable[[T], None], explain: Callable[[Exception], str], most_waiting: int
    ) -> None:
        self._work, self._explain = work, explain
        self._items: queue.Queue[T | None] = queue.Queue(most_waiting)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.done = 0
        self.lost = 0
        self.problem = ""  # the first cause of a loss

    def submit(self, item: T) -> None:
        """Queue ``item``. Returns at once; a full queue loses it."""
        if not self._thread.is_alive():
            self._thread.start()
        try:
            self._items.put_nowait(item)
        except queue.Full:
            self._lose("more came than it could take")

    def close(self, seconds: float) -> None:
        """Wait at most ``seconds`` for the items that are queued. The last call."""
        if not self._thread.is_alive():
            return
        deadline, left = time.monotonic() + seconds, self._items.qsize()
        with suppress(queue.Full):
            self._items.put(None, timeout=seconds)
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._lose("the run ended first", left)

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            try:
                self._work(item)
                self.done += 1
            except Exception as error:  # noqa: BLE001  no fault may end the thread
                self._lose(self._explain(error))

    def _lose(self, problem: str, count: int = 1) -> None:
        self.lost += count
        self.problem = self.problem or problem
