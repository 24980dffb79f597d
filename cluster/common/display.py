"""Output for people: live progress on a terminal, plain lines elsewhere (the log of a job, or of CI).

Display.expect   how much the whole run has of each kind of work: evaluations, warm start, train steps
Display.counting a stage of it; its pace tells how long the rest of its kind will take
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cluster.common.printable import visible

PLAIN_WIDTH = 160  # columns of a table, where there is no terminal
_LONG_WORD = 24  # characters
_LONG_CELL = 40  # characters: a longer one is prose, and may be wrapped between its words
_UNBOUNDED = 100_000  # columns


@dataclass(slots=True)
class _Work:
    """Items of one kind: how many the run expects, how many are done, and the seconds that these took."""

    expected: int = 0
    done: int = 0
    seconds: float = 0.0

    @property
    def left(self) -> float:
        """Seconds, by the pace so far. NaN before the first item."""
        items = max(0, self.expected - self.done)
        return 0.0 if items == 0 else items * self.seconds / self.done if self.done else math.nan


class Display:
    """Messages and progress of a run. All output of cluster/ goes through here."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(
            file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH
        )
        self._work: dict[str, _Work] = {}

    def say(self, text: str) -> None:
        """Print a line. Brackets in it are no markup, and control characters are shown as their codes."""
        self.console.print(visible(text), markup=False, soft_wrap=True)

    def expect(self, items: Mapping[str, int]) -> None:
        """Say how many items of each kind the whole run has. Progress then tells the time left for all."""
        self._work = {kind: _Work(count) for kind, count in items.items()}

    def counting(self, title: str, total: int, kind: str = "") -> StageCounter:
        """Show the progress of a stage of ``total`` items of ``kind``, during a ``with`` block."""
        return StageCounter(self, title, total, kind)

    def worked(self, kind: str, seconds: float) -> None:
        """Count an item of ``kind``, which took ``seconds``."""
        if kind in self._work:
            self._work[kind].done += 1
            self._work[kind].seconds += seconds

    def undone(self, kind: str, items: int) -> None:
        """Take back ``items`` of ``kind`` at their mean time: they are done again."""
        if kind in self._work and (work := self._work[kind]).done:
            kept = max(0, work.done - items)
            work.seconds *= kept / work.done
            work.done = kept

    @property
    def run_left(self) -> str:
        """The time left for the whole run, "" where nothing is expected.

        "over" where a kind of work has not begun yet, so that nobody knows its pace.
        """
        left = [work.left for work in self._work.values()]
        known = [seconds for seconds in left if not math.isnan(seconds)]
        if not known:
            return ""
        return f"{'over ' if len(known) < len(left) else ''}{duration(sum(known))}"


class StageCounter:
    """A bar on a terminal, with the details as lines above it. Elsewhere lines alone.

    Without details there is a line for every tenth of the stage.
    """

    def __init__(self, display: Display, title: str, total: int, kind: str) -> None:
        self._display, self._console = display, display.console
        self._title = title
        self._total = total
        self._kind = kind
        self._done = 0
        self._began = self._last = time.monotonic()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
        )
        console = self._console
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._task = self._bar.add_task(title, total=total, left="") if self._bar else None

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
        """Count an item. ``detail`` is a line of its own, which stays."""
        now = time.monotonic()
        self._done += 1
        self._display.worked(self._kind, now - self._last)
        self._last = now
        left = f"left {self._time_left(now)}"
        if run_left := self._display.run_left:
            left += f" (the whole run: {run_left})"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, left=left)
        tenths = 10 * self._done // max(1, self._total)
        is_new_tenth = tenths > 10 * (self._done - 1) // max(1, self._total) and tenths < 10
        place = f"{self._title} {self._done}/{self._total}"
        if detail:
            after = "" if self._bar else f", {left}"
            self._console.print(visible(f"{place}: {detail}{after}"), markup=False, soft_wrap=True)
        elif is_new_tenth and self._bar is None:
            self._console.print(f"{place}, {left}", markup=False, soft_wrap=True)

    def go_back(self, items: int) -> None:
        """Take back so many items, which are done again."""
        self._done = max(0, self._done - items)
        self._display.undone(self._kind, items)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done)

    @property
    def time_left(self) -> str:
        """The time that the rest takes at the mean pace so far."""
        return self._time_left(time.monotonic())

    def _time_left(self, now: float) -> str:
        if self._done == 0:
            return "?"
        return duration((now - self._began) / self._done * (self._total - self._done))


def duration(seconds: float) -> str:
    """Write seconds as "12 s", "3 min 05 s" or "2 h 10 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def keep_words(table: Table) -> None:
    """Make no column narrower than its words. Only a word longer than ``_LONG_WORD`` may still be cut."""
    for column in table.columns:
        words = " ".join(_plain(cell).plain for cell in (column.header, *column.cells)).split()
        column.min_width = min(_LONG_WORD, max(map(len, words), default=0))


def keep_cells(table: Table) -> None:
    """Make no column narrower than its cells, and the words of its header."""
    for column in table.columns:
        cells = [_plain(cell).plain for cell in column.cells]
        whole = [part for cell in cells for part in ([cell] if len(cell) <= _LONG_CELL else cell.split())]
        words = [*_plain(column.header).plain.split(), *whole]
        column.min_width, column.overflow = max(map(len, words), default=0), "fold"


@dataclass(frozen=True, slots=True)
class Fitted:
    """A table; where its columns are too wide for the terminal, a block for each row instead.

    Rich would cut the cells. Their columns' least widths are those of ``keep_words`` or ``keep_cells``.
    """

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(max_width=_UNBOUNDED)
        if Measurement.get(console, unbounded, self.table).minimum <= options.max_width:
            yield self.table
            return
        if self.table.title:
            yield _plain(self.table.title)
        headers = [_plain(column.header).plain for column in self.table.columns]
        for row in zip(*(column.cells for column in self.table.columns), strict=True):
            yield from _block(headers, [_plain(cell) for cell in row], options.max_width)


def _block(headers: Sequence[str], row: Sequence[Text], width: int) -> Iterator[Text]:
    """The first cell, then lines of "header cell", indented. A cell is not divided, unless it is too long."""
    first = row[0].copy()
    first.stylize("bold")
    yield first
    line = Text("  ")
    for header, cell in zip(headers[1:], row[1:], strict=True):
        if not cell.plain:
            continue
        part = Text.assemble((header, "dim"), " " * bool(header), cell)
        if line.plain.strip() and line.cell_len + len(" · ") + part.cell_len > width:
            yield line
            line = Text("  ")
        line = Text.assemble(line, " · " if line.plain.strip() else "", part)
    if line.plain.strip():
        yield line


def _plain(cell: object) -> Text:
    return cell if isinstance(cell, Text) else Text.from_markup(str(cell))
