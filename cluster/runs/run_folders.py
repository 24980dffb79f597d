"""Names the folders of runs, and finds those of a name again in the order in which they began.

    <output_dir>/<name>-<date>-<time>[-2]/
        number      which run of the output folder this is, from 1 on: the order, wherever the clock stands
        finished    the train.steps after which it was done, written behind its report; and how often it was
                    gone back in since, by a checkpoint's name (-1: it is at work again, or was killed)

A name is taken by making its folder: of two runs that begin in one second, each gets its own.
"""

from __future__ import annotations

import re
import secrets
import time
from itertools import chain, count
from pathlib import Path

from cluster.common.errors import AllFinished
from cluster.common.folders import in_turn
from configs.files import sync, write_text

NUMBER, FINISHED = "number", "finished"
_STAMP = re.compile(r"-(\d{8}-\d{6}(?:-\d+)?)")


def create_run(output_dir: Path, name: str, elsewhere: int | None = None) -> Path:
    """Create the folder of a run that begins now. Raises OSError.

    ``elsewhere``: the highest number of such a run on other machines, whose runs go into the same store. No
    two of them may have one name there, so it gets a number by lot.
    """
    with in_turn(output_dir):
        number = 1 + max((elsewhere or 0, *(number_of(folder) for folder in _folders(output_dir))))
        stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        more = (f"-{again}" for again in count(2))
        if elsewhere is not None:
            more = (f"-{secrets.randbelow(9000) + 1000}" for _ in count())
        suffixes = more if elsewhere is not None else chain([""], more)
        run_dir = next(path for suffix in suffixes if not (path := output_dir / f"{stem}{suffix}").exists())
        run_dir.mkdir()
        write_text(run_dir / NUMBER, f"{number}\n")
        sync(output_dir)
    return run_dir


def runs_of(output_dir: Path, name: str) -> list[Path]:
    """The folders of the runs of ``name``, the newest first."""
    stamps = {folder: stamp for folder in _folders(output_dir) if (stamp := _stamp(folder.name, name))}
    return sorted(stamps, key=lambda folder: (number_of(folder), stamps[folder]), reverse=True)


def is_run_of(folder: str, name: str) -> bool:
    """Whether a folder's name is that of a run of ``name``."""
    return bool(_stamp(folder, name))


def mark_finished(run_dir: Path, steps: int) -> None:
    """Note that the run is done, up to its report. Raises OSError."""
    write_text(run_dir / FINISHED, f"{steps} {returns(run_dir)}\n")


def mark_unfinished(run_dir: Path) -> None:
    """Note that a run goes on; else one that was finished would count as done if it is killed now.

    Raises OSError.
    """
    if finished_steps(run_dir) >= 0:
        write_text(run_dir / FINISHED, f"-1 {returns(run_dir) + 1}\n")


def finished_steps(run_dir: Path) -> int:
    """The ``train.steps`` after which the run was done; -1 for a run that is not."""
    return _number(run_dir, FINISHED, missing=-1)


def returns(run_dir: Path) -> int:
    """How often the run went on after it had been finished. So it tells the older of two copies."""
    return _number(run_dir, FINISHED, place=1)


def nothing_left(name: str, place: Path | str, newest: str, steps: int) -> AllFinished:
    """The error for runs of ``name`` that are all finished, the newest of them after ``steps``."""
    return AllFinished(
        f"resume=auto: nothing is left to do: every run of {name} in {place} is finished, "
        f"the newest is {newest}; start anew with resume=, or train on with train.steps=N above {steps}"
    )


def number_of(run_dir: Path) -> int:
    """Which run of its output folder it is; 0 for those of older versions."""
    return _number(run_dir, NUMBER)


def _stamp(folder: str, name: str) -> str:
    """The part of a run folder's name behind the run's; "" where it is another's."""
    stamp = _STAMP.fullmatch(folder[len(name) :]) if folder.startswith(name) else None
    return "" if stamp is None else stamp[1]


def _folders(output_dir: Path) -> list[Path]:
    return [entry for entry in output_dir.iterdir() if entry.is_dir()] if output_dir.is_dir() else []


def _number(folder: Path, file: str, missing: int = 0, place: int = 0) -> int:
    """One of the numbers in a small file; ``missing`` where it is not there, as in runs of older versions."""
    try:
        return int((folder / file).read_text(encoding="utf-8").split()[place])
    except (OSError, ValueError, IndexError):
        return missing
