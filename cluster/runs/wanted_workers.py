"""How many rollout workers there should be: the configuration's number, its schedule, and what a person asked for while the run goes on.

python -m cluster scale 4  -->  <run>/workers.json  --read each second by the driver-->  ElasticFleet
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from cluster.common.errors import ClusterError

_FILE = "workers.json"


class ScaleError(ClusterError):
    """There is no run to scale, or not to that number."""


@dataclass(slots=True)
class WantedWorkers:
    """Called by the fleet. ``step`` is moved on by the loop; a number that a person asked for overrules the schedule from then on."""

    configured: int
    schedule: tuple[str, ...]
    run_dir: Path
    step: int = 0

    def __call__(self) -> int:
        asked = read_wanted(self.run_dir)
        return asked if asked is not None else scheduled(self.configured, self.schedule, self.step)


def scheduled(configured: int, schedule: tuple[str, ...], step: int) -> int:
    """The number of the schedule's last entry that ``step`` has reached, else the configured one."""
    reached = sorted(
        (int(at), int(count))
        for at, _, count in (entry.partition(":") for entry in schedule)
        if int(at) <= step
    )
    return reached[-1][1] if reached else configured


def read_wanted(run_dir: Path) -> int | None:
    """What was asked for; None where nothing was, or where the file is being damaged by someone else."""
    try:
        wanted = json.loads((run_dir / _FILE).read_text(encoding="utf-8"))["workers"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return wanted if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted >= 1 else None


def ask_for(run_dir: Path, workers: int) -> None:
    """Ask the run in ``run_dir`` for ``workers`` rollout workers. Raises ScaleError."""
    if workers < 1:
        raise ScaleError(
            f"{workers} workers is not allowed: a run needs 1 or more (Ctrl-C or SIGTERM ends it)"
        )
    if not (run_dir / "config.yaml").is_file():
        raise ScaleError(f"{run_dir} is no run folder: it has no config.yaml")
    partial = run_dir / f".{_FILE}.{os.getpid()}"
    partial.write_text(json.dumps({"workers": workers}), encoding="utf-8")
    partial.rename(run_dir / _FILE)


def newest_run(output_dir: Path) -> Path:
    """The run folder in ``output_dir`` that was written to last. Raises ScaleError."""
    runs = [path.parent for path in output_dir.glob("*/config.yaml") if "-evaluate-" not in path.parent.name]
    if not runs:
        raise ScaleError(f"{output_dir} holds no run: give the run's folder with --run")
    return max(runs, key=lambda run: max(file.stat().st_mtime_ns for file in run.iterdir()))
