"""A process that saves is killed again and again, at any place; the next one goes on in its folder.

What a process said to be saved is there, whole and in order. ENGRAM_KILLS: the kills of each kind, 40 here,
200 in `make proof`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  before the forks: once, not in each life
import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient

from actors.fast_weights.basis import make_basis
from actors.types import FastWeights
from cluster.assistant.memory_file import SavedMemory, load_memory, save_memory
from cluster.assistant.opening import Opening
from cluster.evaluation.plan import Request, plan_cells
from cluster.evaluation.store import CellStore
from cluster.inspection.record import FOLDER, FailureRecord, Origin, list_records, load, save
from cluster.measure.rows import RowResult, load_row, save_row
from cluster.runs.checkpoint import newest_whole, recover_checkpoints
from cluster.tracking.figure_file import FigureFile, read_figures
from cluster.tracking.outbox import Outbox, Point
from cluster.tracking.tracker import Tracker, start_tracking
from configs.files import recover_folder, write_text
from configs.schema import RunConfig, TrackingConfig
from tests.unit.killed import Saves, kill_lives
from tests.unit.rollout_fakes import MODULE
from tests.unit.test_killed_saves import checkpoint, done

KILLS = int(os.environ.get("ENGRAM_KILLS", "40"))
LONG = KILLS * 5 + 300  # seconds that a test may take

pytestmark = pytest.mark.timeout(LONG)


def test_checkpoints(tmp_path: Path) -> None:
    def believed(run: Path) -> int:
        recover_checkpoints(run)
        found = newest_whole(run)
        if found is None:
            return 0
        assert (found.model / "model.safetensors").read_text() == f"{found.state.step:06d}" * 50
        return found.state.step

    saves = Saves(lambda run: lambda step: checkpoint(run, step, f"{step:06d}"), believed, operations=60)
    assert kill_lives(tmp_path, saves, KILLS) > KILLS / 4


def test_conversations(tmp_path: Path) -> None:
    """As ``serve`` and ``chat`` save them, in PEFT's format: the file of the tensors is written by Rust."""
    basis = make_basis("random", {MODULE: torch.arange(6.0).reshape(2, 3)}, {MODULE: 4}, False)
    model: Any = SimpleNamespace(
        fingerprint="tiny", vocab_size=1000, path=tmp_path
    )  # all that is asked of it
    opening = Opening("tiny", RunConfig(), model, basis, "Be brief.")

    def keep(root: Path, number: int) -> None:
        weights = FastWeights(basis.id, number, {MODULE: np.full((4, 2), float(number), np.float32)})
        save_memory(SavedMemory(weights, "", (number,), (), None), opening, root / "ada", overwrite=True)

    def believed(root: Path) -> int:
        recover_folder(root / "ada")
        if not (root / "ada").exists():
            return 0
        memory = load_memory(root / "ada", opening)
        number = memory.context_ids[0]
        assert memory.weights.revision == number
        assert memory.weights.b[MODULE].tolist() == [[float(number)] * 2] * 4
        return number

    assert kill_lives(tmp_path, Saves(lambda root: partial(keep, root), believed, 20), KILLS) > KILLS / 4


def test_rows(tmp_path: Path) -> None:
    def believed(root: Path) -> int:
        file = root / "evaluation" / "before.json"
        if not file.exists():
            return 0
        row = load_row(file)
        assert len(row.episodes) == 1 + int(row.label) % 7
        return int(row.label)

    def keep(root: Path, number: int) -> None:
        row = RowResult.of(str(number), [done(place) for place in range(1 + number % 7)])
        save_row(row, root / "evaluation" / "before.json")

    assert kill_lives(tmp_path, Saves(lambda root: partial(keep, root), believed, 4), KILLS) > KILLS / 4


def test_cells_of_an_evaluation(tmp_path: Path) -> None:
    request = Request(Path("tests/quickstart.yaml"), (), None, ("truncation",), ("recall",), (0,), "", (), "")
    cell = plan_cells(request).cells[0]

    def store(root: Path) -> CellStore:
        return CellStore(root / "cells", {"policy": "the base model"})

    def begin(root: Path) -> Callable[[int], None]:
        journal = store(root).journal(cell, store(root).begun(cell))
        return lambda number: journal.add(done(number))

    def believed(root: Path) -> int:
        begun = store(root).begun(cell)
        assert begun == [done(number) for number in range(1, len(begun) + 1)]
        return len(begun)

    assert kill_lives(tmp_path, Saves(begin, believed, operations=6), KILLS) > KILLS / 4


def test_timelines(tmp_path: Path) -> None:
    """The figures of a run: a line that was cut off costs itself, and not the next one."""

    def figures(number: int) -> dict[str, float]:
        return {f"timeline/worker_{part}": number + part / 100 for part in range(20)}

    def begin(root: Path) -> Callable[[int], None]:
        file = FigureFile(Tracker(), root)
        return lambda number: file.log(figures(number), number)

    def believed(root: Path) -> int:
        lines = list(read_figures(root))
        assert [(line.step, line.figures) for line in lines] == [
            (number, figures(number)) for number in range(1, len(lines) + 1)
        ]
        return len(lines)

    assert kill_lives(tmp_path, Saves(begin, believed, operations=2), KILLS) > KILLS / 4


def test_episodes(tmp_path: Path) -> None:
    origin = Origin("run", "train", "", 1, "worker-0", "tiny", "parametric", "settings.yaml")

    def keep(root: Path, number: int) -> None:
        record = FailureRecord(origin, f"task-{number}", f"{number}", 1, "engine", "x" * 3000, float(number))
        save(record, root / FOLDER)

    def believed(root: Path) -> int:
        numbers = sorted(int(load(path).task_id.removeprefix("task-")) for path in list_records(root))
        assert numbers == list(range(1, len(numbers) + 1))
        return len(numbers)

    assert kill_lives(tmp_path, Saves(lambda root: partial(keep, root), believed, 5), KILLS) > KILLS / 4


def test_the_outbox(tmp_path: Path) -> None:
    """SQLite's own writes are cut off too. What was taken before a kill may come again, as in doubt."""

    def point(number: int) -> Point:
        return Point("reward/mean", number / 10, 1000 + number, number)

    def begin(root: Path) -> Callable[[int], None]:
        box = Outbox(root / "mlflow-1.sqlite")
        took = os.open(root / "taken", os.O_WRONLY | os.O_CREAT)

        def keep(number: int) -> None:
            box.append([point(number)])
            if number % 3 == 0 and (batch := box.oldest()):
                os.pwrite(took, b"%08d" % batch[-1].step, 0)  # type: ignore[union-attr]
                box.taken()

        return keep

    def believed(root: Path) -> int:
        taken = int((root / "taken").read_text() or 0) if (root / "taken").exists() else 0
        box = Outbox(root / "mlflow-1.sqlite")
        left = [record for record in box.oldest() if isinstance(record, Point)]
        box.close()
        if not left:
            return taken
        assert left[0].step <= taken + 1, "records were lost that nobody has taken"
        assert left == [point(number) for number in range(left[0].step, left[-1].step + 1)]
        return left[-1].step

    assert kill_lives(tmp_path, Saves(begin, believed, operations=4), KILLS) > KILLS / 4
    assert not list(tmp_path.glob("*.damaged"))


def test_mlflow_holds_each_step_once_over_all_lives(tmp_path: Path) -> None:
    """A training that saves every third step is killed at any time; each life goes back to its checkpoint."""
    lot, steps = random.Random(0), 0
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "run").mkdir()
    note = tmp_path / "state.json"  # the checkpoint, and the run's id
    config = RunConfig(tracking=TrackingConfig(system_metrics_s=0, finish_timeout_s=60))
    lives = max(4, KILLS // 8)

    def live(life: int, last: int) -> None:
        run_id, step = json.loads(note.read_text()) if note.exists() else ("", 0)
        tracker = start_tracking(config, tmp_path, "run", tmp_path / "config.yaml", run_id, step)
        write_text(note, json.dumps([tracker.run_id, step]))
        while step < last:
            step += 1
            tracker.log({"reward/mean": step + life / 1000, "learner/loss": step + life / 1000}, step)
            if step % 3 == 0:
                write_text(note, json.dumps([tracker.run_id, step]))
            time.sleep(0.01)
        tracker.finish("FINISHED")

    for life in range(lives + 1):
        ends = life == lives
        steps += lot.randint(4, 20)
        child = os.fork()
        if child == 0:
            try:
                live(life, steps if ends else steps + 1000)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", flush=True)
                os._exit(1)
            os._exit(0)
        if not ends:  # wait until the life has got somewhere, then kill it at any moment
            deadline = time.monotonic() + 120
            while not (note.exists() and (text := note.read_text()) and json.loads(text)[1] >= steps):
                assert time.monotonic() < deadline, "the life never got there"
                time.sleep(0.01)
            time.sleep(lot.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            steps = json.loads(note.read_text())[1] + 2
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (0 if ends else -signal.SIGKILL)
    run_id, last = json.loads(note.read_text())
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    for key in ("reward/mean", "learner/loss"):
        history = client.get_metric_history(run_id, key)
        assert [int(point.value) for point in history] == [point.step for point in history]
        assert [point.step for point in history] == list(range(1, len(history) + 1))
        assert len(history) >= last
    assert client.get_run(run_id).info.status == "FINISHED"
