"""A disk that is full at any operation: one line, what was saved before is whole, the next save works.

Once with each operation refused in turn (killed.py), and once on a real full disk: a tmpfs of 256 KiB, where
the system allows a mount. There the writers in C and Rust (SQLite, safetensors) meet it too.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors.fast_weights.basis import make_basis, save_basis
from actors.types import FastWeights
from cluster.assistant.memory_file import SavedMemory, load_memory, save_memory
from cluster.assistant.opening import AssistantError, Opening
from cluster.cli import main
from cluster.common.errors import SaveError
from cluster.evaluation.plan import Request, plan_cells
from cluster.evaluation.store import CellStore
from cluster.measure.rows import RowResult, load_row, save_row
from cluster.runs.checkpoint import score_checkpoint, score_of
from cluster.runs.resume import note_run_id, run_id_of
from cluster.runs.run_folders import create_run, finished_steps, mark_finished, runs_of
from cluster.tracking.figure_file import FigureFile, read_figures
from cluster.tracking.outbox import Outbox, Point
from cluster.tracking.tracker import Tracker
from configs.files import recover_folder, write_bytes
from configs.schema import RunConfig
from tests.unit.killed import fill_everywhere
from tests.unit.rollout_fakes import MODULE
from tests.unit.test_killed_saves import checkpoint, done, theta

NO_ROOM = "No space left on device"


def row(root: Path, label: str) -> None:
    save_row(RowResult.of(label, [done(0)]), root / "evaluation" / "before.json")


def opening_at(folder: Path, rows: int = 4) -> Opening:
    basis = make_basis("random", {MODULE: torch.arange(6.0).reshape(2, 3)}, {MODULE: rows}, False)
    model: Any = SimpleNamespace(fingerprint="tiny", vocab_size=1000, path=folder)  # all that is asked of it
    return Opening("tiny", RunConfig(), model, basis, "Be brief.")


def memory(root: Path, number: int, rows: int = 4) -> None:
    opening = opening_at(root, rows)
    weights = FastWeights(opening.basis.id, number, {MODULE: np.full((rows, 2), float(number), np.float32)})
    save_memory(SavedMemory(weights, "", (number,), (), None), opening, root / "ada", overwrite=True)


def test_a_checkpoint_and_its_score(tmp_path: Path) -> None:
    def check(run: Path) -> None:
        assert theta(run) in ((4, "old"), (6, "new"))
        assert not list((run / "checkpoints").glob(".*"))  # half of a checkpoint would keep the disk full
        checkpoint(run, 8, "end")
        assert theta(run) == (8, "end")

    save_new = partial(checkpoint, step=6, content="new")
    prepare = partial(checkpoint, step=4, content="old")
    assert fill_everywhere(tmp_path, prepare, save_new, SaveError, check) >= 20

    def score(run: Path) -> None:
        score_checkpoint(run, 4, "f1", 0.5, tasks=1, keep=2)

    def check_score(run: Path) -> None:
        assert score_of(run / "checkpoints" / "step-000004") in (None, ("f1", 0.5))
        assert theta(run) == (4, "old")

    assert fill_everywhere(tmp_path, prepare, score, SaveError, check_score) >= 3


def test_a_conversation(tmp_path: Path) -> None:
    def check(root: Path) -> None:
        recover_folder(root / "ada")
        assert load_memory(root / "ada", opening_at(root)).context_ids in ((1,), (2,))
        memory(root, 3)
        assert load_memory(root / "ada", opening_at(root)).context_ids == (3,)

    work = partial(memory, number=2)
    assert fill_everywhere(tmp_path, partial(memory, number=1), work, AssistantError, check) >= 6


def test_a_row_and_a_cell(tmp_path: Path) -> None:
    def check(root: Path) -> None:
        assert load_row(root / "evaluation" / "before.json").label in ("old", "new")

    assert (
        fill_everywhere(tmp_path, partial(row, label="old"), partial(row, label="new"), SaveError, check) >= 3
    )
    request = Request(Path("tests/quickstart.yaml"), (), None, ("truncation",), ("recall",), (0,), "", (), "")
    cell = plan_cells(request).cells[0]

    def tasks(root: Path, first: int, last: int) -> None:
        store = CellStore(root / "cells", {"policy": "the base model"})
        with store.journal(cell, store.begun(cell)) as journal:
            for number in range(first, last + 1):
                journal.add(done(number))

    def check_cell(root: Path) -> None:
        begun = CellStore(root / "cells", {"policy": "the base model"}).begun(cell)
        assert begun in [[done(number) for number in range(1, last + 1)] for last in (1, 2, 3)]
        tasks(root, len(begun) + 1, 4)

    work = partial(tasks, first=2, last=3)
    assert fill_everywhere(tmp_path, partial(tasks, first=1, last=1), work, SaveError, check_cell) >= 5


def test_the_notes_of_a_run(tmp_path: Path) -> None:
    """Its folder, its MLflow run, its end. The command line makes one line of an OSError (test_cli.py)."""

    def end(root: Path) -> None:
        (run,) = runs_of(root, "trial")
        note_run_id(run, "abc")
        mark_finished(run, 3)

    def check(root: Path) -> None:
        (run,) = runs_of(root, "trial")
        assert (run_id_of(run), finished_steps(run)) in (("", -1), ("abc", -1), ("abc", 3))
        end(root)

    def begin(root: Path) -> None:
        create_run(root, "trial")

    assert fill_everywhere(tmp_path, begin, end, OSError, check) >= 6

    def check_begun(root: Path) -> None:
        create_run(root, "trial")
        assert len(runs_of(root, "trial")) <= 2

    assert fill_everywhere(tmp_path, lambda root: None, begin, OSError, check_begun) >= 4


def test_figures_and_the_outbox_never_end_a_run(tmp_path: Path) -> None:
    def figures(root: Path) -> None:
        file = FigureFile(Tracker(), root)
        for step in (1, 2, 3):
            file.log({"reward/mean": step / 10}, step)

    def check(root: Path) -> None:
        assert [line.step for line in read_figures(root)] in ([], [1], [1, 2], [1, 2, 3])

    assert fill_everywhere(tmp_path, lambda root: None, figures, None, check) == 3


# --- a real one -------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left: int = 0) -> Path:
    """Leave ``left`` bytes free on ``disk``, a multiple of 4 KiB. Deleting the returned file makes room."""
    usage = os.statvfs(disk)
    file = disk / "filler"
    file.write_bytes(b"x" * (usage.f_bavail * usage.f_bsize - left))
    return file


@pytest.mark.parametrize("left", [0, 8192, 65536])
@pytest.mark.parametrize(
    ("save_it", "refusal"),
    [
        (lambda disk, size: checkpoint(disk, 6, "new" * size), SaveError),
        (lambda disk, size: memory(disk, 2, rows=size * 20), AssistantError),
        (lambda disk, size: row(disk, "new" * size * 30), SaveError),
        (lambda disk, size: write_bytes(disk / "x", b"x" * size * 90), OSError),
        (lambda disk, size: save_basis(wide_basis(size * 10), disk / "basis"), OSError),
    ],
    ids=["checkpoint", "conversation", "row", "file", "basis"],
)
def test_a_disk_that_is_really_full(
    disk: Path, save_it: Callable[[Path, int], None], refusal: type[Exception], left: int
) -> None:
    checkpoint(disk, 4, "old")
    memory(disk, 1)
    row(disk, "old")
    filler = fill(disk, left)
    with pytest.raises(refusal, match=NO_ROOM) as raised:
        save_it(disk, 2000)
    assert "\n" not in str(raised.value)
    assert theta(disk) == (4, "old")
    assert load_memory(disk / "ada", opening_at(disk)).context_ids == (1,)
    assert load_row(disk / "evaluation" / "before.json").label == "old"
    used = os.statvfs(disk)
    assert used.f_bavail * used.f_bsize >= left  # nothing half-written is left
    filler.unlink()
    save_it(disk, 10)


def wide_basis(width: int) -> Any:
    return make_basis("random", {MODULE: torch.zeros(2, width)}, {MODULE: 4}, False)


def test_figures_and_the_outbox_go_on_when_there_is_room_again(disk: Path) -> None:
    box, file = Outbox(disk / "mlflow-1.sqlite"), FigureFile(Tracker(), disk)
    long = {f"learner/figure_{number}": 0.5 for number in range(200)}
    steps = iter(range(1, 1000))

    def log() -> None:
        step = next(steps)
        box.append([Point("loss", 0.5, 1000 + step, step)])
        file.log(long, step)

    log()
    filler = fill(disk)
    for _ in range(20):
        log()
    filler.unlink()
    log()
    assert [point.step for point in box.oldest() if isinstance(point, Point)] == list(range(1, 23))
    logged = [line.step for line in read_figures(disk) if line.figures == long]
    assert logged[0] == 1 and logged[-1] == 22  # the last one is not glued to what was cut off


def test_a_command_says_it_in_one_line(
    disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run(disk, "trial")
    (run / "config.yaml").write_text("seed: 0\n")
    monkeypatch.setattr("cluster.runs.wanted_workers.is_held", lambda folder: True)
    fill(disk)
    assert main(["scale", "4", "--run", str(run)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and NO_ROOM in shown and shown.count("\n") == 1
    assert not (run / "workers.json").exists()
