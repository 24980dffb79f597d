"""A run's figures in its own folder: RUN/figures.jsonl, a line each time that the run logs.

    train --log--> FigureFile --> figures.jsonl --> ``engram watch``, ``engram compare``
                              --> MLflow's tracker

It needs no MLflow, and a program may read it while the run goes on. A resumed run appends: of two values of
one figure at one step the later one counts.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

from cluster.tracking.tracker import RunStatus, Tracker
from configs.files import dump_json

FIGURES = "figures.jsonl"  # in the folder of a run
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Logged:
    """What was logged at once. ``time``: s since 1970. A figure without a value is NaN."""

    step: int
    time: float
    figures: Mapping[str, float]


class FigureFile(Tracker):
    """Writes what is logged into ``run_dir``, and hands all on to ``tracker``. A full disk is one warning."""

    def __init__(self, tracker: Tracker, run_dir: Path) -> None:
        self.run_id, self.location = tracker.run_id, tracker.location
        self._tracker, self._path, self._warned = tracker, run_dir / FIGURES, False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        line = {"step": step, "time": round(time.time(), 3), "figures": dict(metrics)}
        try:
            with self._path.open("ab+") as file:
                file.write(_line_break(file) + dump_json(line, indent=None).encode() + b"\n")
        except OSError as error:
            if not self._warned:
                _log.warning("warning: %s takes no figures (%s)", self._path, error.strerror)
            self._warned = True
        self._tracker.log(metrics, step)

    def artifact(self, path: Path) -> None:
        self._tracker.artifact(path)

    def dataset(self, values: Mapping[str, str]) -> None:
        self._tracker.dataset(values)

    def model(self, values: Mapping[str, str]) -> None:
        self._tracker.model(values)

    def finish(self, status: RunStatus) -> None:
        self._tracker.finish(status)


def _line_break(file: BufferedRandom) -> bytes:
    """What a line must begin with: a line break behind a line that was cut off by a kill or a full disk."""
    if file.seek(0, os.SEEK_END) == 0:
        return b""
    file.seek(-1, os.SEEK_END)
    return b"" if file.read(1) == b"\n" else b"\n"


def read_figures(run_dir: Path) -> Iterator[Logged]:
    """What the run has logged, in order. A torn line is skipped: the run may be writing it, or was killed."""
    try:
        text = (run_dir / FIGURES).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            value = json.loads(line)
            figures = {key: math.nan if it is None else float(it) for key, it in value["figures"].items()}
            yield Logged(int(value["step"]), float(value["time"]), figures)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
