"""What is run, kept and run again: killed cells, a changed configuration, workers that die.

The workers are scripted.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from actors.peak_memory import PeakMemory
from cluster.common.errors import CheckpointError, SaveError
from cluster.evaluation.plan import Cell, Request, plan_cells
from cluster.evaluation.run import run_cells
from cluster.evaluation.store import CellStore, Journal, worst
from cluster.measure.rows import TaskResult
from tests.unit.cluster_cases import group, task_at
from tests.unit.comparison_cases import PEAK, Stage, comparison, plan


def done(position: int, f1: float = 0.5) -> TaskResult:
    return TaskResult.of(position, group(task_at(position), 0, rewards=[f1]))


@pytest.fixture
def store(tmp_path: Path) -> CellStore:
    return CellStore(tmp_path / "cells", {"policy": "the base model"})


@pytest.fixture(scope="module")
def cells() -> tuple[Cell, ...]:
    return plan("truncation", "tmem", seeds=(0,)).cells


def test_a_cell_survives_its_files(store: CellStore, cells: tuple[Cell, ...], tmp_path: Path) -> None:
    cell = cells[0]
    assert (store.finished(cell), store.begun(cell)) == (None, [])
    with store.journal(cell, []) as journal:
        journal.add(done(1, 0.25))
        journal.add(TaskResult.of(0, group(task_at(0), 0, finished=0, failed=1)))
    assert store.begun(cell) == journal.tasks[:1]  # what failed is to be run again
    store.finish(cell, journal.tasks, PEAK)
    saved = store.finished(cell)
    assert saved is not None
    assert [episode.task_id for episode in saved.result.episodes] == ["t1"]
    assert saved.result.failed == ("engine: out of memory",)
    assert saved.result.episodes[0].answers[0].prediction == "here"
    assert saved.peak == PEAK
    assert store.begun(cell) == journal.tasks[:1]
    store.finish(cell, journal.tasks[:1], PEAK)
    assert [path.name for path in (tmp_path / "cells").iterdir()] == [f"{cell.key}.json"]


def test_a_line_that_was_cut_off_is_run_again(
    store: CellStore, cells: tuple[Cell, ...], tmp_path: Path
) -> None:
    cell = cells[0]
    with store.journal(cell, []) as journal:
        journal.add(done(0))
        journal.add(done(1))
    path = tmp_path / "cells" / f"{cell.key}.jsonl"
    path.write_text(path.read_text()[:-20])
    begun = store.begun(cell)
    assert [task.position for task in begun] == [0]
    with store.journal(cell, begun) as again:
        again.add(done(1))
    assert [task.position for task in store.begun(cell)] == [0, 1]
    path.write_text(path.read_text()[:10])  # killed while the settings were written
    assert store.begun(cell) == []


def test_other_settings_are_refused_in_one_line(
    store: CellStore, cells: tuple[Cell, ...], tmp_path: Path
) -> None:
    cell = cells[0]
    with store.journal(cell, []):
        pass
    changed = plan("truncation", seeds=(0,), sweep=()).cells[0]
    assert store.begun(changed) == []  # the same settings, planned anew
    other = CellStore(tmp_path / "cells", {"policy": "run/step-000002 version 2"})
    said = r"was measured with policy=the base model, not run/step-000002 version 2: use that value, or"
    with pytest.raises(CheckpointError, match=said):
        other.begun(cell)
    store.finish(cell, [done(0)], PEAK)
    with pytest.raises(CheckpointError, match="was measured with policy="):
        other.finished(cell)
    (tmp_path / "cells" / f"{cell.key}.json").write_text("{}")
    said = r"is no cell of this version of Engram \(settings: Field required .*; delete it to run the cell"
    with pytest.raises(CheckpointError, match=said):
        store.finished(cell)


def test_the_content_of_a_data_file_is_part_of_the_settings(store: CellStore, tmp_path: Path) -> None:
    data = tmp_path / "talks.json"
    data.write_text("[1]")
    benchmark = tmp_path / "talks.yaml"
    benchmark.write_text(f"environment: {{name: conversation, conversation: {{path: {data}}}}}\n")
    cell = plan_cells(
        Request(Path("tests/quickstart.yaml"), (), None, ("truncation",), (str(benchmark),), (), "", (), "")
    ).cells[0]
    settings = store.settings(cell)
    assert len(settings["file environment.conversation.path"]) == 16
    assert settings["policy"] == "the base model"
    assert "output_dir" not in settings
    assert "rollout.workers" not in settings  # another machine may go on


def test_the_worst_of_several_workers() -> None:
    assert worst([PeakMemory(5, 7, ""), PeakMemory(9, 2, "")]) == PeakMemory(9, 7, "")
    assert worst([PeakMemory(5, 0, ""), PeakMemory(None, 0, "no /proc")]) == PeakMemory(None, 0, "no /proc")


def test_cells_of_one_configuration_run_on_one_set_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan("truncation", "tmem", "seal", seeds=(0,))
    stage = Stage(monkeypatch, {})
    compared = comparison(tmp_path, planned)
    assert asyncio.run(run_cells(compared, planned.cells, stage.hooks)) == {}
    assert stage.starts == 2  # seal writes with another rank and T
    assert len(stage.played) == 9
    assert stage.told == [
        word for row in ("truncation", "tmem", "seal") for word in (f"begins {row} 3", f"finished {row}")
    ]
    assert all(compared.store.finished(cell) is not None for cell in planned.cells)


def test_a_worker_that_dies_costs_its_running_episodes_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan("truncation", "tmem", seeds=(0,))
    first, second = (cell.key for cell in planned.cells)
    lanes_of_one = plan_with_one_lane(planned.cells)
    stage = Stage(monkeypatch, {(first, 2): 1})
    compared = comparison(tmp_path, planned)
    assert asyncio.run(run_cells(compared, lanes_of_one, stage.hooks)) == {}
    assert stage.starts == 2
    assert stage.told[:3] == [
        "begins truncation 3",
        "retries truncation: worker-0 died during task t2",
        "begins truncation 1",
    ]
    assert sorted(stage.played) == [
        (key, position) for key in sorted((first, second)) for position in range(3)
    ]  # none of them twice


def plan_with_one_lane(cells: Sequence[Cell]) -> list[Cell]:
    return [
        Cell(cell.benchmark, cell.variant, replace(cell.config, engine=replace(cell.config.engine, slots=1)))
        for cell in cells
    ]


def test_a_cell_that_kills_its_workers_twice_is_given_up_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan("truncation", "tmem", seeds=(0,))
    first, second = planned.cells
    stage = Stage(monkeypatch, {(first.key, 1): 9})
    compared = comparison(tmp_path, planned)
    assert asyncio.run(run_cells(compared, planned.cells, stage.hooks)) == {
        first.key: "worker-0 died during task t1"
    }
    assert compared.store.finished(first) is None
    assert compared.store.finished(second) is not None
    assert stage.starts == 3


def test_workers_that_never_start_give_up_their_cells_after_two_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan("truncation", "tmem", seeds=(0,))
    stage = Stage(monkeypatch, {}, broken_starts=range(1, 10))
    given_up = asyncio.run(run_cells(comparison(tmp_path, planned), planned.cells, stage.hooks))
    assert given_up == dict.fromkeys((cell.key for cell in planned.cells), "worker-0 did not start")
    assert stage.starts == 2


def test_a_start_that_fails_after_a_good_one_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two failed starts in a row end a batch, not two in all."""
    planned = plan("truncation", seeds=(0,))
    (cell,) = planned.cells
    stage = Stage(monkeypatch, {(cell.key, 1): 1}, broken_starts=(1, 3))
    compared = comparison(tmp_path, planned)
    assert asyncio.run(run_cells(compared, planned.cells, stage.hooks)) == {}
    assert stage.starts == 4
    assert compared.store.finished(cell) is not None


def test_the_peak_of_a_cell_forgets_what_came_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan("truncation", seeds=(0,))
    compared = comparison(tmp_path, planned)
    asyncio.run(run_cells(compared, planned.cells, Stage(monkeypatch, {}).hooks))
    finished = compared.store.finished(planned.cells[0])
    assert finished is not None
    assert finished.peak == PEAK


def test_what_is_there_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan("truncation", seeds=(0,))
    cell = planned.cells[0]
    compared = comparison(tmp_path, planned)
    with compared.store.journal(cell, []) as journal:
        journal.add(done(0))
        journal.add(done(2))
    stage = Stage(monkeypatch, {})
    asyncio.run(run_cells(compared, planned.cells, stage.hooks))
    assert stage.played == [(cell.key, 1)]
    saved = json.loads((tmp_path / "cells" / f"{cell.key}.json").read_text())
    assert [episode["task_id"] for episode in saved["result"]["episodes"]] == ["t0", "t1", "t2"]


def test_an_episode_that_failed_is_run_again_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan("truncation", seeds=(0,))
    (cell,) = planned.cells
    stage = Stage(monkeypatch, {}, failing={(cell.key, 1): 1})
    compared = comparison(tmp_path, planned)
    asyncio.run(run_cells(compared, planned.cells, stage.hooks))
    first = compared.store.finished(cell)
    assert first is not None
    assert (len(first.result.episodes), first.result.failed) == (2, ("engine: out of memory",))
    stage.played.clear()
    asyncio.run(run_cells(compared, planned.cells, stage.hooks))
    assert stage.played == [(cell.key, 1)]
    again = compared.store.finished(cell)
    assert again is not None
    assert ([episode.task_id for episode in again.result.episodes], again.result.failed) == (
        ["t0", "t1", "t2"],
        (),
    )


def test_the_peak_of_a_cell_is_that_of_all_its_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan("truncation", seeds=(0,))
    (cell,) = planned.cells
    compared = comparison(tmp_path, planned)
    with compared.store.journal(cell, []) as journal:
        journal.add(done(0))
    compared.store.finish(
        cell,
        [*journal.tasks, TaskResult.of(1, group(task_at(1), 0, finished=0, failed=1))],
        PeakMemory(900, 0, ""),
    )
    asyncio.run(run_cells(compared, planned.cells, Stage(monkeypatch, {}).hooks))
    finished = compared.store.finished(cell)
    assert finished is not None
    assert finished.peak == PeakMemory(900, 0, "")


def test_a_full_disk_is_one_line() -> None:
    with pytest.raises(SaveError) as raised, Journal(Path("/dev/full"), []) as journal:
        journal.add(done(0))
    cure = "what was saved before is whole: make room there and go on with --resume"
    assert str(raised.value) == f"/dev/full: cannot be written (No space left on device); {cure}"
    assert journal.tasks == []


def test_a_full_disk_ends_an_evaluation_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SaveError("no room")

    stage = Stage(monkeypatch, {})
    monkeypatch.setattr(Journal, "add", full)
    planned = plan("truncation", seeds=(0,))
    with pytest.raises(SaveError):
        asyncio.run(run_cells(comparison(tmp_path, planned), planned.cells, stage.hooks))
    assert stage.starts == 1
