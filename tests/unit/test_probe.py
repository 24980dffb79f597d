"""The probe: its cards and grid, its measurements against transformers, and the command up to the report."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from actors.environments.recall import SYSTEM_PROMPT
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import zero
from actors.text.chat_template import ChatFormat
from actors.types import FastWeights, WriteRequest, WriteResult
from actors.write.frozen_llama import FrozenLlama, read_model
from actors.write.writer import BatchedWriter
from cluster.cli import main
from cluster.measure.report import colour
from cluster.probe import run as probe_run
from cluster.probe.cards import read_cards, recall_cards
from cluster.probe.cell import Teacher, points_of, run_cell
from cluster.probe.examiner import Examiner, Stray
from cluster.probe.reading import Reader
from cluster.probe.report import ProbeReport, metrics, save_report
from cluster.probe.values import SUPERVISIONS, Cell, CellRun, Supervision, TextPiece
from configs.files import dump_json, parse_json
from configs.schema import FastWeightsConfig, WriteConfig

DATA = Path("tests/data/probe_cards.jsonl")
QUICKSTART = Path("tests/quickstart.yaml")
FAST = FastWeightsConfig(last_layers=2)
ADAM = WriteConfig(optimizer="adam", learning_rate=3e-3, epochs=3, batch_size=2)
PIECES = (
    TextPiece("text", "", "The mill by the river stopped turning years ago."),
    TextPiece("reply", "Is it late?", "It is not late at all."),
)

STRAYS = (
    Stray("stranger", "Where does Farid live?", 0),
    Stray("same_person", "What is the keeper's name?", 1),
    Stray("same_person", "Who cleans the mill?", 2),
)


# --- measurements, against transformers -----------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> SimpleNamespace:
    torch.set_num_threads(1)
    basis = compute_basis_from_checkpoint(tiny_model_path, FAST, seed=0)
    model: FrozenLlama = read_model(str(tiny_model_path), "float32", torch.device("cpu"))
    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_model_path))
    cards = read_cards(DATA)
    reader = Reader(model, chat.stop_token_ids)
    groups = [cards[:2], cards[2:]]
    examiner = Examiner(reader, chat, SYSTEM_PROMPT, groups, PIECES, STRAYS)
    draw = np.random.default_rng(0)
    b = {
        name: draw.normal(0, 0.05, (rows, basis.rank)).astype(np.float32)
        for name, rows in basis.d_out.items()
    }
    return SimpleNamespace(
        path=tiny_model_path,
        basis=basis,
        model=model,
        chat=chat,
        cards=cards,
        groups=groups,
        reader=reader,
        examiner=examiner,
        teacher=Teacher(reader, chat, SYSTEM_PROMPT, groups, None, 0),
        weights=FastWeights(basis.id, 1, b),
    )


# --- cells ----------------------------------------------------------------------------------------------


def cell_run(tiny: SimpleNamespace, write: WriteConfig, writes: int, each_step: bool) -> tuple[CellRun, int]:
    points = 0

    def count() -> None:
        nonlocal points
        points += 1

    untouched = tiny.examiner.examine(tiny.basis, zero(tiny.basis), 0, 0)
    writer = BatchedWriter(tiny.model, tiny.basis, write)
    parts, groups = (writer, tiny.teacher, tiny.examiner, untouched), tiny.groups[:writes]
    run = run_cell(Cell((), FAST, write), 0, tiny.basis, *parts, groups, each_step, count)
    return run, points


def test_the_steps_are_the_writers_own(tiny: SimpleNamespace) -> None:
    """An epoch has two batches here, so a step is no epoch.

    A write with fewer epochs stops earlier, no more.
    """
    cell = Cell((), FAST, ADAM)
    examples = [example for n in (1, 2) for example in tiny.teacher.examples(n, cell, ())]
    request = WriteRequest("probe", zero(tiny.basis), tuple(examples))
    config = replace(ADAM, batch_size=2)
    result, trace = BatchedWriter(tiny.model, tiny.basis, config).trace(request)
    assert len(trace) == result.steps == 6
    (whole,) = BatchedWriter(tiny.model, tiny.basis, config).write([request])
    (shorter,) = BatchedWriter(tiny.model, tiny.basis, replace(config, epochs=2)).write([request])
    for name in whole.weights.b:
        assert np.array_equal(whole.weights.b[name], trace[-1].b[name])
        assert np.array_equal(shorter.weights.b[name], trace[3].b[name])
        assert not np.array_equal(trace[4].b[name], trace[5].b[name])


def test_each_step_ends_where_the_write_does(tiny: SimpleNamespace) -> None:
    stepped, points = cell_run(tiny, ADAM, 2, each_step=True)
    plain, _ = cell_run(tiny, ADAM, 2, each_step=False)
    assert points == points_of(Cell((), FAST, ADAM), [2, 2], each_step=True) == 6
    assert [(point.write, point.step, len(point.cards)) for point in stepped.steps] == [
        (w, s, 2 * w) for w in (1, 2) for s in (1, 2, 3)
    ]
    assert stepped.after == plain.after
    assert [line.cpu_s > 0 for line in plain.writes] == [True, True]
    assert stepped.steps[-1] == plain.after[-1]
    assert plain.steps == ()
    assert plain.after[1].loss(False) < plain.after[0].loss(False)
    assert plain.writes[0].loss_after == pytest.approx(plain.after[1].loss(False), abs=1e-4)


def test_a_write_that_is_rolled_back_is_shown_and_leaves_the_state(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    diverging = replace(ADAM, optimizer="sgd", learning_rate=1e30)
    run, _ = cell_run(tiny, diverging, 2, each_step=True)
    assert [line.outcome for line in run.writes] == ["rolled_back", "rolled_back"]
    assert [(text.damage, text.kl) for text in run.after[-1].texts] == [(0.0, 0.0)] * 2
    assert [card.written for card in run.after[-1].cards] == [card.written for card in run.after[0].cards]
    assert run.steps and not math.isfinite(run.steps[0].loss(False))
    assert all(math.isfinite(value) for logged, _ in metrics(run) for value in logged.values())
    report = ProbeReport((run,), {0: tiny.cards}, {}, 100, 0)
    (table, forgetting) = report.tables()
    assert table.rows[0][-1] == "0/0/2"
    assert [row[-1] for row in forgetting.rows] == ["1", "1"]
    assert (
        sum("rolled back: " in note and "write.learning_rate=1e+30" in note for note in report.notes()) == 2
    )
    data = json.loads(
        next(path for path in save_report(report, tmp_path) if path.suffix == ".json").read_text()
    )
    assert data["runs"][0]["writes"][0]["loss_after"] is None


def test_no_epochs_are_no_write(tiny: SimpleNamespace) -> None:
    run, _ = cell_run(tiny, replace(ADAM, epochs=0), 1, each_step=True)
    assert run.writes[0].outcome == "empty"
    assert run.after[1].texts == run.after[0].texts


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_only_flashcards_are_rehearsed_and_measurements_are_counted_by_examples(
    tiny: SimpleNamespace, supervision: Supervision
) -> None:
    cards = recall_cards(4, "eval", 0)
    groups = [cards[:2], cards[2:]]
    examiner = Examiner(tiny.reader, tiny.chat, SYSTEM_PROMPT, groups, PIECES)
    teacher = Teacher(tiny.reader, tiny.chat, SYSTEM_PROMPT, groups, None, 0)
    write = replace(
        ADAM,
        epochs=1,
        batch_size=1,
        rehearsal=1,
        max_example_tokens=len(tiny.chat.system(SYSTEM_PROMPT)) + 40,
    )
    cell = Cell((), FAST, write, supervision)
    requests: list[WriteRequest] = []
    counted: list[None] = []

    class Recorded(BatchedWriter):
        def trace(self, request: WriteRequest) -> tuple[WriteResult, tuple[FastWeights, ...]]:
            requests.append(request)
            return super().trace(request)

    untouched = examiner.examine(tiny.basis, zero(tiny.basis), 0, 0)
    writer = Recorded(tiny.model, tiny.basis, write)
    parts = (writer, teacher, examiner, untouched)
    run = run_cell(cell, 0, tiny.basis, *parts, groups, True, lambda: counted.append(None))
    fresh = [teacher.examples(number, cell, ()) for number in (1, 2)]
    sizes = list(map(len, fresh))
    assert (sizes == [2, 2]) == (supervision == "flashcards"), "a card is an example only there"
    first, second = (request.examples for request in requests)
    newest = first[-1:] if supervision == "flashcards" else ()
    assert second == (*fresh[1], *newest)
    assert [line.outcome for line in run.writes] == ["accepted", "accepted"]
    promised = points_of(cell, [sizes[0], sizes[1] + len(newest)], each_step=True)
    assert len(counted) == promised == len(first) + len(second)


def test_a_write_that_is_rolled_back_after_its_last_step_counts_no_more_than_was_promised(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchedWriter, "_refusal", lambda *_: "the loss rose")
    run, points = cell_run(tiny, ADAM, 2, each_step=True)
    assert [(line.outcome, line.steps) for line in run.writes] == [("rolled_back", 3)] * 2
    assert points == len(run.steps) == points_of(Cell((), FAST, ADAM), [2, 2], each_step=True)
    assert run.after[-1].loss(False) == pytest.approx(run.after[0].loss(False)), (
        "what is in force is measured all the same"
    )


@pytest.mark.parametrize("cells", [1, 10, 11, 24])
def test_no_two_cells_of_a_plot_have_one_colour(cells: int) -> None:
    from matplotlib.colors import to_rgba

    assert len({to_rgba(colour(number, cells)) for number in range(cells)}) == cells


def test_a_run_survives_json(tiny: SimpleNamespace) -> None:
    run, _ = cell_run(tiny, ADAM, 2, each_step=True)
    assert parse_json(dump_json(run), CellRun) == run


def test_a_run_that_diverged_survives_json_too(tiny: SimpleNamespace) -> None:
    run, _ = cell_run(tiny, replace(ADAM, optimizer="sgd", learning_rate=1e30), 1, each_step=True)
    (step,) = parse_json(dump_json(run), CellRun).steps[:1]
    assert math.isnan(step.loss(False)) and step.cards[0].written.said == run.steps[0].cards[0].written.said


# --- the command ----------------------------------------------------------------------------------------


def arguments(tiny_path: Path, folder: Path, *more: str, tracking: bool = True) -> list[str]:
    settings = [
        f"model.name={tiny_path}",
        f"output_dir={folder}",
        "fast_weights.last_layers=2",
        "write.learning_rate=3e-3",
        "write.epochs=2",
        "evaluation.bootstrap_samples=100",
        f"tracking.enabled={tracking}",
    ]
    asked = ["--cards", str(DATA), "--unrelated", str(DATA), "--writes", "2", "--each-step"]
    return ["probe", str(QUICKSTART), *settings, "rollout.threads=1", *asked, *more]


def test_from_the_command_line_to_the_report_and_on(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = ["--sweep", "write.optimizer=sgd,adam"]
    assert main(arguments(tiny_model_path, tmp_path, *sweep)) == 0
    out = capsys.readouterr().out
    assert "optimizer=sgd" in out
    assert "left" in out
    (folder,) = tmp_path.glob("quickstart-probe-*")
    names = {path.name for path in folder.iterdir()}
    assert {
        "report.md",
        "report.csv",
        "report.json",
        "recall_damage.png",
        "steps.png",
        "forgetting.png",
        "probe.json",
        "cells",
    } <= names
    lines = list(csv.DictReader((folder / "report.csv").open()))
    assert [line["cell"] for line in lines if line["phase"] == "after"] == ["optimizer=sgd"] * 3 + [
        "optimizer=adam"
    ] * 3
    assert len([line for line in lines if line["phase"] == "step"]) == 8
    data = json.loads((folder / "report.json").read_text())
    assert len(data["runs"][1]["after"][2]["cards"]) == 4
    assert "reworded" in (report := (folder / "report.md").read_text())
    assert "## optimizer=adam, against each other cell" in report
    _check_mlflow(tmp_path, "probe/optimizer_adam/seed_0/em_written", points=3)

    def refuse(*_: object) -> None:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(probe_run, "run_cell", refuse)
    before = (folder / "report.json").read_text()
    assert main(arguments(tiny_model_path, tmp_path, *sweep, "--resume", str(folder))) == 0
    assert "2 of 2 cells are done already" in capsys.readouterr().out
    assert (folder / "report.json").read_text() == before

    for change, part in (
        ("--writes=4", "--writes=2, not 4"),
        ("write.batch_size=5", "write.batch_size=16, not 5"),
    ):
        assert main([*arguments(tiny_model_path, tmp_path, *sweep, "--resume", str(folder)), change]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert part in error


def test_the_progress_counts_the_examples_of_a_transcript_not_its_cards(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        "--cards",
        "recall:4",
        "--cell",
        "supervision=raw",
        "write.epochs=1",
        "write.batch_size=1",
        "fast_weights.rank=1",
    ]
    assert main(arguments(tiny_model_path, tmp_path, *more, tracking=False)) == 0
    assert "measurements: 2 of 2 in" in capsys.readouterr().out, (
        "the two cards of a write are told in one text"
    )


def _check_mlflow(folder: Path, key: str, points: int) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("engram").experiment_id])
    assert run.info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, key)] == list(range(points))
    assert "report.md" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ([], "needs --cards"),
        (["--cards", "nowhere.jsonl"], "no such file"),
        (["--cards", str(DATA), "--writes", "5"], "there are 4 cards"),
        (["--cards", str(DATA), "--resume", "tests"], "no probe ran there"),
        (["--cards", str(DATA), "--unrelated", "nowhere.txt"], "no such file"),
        (["--cards", str(DATA), "--sweep", "write.max_example_tokens=300,20"], "write.max_example_tokens=20"),
        (
            ["--cards", str(DATA), "--sweep", "supervision=raw"],
            "has no 'telling', which supervision=raw trains on",
        ),
    ],
)
def test_a_mistake_is_one_line(
    more: list[str], part: str, tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["probe", str(QUICKSTART), f"model.name={tiny_model_path}", f"output_dir={tmp_path}", *more])
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert part in error
    assert list(tmp_path.iterdir()) == []
