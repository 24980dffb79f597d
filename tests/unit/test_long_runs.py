"""A long run takes no more memory, threads and files than a short one. ENGRAM_STEPS: 100,000 in `make proof`.

The loop, its stream and ledger, the checkpoints, the tracker with its outbox, and the file of the figures are
the real ones. Workers, learner and MLflow are scripted: they keep nothing.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.types import Task, TrajectoryGroup
from cluster.fleet.contract import FinishedGroup
from cluster.fleet.fleet import FleetPlan
from cluster.fleet.ledger import Ledger, LedgerSnapshot
from cluster.fleet.stream import Batch
from cluster.runs.checkpoint import START, TrainState, save_checkpoint
from cluster.tracking.figure_file import FIGURES, FigureFile
from cluster.tracking.outbox import Outbox, Record
from cluster.tracking.sender import MlflowRun
from cluster.tracking.tracker import MlflowTracker
from cluster.train.loop import run_loop
from cluster.train.metrics import StepSummary
from configs.schema import TrackingConfig, TrainConfig
from learner.types import StepReport
from tests.unit.loop_cases import Trainer, Worker, wire

STEPS = int(os.environ.get("ENGRAM_STEPS", "500"))


class Forgetful(Worker):
    async def group(self, position: int, task: Task) -> FinishedGroup:
        self.positions.clear()
        return await super().group(position, task)


class ForgetfulTrainer(Trainer):
    def step(self, groups: Sequence[TrajectoryGroup]) -> StepReport:
        self.batches.clear()
        return super().step(groups)


class Mlflow(MlflowRun):
    """Takes all, and counts it."""

    def __init__(self) -> None:
        self.run_id, self.began, self.taken = "run", 0.0, 0

    def take(self, records: Sequence[Record], in_doubt: bool) -> list[str]:
        self.taken += len(records)
        return []


@dataclass(frozen=True, slots=True)
class Use:
    """What this process and its run folder hold."""

    objects: int
    memory_mib: float
    threads: int
    open_files: int
    files: int
    outbox_kib: float
    figures_kib: float


def use(run_dir: Path) -> Use:
    gc.collect()
    process = psutil.Process()
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    outbox = sum(path.stat().st_size for path in files if "sqlite" in path.name)
    return Use(
        objects=len(gc.get_objects()),
        memory_mib=process.memory_info().rss / 2**20,
        threads=threading.active_count(),
        open_files=process.num_fds(),
        files=len(files),
        outbox_kib=outbox / 1024,
        figures_kib=(run_dir / FIGURES).stat().st_size / 1024,
    )


@pytest.mark.timeout(600 + STEPS // 20)
def test_a_run_of_many_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = STEPS // 5
    plan = TrainConfig(steps=STEPS, tasks_per_step=2, group_size=2, max_staleness=1, checkpoint_every=every)
    mlflow, uses = Mlflow(), list[Use]()
    tracking = TrackingConfig(system_metrics_s=0)
    tracker = FigureFile(
        MlflowTracker(mlflow, Outbox(tmp_path / "mlflow-run.sqlite"), "uri", tracking), tmp_path
    )
    workers = [Forgetful("worker-0"), Forgetful("worker-1")]
    ledger = Ledger(LedgerSnapshot())

    async def save(state: TrainState) -> None:
        async def learner(target: Path) -> None:
            target.mkdir()

        await save_checkpoint(tmp_path, state, "seed: 0\n", learner, keep=2)
        uses.append(use(tmp_path))

    def on_step(summary: StepSummary, batch: Batch) -> None: ...

    async def train() -> TrainState:
        fleet = FleetPlan(
            lambda name: Forgetful(name), lambda: 2, 0, 1, 60.0, lambda text: None, in_flight=False
        )
        trainer: Any = ForgetfulTrainer()
        parts = wire(workers, fleet, trainer, tracker, ledger, plan, START, on_step, save)
        return await run_loop(parts, plan, START)

    state = asyncio.run(train())
    tracker.finish("FINISHED")
    assert state.step == STEPS and ledger.balanced and ledger.settled["trained"] == 2 * STEPS
    assert mlflow.taken > 20 * STEPS
    with capsys.disabled():
        print(f"\n{STEPS} steps, at each fifth:", *uses, sep="\n  ")
    first, last = uses[1], uses[-1]  # two checkpoints are kept: from the second on there are as many files
    assert last.objects - first.objects < 2000
    assert last.memory_mib - first.memory_mib < 32 + STEPS * 1e-4  # a reward a step stays: 100 bytes
    assert last.files == first.files
    # those of the process, in which other tests' threads may come and go
    assert abs(last.threads - first.threads) <= 2 and abs(last.open_files - first.open_files) <= 2
    assert last.outbox_kib < 8192  # SQLite's log is written over from 4 MB on
    assert last.figures_kib / STEPS < 8  # grows with the steps: 2 KiB each
