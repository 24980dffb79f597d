"""A view of a run while it goes on: RUN/figures.jsonl and RUN/episodes --> Snapshot --> the terminal.

It only reads, so it may run anywhere that sees the run's folder, and as often as wanted.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.common.display import Fitted, duration, keep_words
from cluster.common.printable import visible
from cluster.inspection.record import FOLDER, Record, RecordError, load
from cluster.inspection.terminal import list_cells
from cluster.runs.run_folders import finished_steps
from cluster.runs.run_lock import is_held
from cluster.tracking.figure_file import read_figures
from configs.load import ConfigError, load_config

_EVERY_S = 2.0
_EPISODES = 8
_BLOCKS = "▁▂▃▄▅▆▇█"
_COLOURS = ("green", "magenta", "yellow", "cyan", "blue", "red", "white")
_LEAK = ("reward/told_elsewhere", "reward/abstained", "reward/made_up")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """``figures``: by name, the values by step; of a warm start these are its own steps."""

    run: str
    steps: int  # that the run is to make; 0 where its settings cannot be read
    state: str
    figures: Mapping[str, Mapping[int, float]]
    logged: float  # s since the last figure; NaN without one
    newest: tuple[Record, ...]
    cells: str  # of an evaluation, in words; "" of a training

    def last(self, name: str) -> float:
        """The newest value of a figure. NaN without one."""
        values = self.figures.get(name, {})
        return values[max(values)] if values else math.nan


def look(run_dir: Path) -> Snapshot:
    """Read what the run has written so far."""
    figures: dict[str, dict[int, float]] = {}
    logged = math.nan
    for line in read_figures(run_dir):
        logged = time.time() - line.time
        if "reward/mean" in line.figures and line.step <= max(figures.get("reward/mean", {}), default=-1):
            figures = dict(_until(line.step, figures))
        for name, value in line.figures.items():
            figures.setdefault(visible(name), {})[line.step] = value
    newest, cells = tuple(_newest(run_dir)), visible(_cells(run_dir))
    finished = (run_dir / "report" / "report.json").is_file() if cells else finished_steps(run_dir) >= 0
    state = "running" if is_held(run_dir) else "finished" if finished else "not running"
    try:
        steps = load_config(run_dir / "config.yaml", []).train.steps
    except ConfigError:
        steps = 0
    return Snapshot(visible(run_dir.name), steps, state, figures, logged, newest, cells)


def _until(step: int, figures: Mapping[str, dict[int, float]]) -> Iterator[tuple[str, dict[int, float]]]:
    """``figures`` without those of steps that a resume took back. A warm start counts steps of its own."""
    for name, values in figures.items():
        own = name.startswith("warm_start/")
        kept = {at: value for at, value in values.items() if own or at <= step}
        if kept:
            yield name, kept


def _cells(run_dir: Path) -> str:
    """What an evaluation has measured: a file for each finished cell, a line for each task of one at work."""
    folder = run_dir / "cells"
    if not folder.is_dir():
        return ""
    finished = {path.stem for path in folder.glob("*.json")}
    begun = {path.stem: path for path in folder.glob("*.jsonl") if path.stem not in finished}
    parts = [f"{len(finished)} finished"]
    parts += [
        f"{name} at {max(0, len(path.read_bytes().splitlines()) - 1)} tasks" for name, path in begun.items()
    ]
    return ", ".join(parts)


def _newest(run_dir: Path) -> Iterator[Record]:
    files = [(path.stat().st_mtime, path) for path in (run_dir / FOLDER).glob("*.json") if path.exists()]
    for _, path in sorted(files, reverse=True)[:_EPISODES]:
        try:
            yield load(path)
        except RecordError:  # deleted or damaged meanwhile; ``inspect`` says what is wrong
            continue


def watch(run_dir: Path, console: Console) -> None:
    """Show the run until it ends, or Ctrl-C. Without a terminal, or where the run is at rest, once."""
    shown = look(run_dir)
    if not console.is_terminal or shown.state != "running":
        console.print(view(shown, console.width))
        return
    with Live(view(shown, console.width), console=console, auto_refresh=False) as live:
        while shown.state == "running":
            time.sleep(_EVERY_S)
            shown = look(run_dir)
            live.update(view(shown, console.width), refresh=True)


# --- what is shown -----------------------------------------------------------------------------------------


def view(shown: Snapshot, width: int) -> RenderableType:
    """All of it, one part below the other."""
    return Group(_head(shown), *_progress(shown, width), *_timeline(shown, width), *_episodes(shown))


def _head(shown: Snapshot) -> Text:
    done = max(shown.figures.get("reward/mean", {}), default=0)  # none: a warm start, or supervised steps
    at = f" · step {done} of {shown.steps}" if done and shown.steps and not shown.cells else ""
    ago = "" if math.isnan(shown.logged) else f" · last figures {duration(shown.logged)} ago"
    return Text.assemble((shown.run, "bold"), f" · {shown.state}{at}{ago}")


def _progress(shown: Snapshot, width: int) -> Iterator[Text]:
    if shown.cells:
        yield Text(f"cells     {shown.cells}")
    rewards = shown.figures.get("reward/mean", {})
    if rewards:
        line = spark([rewards[step] for step in sorted(rewards)], max(10, width - 40))
        spread = f"{min(rewards.values()):.3f} to {max(rewards.values()):.3f}"
        yield Text.assemble("reward    ", (line, "green"), f" {shown.last('reward/mean'):.3f} ({spread})")
    elif warm := shown.figures.get("warm_start/loss"):
        line = spark([warm[step] for step in sorted(warm)], max(10, width - 40))
        yield Text.assemble("warm start, loss ", (line, "magenta"), f" {shown.last('warm_start/loss'):.3f}")
    if rows := [*_held_out(shown)]:
        yield Text(f"held-out  {', '.join(rows)}")
    counts = [(name, shown.last(f"fast_weights/{name}")) for name in ("accepted", "empty", "rolled_back")]
    if not all(math.isnan(count) for _, count in counts):
        outcomes = ", ".join(f"{count:.0f} {name.replace('_', ' ')}" for name, count in counts)
        before, after = shown.last("fast_weights/loss_before"), shown.last("fast_weights/loss_after")
        yield Text(f"writes    {outcomes}, loss {before:.2f} -> {after:.2f} (of the last step)")
    if leak := [(name, shown.last(name)) for name in _LEAK if name in shown.figures]:
        figures = ", ".join(f"{name.removeprefix('reward/')} {value:.3f}" for name, value in leak)
        yield Text(f"leak      {figures}")


def _held_out(shown: Snapshot) -> Iterator[str]:
    """Each row with its score: F1, or the reward where nothing was answered."""
    names = [name.split("/") for name in shown.figures if name.startswith("eval/")]
    for row in dict.fromkeys(parts[1] for parts in names):
        f1, reward = shown.last(f"eval/{row}/f1"), shown.last(f"eval/{row}/reward")
        if not math.isnan(f1):
            yield f"{row} F1 {100 * f1:.1f} %"
        elif not math.isnan(reward):
            yield f"{row} reward {reward:.3f}"


def _timeline(shown: Snapshot, width: int) -> Iterator[Text]:
    """A bar for the workers' step threads, the episodes and the learner: where the last step's time went."""
    for title in ("worker", "episode", "learner"):
        prefix = f"timeline/{title}_"
        shares = {
            name.removeprefix(prefix): shown.last(name) for name in shown.figures if name.startswith(prefix)
        }
        largest = sorted(((share, name) for name, share in shares.items() if share > 0.005), reverse=True)
        if not largest:
            continue
        bar, legend = Text(f"{title:10s}"), Text(" " * 10)
        for (share, name), colour in zip(largest, _COLOURS, strict=False):
            bar.append("█" * max(1, round(share * (width - 12))), colour)
            legend.append(f"{name} {100 * share:.0f} %  ", colour)
        bar.truncate(width)
        yield bar
        yield legend


def _episodes(shown: Snapshot) -> Iterator[RenderableType]:
    if not shown.newest:
        yield Text("no episode was kept yet", style="dim")
        return
    table = Table(box=SIMPLE, pad_edge=False, title="newest episodes", title_justify="left")
    columns = ("step", "what", "task", "reward", "F1", "writes")
    for name in columns:
        table.add_column(
            name, justify="right" if name in ("step", "reward", "F1") else "left", overflow="fold"
        )
    for record in shown.newest:
        table.add_row(*(Text(visible(cell)) for cell in list_cells(record)[: len(columns)]))
    keep_words(table)
    yield Fitted(table)


def spark(values: Sequence[float], width: int) -> str:
    """A curve in one line of at most ``width`` characters: each is the mean of its share of the values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    columns = min(width, len(finite))
    edges = [len(finite) * column // columns for column in range(columns + 1)]
    means = [sum(finite[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)
