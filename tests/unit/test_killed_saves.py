"""A process that saves is killed at each of its file operations: nothing is lost, nothing torn is believed.

The child ends in the place of, or in the middle of, its n-th operation on a file, for n = 1, 2, ... until a
save survives (killed.py).
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from actors.peak_memory import PeakMemory
from cluster.evaluation.plan import Request, plan_cells
from cluster.evaluation.store import CellStore
from cluster.measure.rows import EpisodeScore, TaskResult
from cluster.runs.checkpoint import START, newest_whole, recover_checkpoints, save_checkpoint
from cluster.tracking.outbox import Outbox, Point
from configs.files import new_folder, recover_folder, remove_folder, write_text
from tests.unit.killed import kill_everywhere


def checkpoint(run: Path, step: int, content: str, keep: int = 2) -> None:
    async def learner(target: Path) -> None:
        (target / "model").mkdir(parents=True)
        for name in ("model/model.safetensors", "optimizer.safetensors", "learner.json"):
            (target / name).write_text(content * 50)

    asyncio.run(save_checkpoint(run, replace(START, step=step, version=step), content, learner, keep))


def theta(run: Path) -> tuple[int, str]:
    """(step, content) of what a run would go on from."""
    recover_checkpoints(run)
    found = newest_whole(run)
    assert found is not None
    return found.state.step, (found.model / "model.safetensors").read_text()[:3]


def test_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A save that also deletes the oldest; then a save in the place of an earlier one."""

    def prepare(run: Path) -> None:
        for step in (2, 4):
            checkpoint(run, step, "old")

    def check_next(run: Path, died: bool) -> None:
        assert theta(run) in ([(4, "old"), (6, "new")] if died else [(6, "new")])
        checkpoint(run, 8, "end")  # the next life saves as ever
        assert theta(run) == (8, "end")
        assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]

    def check_same(run: Path, died: bool) -> None:
        assert theta(run) in ([(4, "old"), (4, "new")] if died else [(4, "new")])

    kills = kill_everywhere(tmp_path, prepare, lambda run: checkpoint(run, 6, "new"), check_next)
    kills += kill_everywhere(tmp_path, prepare, lambda run: checkpoint(run, 4, "new"), check_same)
    assert kills >= 100
    assert not caplog.records  # a kill leaves nothing damaged behind that would have to be passed over


def test_conversations(tmp_path: Path) -> None:
    """The folder of a conversation is saved anew; the old one or the new one is there, with all its files."""

    def save(root: Path, content: str) -> None:
        with new_folder(root / "ada", replace=True) as partial:
            for name in ("adapter_model.safetensors", "adapter_config.json", "memory.json"):
                (partial / name).write_text(content * 50)

    def check(root: Path, died: bool) -> None:
        recover_folder(root / "ada")
        contents = [path.read_text()[:3] for path in sorted((root / "ada").iterdir())]
        assert contents in ([["old"] * 3, ["new"] * 3] if died else [["new"] * 3])

    kills = kill_everywhere(tmp_path, lambda root: save(root, "old"), lambda root: save(root, "new"), check)
    assert kills >= 15

    def check_gone(root: Path, died: bool) -> None:
        recover_folder(root / "ada")
        left = sorted((root / "ada").iterdir()) if (root / "ada").exists() else []
        assert len(left) in ((0, 3) if died else (0,))

    assert (
        kill_everywhere(
            tmp_path, lambda root: save(root, "old"), lambda root: remove_folder(root / "ada"), check_gone
        )
        >= 4
    )


def test_rows_and_other_files(tmp_path: Path) -> None:
    def check(root: Path, died: bool) -> None:
        text = (root / "row.json").read_text()
        assert text in (["old" * 50, "new" * 50] if died else ["new" * 50])

    kills = kill_everywhere(
        tmp_path,
        lambda root: write_text(root / "row.json", "old" * 50),
        lambda root: write_text(root / "row.json", "new" * 50),
        check,
    )
    assert kills >= 4


def done(position: int) -> TaskResult:
    score = EpisodeScore(f"t{position}", "", 0.5, {}, (), {}, {}, 1, 1, 1, 0.5)
    return TaskResult(position, 0, (score,), ())


def test_cells_of_an_evaluation(tmp_path: Path) -> None:
    request = Request(Path("tests/quickstart.yaml"), (), None, ("truncation",), ("recall",), (0,), "", (), "")
    cell = plan_cells(request).cells[0]

    def store(root: Path) -> CellStore:
        return CellStore(root / "cells", {"policy": "the base model"})

    def prepare(root: Path) -> None:
        with store(root).journal(cell, []) as journal:
            journal.add(done(0))

    def work(root: Path) -> None:
        cells = store(root)
        with cells.journal(cell, cells.begun(cell)) as journal:
            journal.add(done(1))
            journal.add(done(2))
        cells.finish(cell, journal.tasks, PeakMemory(100, 0, ""))

    def check(root: Path, died: bool) -> None:
        saved, begun = store(root).finished(cell), store(root).begun(cell)
        assert saved is not None or died
        if saved is None:
            assert [task.position for task in begun] in ([0], [0, 1], [0, 1, 2])
            assert all(task == done(task.position) for task in begun)
        else:
            assert [episode.task_id for episode in saved.result.episodes] == ["t0", "t1", "t2"]

    assert kill_everywhere(tmp_path, prepare, work, check) >= 10


def test_the_outbox(tmp_path: Path) -> None:
    """SQLite's own writes are not Python's: the process dies between the calls, its database unclosed."""

    def points(first: int, last: int) -> list[Point]:
        return [Point("reward/mean", step / 10, 1000 + step, step) for step in range(first, last)]

    for dies_at in range(1, 40):
        path = tmp_path / str(dies_at) / "mlflow-1.sqlite"
        child = os.fork()
        if child == 0:
            box = Outbox(path)
            for step in range(dies_at):
                box.append(points(step, step + 1))
                if step % 3 == 2:
                    box.oldest()
                    if step % 2:
                        box.taken()
            os._exit(9)
        os.waitpid(child, 0)
        box, left = Outbox(path), []
        while batch := box.oldest():
            left += batch
            box.taken()
        assert left == points(left[0].step if left else dies_at, dies_at)  # type: ignore[union-attr]
        assert len(left) >= dies_at % 6  # at most what was taken is gone: after 6, 12, ... records
        box.close()
