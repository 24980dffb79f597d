"""How many rollout workers a run should have: the configured number, its schedule, or what a user asked for.

python -m cluster scale 4  -->  <run>/workers.json  --read each second by the driver-->  ElasticFleet
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import PositiveInt

from cluster.common.errors import ClusterError
from cluster.runs.run_lock import is_held
from configs.files import FileError, dump_json, read_json, write_text

_FILE = "workers.json"


class ScaleError(ClusterError):
    """There is no run to scale, or the number of workers is not allowed."""


@dataclass(frozen=True, slots=True)
class _Request:
    """``workers.json``."""

    workers: PositiveInt


@dataclass(slots=True)
class WantedWorkers:
    """The wanted number, called by the fleet. The loop advances ``step``.

    A number that a user asked for overrules the schedule from then on.
    """

    configured: int
    schedule: tuple[str, ...]
    run_dir: Path
    step: int = 0

    def __call__(self) -> int:
        requested = read_wanted(self.run_dir)
        return scheduled(self.configured, self.schedule, self.step) if requested is None else requested


def scheduled(configured: int, schedule: tuple[str, ...], step: int) -> int:
    """The number of the last entry ("step:workers") that ``step`` has reached, else ``configured``."""
    entries = [entry.partition(":") for entry in schedule]
    reached = sorted((int(at), int(count)) for at, _, count in entries if int(at) <= step)
    return reached[-1][1] if reached else configured


def read_wanted(run_dir: Path) -> int | None:
    """The number that a user asked for; None where nobody did, or where the file is damaged."""
    try:
        return read_json(run_dir / _FILE, _Request).workers
    except (FileNotFoundError, FileError):
        return None


def ask_for(run_dir: Path, workers: int) -> None:
    """Ask the run in ``run_dir`` for ``workers`` rollout workers. Raises ScaleError."""
    if workers < 1:
        raise ScaleError(
            f"{workers} workers is not allowed: a run needs 1 or more (Ctrl-C or SIGTERM ends it)"
        )
    if not (run_dir / "config.yaml").is_file():
        raise ScaleError(f"{run_dir} is no run folder: it has no config.yaml")
    if not is_held(run_dir):
        raise ScaleError(
            f"{run_dir} is not running: it ended or died, so nobody would read the number; "
            f"go on with it: engram train {run_dir / 'config.yaml'} resume=auto rollout.workers={workers}"
        )
    write_text(run_dir / _FILE, dump_json(_Request(workers)))


def forget_wanted(run_dir: Path) -> None:
    """Forget the number that was asked for in an earlier life: this one begins with its settings."""
    (run_dir / _FILE).unlink(missing_ok=True)


def newest_run(output_dir: Path) -> Path:
    """The run folder in ``output_dir`` that was written to last, of those at work if any is.

    Raises ScaleError.
    """
    runs = [path.parent for path in output_dir.glob("*/config.yaml") if "-evaluate-" not in path.parent.name]
    if not runs:
        raise ScaleError(f"{output_dir} holds no run: name the run's folder")
    runs = [run_dir for run_dir in runs if is_held(run_dir)] or runs
    return max(runs, key=_written_at)


def _written_at(run_dir: Path) -> int:
    times = [0]
    for path in run_dir.iterdir():
        with suppress(FileNotFoundError):  # a file that the run has just renamed
            times.append(path.stat().st_mtime_ns)
    return max(times)
