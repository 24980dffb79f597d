"""Output for people: live progress on a terminal, plain lines elsewhere (the log of a job, or of CI)."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_WIDTH = 160  # columns of a table, where there is no terminal


class Display:
    """Messages and progress of a run. All output of cluster/ goes through here."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(
            file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH
        )

    def say(self, text: str) -> None:
        """Print a line. Brackets in it are no markup."""
        self.console.print(text, markup=False, soft_wrap=True)

    def counting(self, title: str, total: int) -> StageCounter:
        """Show the progress of a stage of ``total`` items, during a ``with`` block."""
        return StageCounter(self.console, title, total)


class StageCounter:
    """A bar on a terminal. Elsewhere a line at the beginning, one for each detail, and one at the end."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console = console
        self._title = title
        self._total = total
        self._done = 0
        self._began = time.monotonic()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
        )
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = self._bar.add_task(title, total=total, detail="") if self._bar else None

    def __enter__(self) -> StageCounter:
        if self._bar:
            self._bar.start()
        else:
            self._console.print(f"{self._title}: {self._total} to do", markup=False, soft_wrap=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        seconds = time.monotonic() - self._began
        self._console.print(
            f"{self._title}: {self._done} of {self._total} in {duration(seconds)}", markup=False
        )

    def advance(self, detail: str = "") -> None:
        """Count an item. ``detail`` is shown beside it."""
        self._done += 1
        left = f"left {self.time_left}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, detail=f"{detail}  {left}" if detail else left)
        elif detail:
            line = f"{self._title} {self._done}/{self._total}: {detail}, {left}"
            self._console.print(line, markup=False)

    @property
    def time_left(self) -> str:
        """The time that the rest takes at the mean pace so far."""
        if self._done == 0:
            return "?"
        return duration((time.monotonic() - self._began) / self._done * (self._total - self._done))


def duration(seconds: float) -> str:
    """Write seconds as "12 s", "3 min 05 s" or "2 h 10 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
