"""Names the folders of runs, and finds those of a name again in the order in which they began.

    <output_dir>/<name>-<date>-<time>[-2]/
        number      which run of the output folder this is, from 1 on: the order, wherever the clock stands
        finished    the train.steps after which it was done, written behind its report

A name is taken by making its folder: of two runs that begin in one second, each gets its own.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from cluster.common.turn import in_turn
from configs.files import sync, write_text

_NUMBER, _FINISHED = "number", "finished"
_STAMP = re.compile(r"-(\d{8}-\d{6}(?:-\d+)?)")


def create_run(output_dir: Path, name: str) -> Path:
    """Create the folder of a run that begins now. Raises OSError."""
    with in_turn(output_dir):
        number = 1 + max((_number(folder, _NUMBER) for folder in _folders(output_dir)), default=0)
        stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        run_dir, again = output_dir / stem, 1
        while run_dir.exists():
            again += 1
            run_dir = output_dir / f"{stem}-{again}"
        run_dir.mkdir()
        write_text(run_dir / _NUMBER, f"{number}\n")
        sync(output_dir)
    return run_dir


def runs_of(output_dir: Path, name: str) -> list[Path]:
    """The folders of the runs of ``name``, the newest first."""
    stamps = {
        folder: stamp[1]
        for folder in _folders(output_dir)
        if folder.name.startswith(name) and (stamp := _STAMP.fullmatch(folder.name[len(name) :]))
    }
    return sorted(stamps, key=lambda folder: (_number(folder, _NUMBER), stamps[folder]), reverse=True)


def mark_finished(run_dir: Path, steps: int) -> None:
    """Note that the run is done, up to its report. Raises OSError."""
    write_text(run_dir / _FINISHED, f"{steps}\n")


def finished_steps(run_dir: Path) -> int:
    """The ``train.steps`` after which the run was done; -1 for a run that is not."""
    return _number(run_dir, _FINISHED, missing=-1)


def _folders(output_dir: Path) -> list[Path]:
    return [entry for entry in output_dir.iterdir() if entry.is_dir()] if output_dir.is_dir() else []


def _number(folder: Path, file: str, missing: int = 0) -> int:
    """The number in a small file; ``missing`` where there is none, as in runs of older versions."""
    try:
        return int((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return missing
