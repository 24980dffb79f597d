"""``evaluate`` from the command line to its exit status, with scripted workers: what a user sees fail."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.fast_weights.basis import BasisError, load_basis, save_basis
from actors.fast_weights.delta import Basis
from cluster.assistant.export import export
from cluster.cli import main
from cluster.common.errors import CheckpointError
from cluster.evaluation import prepare
from cluster.evaluation.plan import Request
from cluster.evaluation.prepare import Comparison, prepare_comparison
from cluster.measure.rows import RowResult, save_row, score_episode
from cluster.runs.checkpoint import START, Checkpoint, save_checkpoint
from cluster.runs.run_lock import held
from cluster.train.prepare import BASIS_FILE, run_basis
from configs.load import load_config, to_yaml
from configs.schema import RunConfig
from tests.unit.cluster_cases import task_at, trajectory
from tests.unit.comparison_cases import Counts, Stage
from tests.unit.tokenizer_families import with_dated_template

QUICKSTART = Path("tests/quickstart.yaml")
SMALL = (
    "evaluation.tasks=2",
    "evaluation.bootstrap_samples=100",
    "tracking.enabled=false",
    "episodes.per_evaluation=0",
)


@pytest.fixture
def settings(tiny_model_path: Path, tmp_path: Path) -> tuple[str, ...]:
    return (*SMALL, f"model.name={tiny_model_path}", f"output_dir={tmp_path / 'runs'}")


def prepared(
    settings: tuple[str, ...], rows: tuple[str, ...], seeds: tuple[int, ...] = (), resume: str = ""
) -> Comparison:
    return prepare_comparison(Request(QUICKSTART, settings, None, rows, (), seeds, "", (), resume))


def complaint(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    assert main(["evaluate", *arguments]) == status
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_cell_without_a_finished_episode_is_no_success(
    settings: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing: Counts = {("recall--tmem--seed0", position): 1 for position in range(2)}
    stage = Stage(monkeypatch, {}, failing=failing)
    text = complaint(capsys, 1, str(QUICKSTART), *settings, "--rows", "truncation,tmem")
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    count = "1 of 2 cells could not be measured, the first recall--tmem--seed0"
    why = "all its 2 episodes failed, the first with engine: out of memory"
    cure = f"mend the cause, then --resume {folder} runs them again"
    assert text == f"error: {count}: {why}; {cure}\n"
    assert (folder / "report" / "report.md").is_file()
    stage.played.clear()
    assert main(["evaluate", "--resume", str(folder)]) == 0
    assert sorted(stage.played) == [("recall--tmem--seed0", 0), ("recall--tmem--seed0", 1)]
    assert "1 done before" in capsys.readouterr().out
    assert {path.suffix for path in (folder / "cells").iterdir()} == {".json"}


def test_a_cell_that_was_given_up_is_no_success(
    settings: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fatal: Counts = {("recall--truncation--seed0", 1): 9}
    Stage(monkeypatch, fatal)
    text = complaint(capsys, 1, str(QUICKSTART), *settings, "--rows", "truncation,tmem")
    problem = "the first recall--truncation--seed0: worker-0 died during task recall-eval-0-1; mend the cause"
    assert f"error: 1 of 2 cells could not be measured, {problem}" in text
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    report = (folder / "report" / "report.md").read_text()
    assert "- recall, truncation: NOT MEASURED, seed 0: worker-0 died during task recall-eval-0-1" in report


def test_a_mistake_in_the_fast_weights_leaves_no_folder(
    settings: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ("fast_weights.basis=data", f"fast_weights.calibration_path={tmp_path / 'none.txt'}")
    complaint(capsys, 1, str(QUICKSTART), *settings, *missing, "--rows", "truncation")
    runs = tmp_path / "runs"
    assert not runs.exists() or not [path for path in runs.iterdir() if path.is_dir()]


def test_an_evaluation_that_runs_is_left_alone_by_a_second_one(
    settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared(settings, ("truncation", "tmem", "seal")).folder
    before = files_of(folder)
    with held(folder):
        text = complaint(
            capsys, 1, str(QUICKSTART), *settings, "--rows", "seal,tmem", "--resume", str(folder)
        )
    assert f"{folder} is in use by process" in text
    assert files_of(folder) == before


def test_other_rows_leave_the_bases_that_are_there(settings: tuple[str, ...]) -> None:
    first = prepared(settings, ("tmem", "seal"))
    ids = {path: load_basis(path).id for path in first.bases.values()}
    again = prepared(settings, ("seal",), resume=str(first.folder))
    assert {path: load_basis(path).id for path in ids} == ids
    (seal,) = again.plan.cells
    assert again.bases[seal.key] == first.bases[seal.key]
    assert load_basis(again.bases[seal.key]).rank == seal.config.fast_weights.rank


def test_a_folder_that_cannot_be_written_is_one_line(
    settings: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for place, reason in (("/proc/nothere", "No such file or directory"), (str(file), "Not a directory")):
        text = complaint(capsys, 2, str(QUICKSTART), *settings, f"output_dir={place}", "--rows", "truncation")
        assert text.startswith(f"error: output_dir={place}: cannot be written ({reason})")
        cure = "make room or get the right to it, or give another output_dir=FOLDER"
        assert text.endswith(f"; {cure}\n")


@pytest.mark.parametrize("rows", ["{mine},truncation", "truncation,{mine}"])
def test_a_memory_that_is_not_there_is_found_at_once(
    rows: str, settings: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("memory: {policy: custom, custom: 'no_such_parts:build'}\n")
    text = complaint(capsys, 2, str(QUICKSTART), *settings, "--rows", rows.format(mine=mine))
    assert "memory.custom=no_such_parts:build: there is no module no_such_parts" in text


def test_a_random_a_is_drawn_by_seed_for_a_custom_memory_too(
    settings: tuple[str, ...], tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("memory: {policy: custom, custom: 'builtins:print'}\n")
    found = prepared((*settings, "fast_weights.basis=random"), (str(mine), "truncation"), seeds=(0, 1)).bases
    names = {key: path.name for key, path in found.items()}
    assert names["recall--mine--seed0"] != names["recall--mine--seed1"]
    assert (
        names["recall--truncation--seed0"]
        == names["recall--truncation--seed1"]
        == names["recall--mine--seed0"]
    )


def test_a_checkpoint_brings_the_basis_that_its_policy_learnt_with(
    settings: tuple[str, ...], tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of other fast weights gets its own basis. A damaged basis is found before any worker starts."""
    run = tmp_path / "old"
    saved = run / "checkpoints" / "step-000002"
    saved.mkdir(parents=True)
    config = load_config(QUICKSTART, settings)
    (saved / "config.yaml").write_text(to_yaml(config))
    save_basis(run_basis(tiny_model_path, config), run / BASIS_FILE)
    monkeypatch.setattr(prepare, "load_played", lambda path: Checkpoint(path, replace(START, version=2)))
    request = Request(QUICKSTART, settings, saved, ("tmem", "seal"), (), (), "", (), "")
    compared = prepare_comparison(request)
    assert compared.bases["recall--tmem--seed0"] == run / BASIS_FILE
    assert compared.bases["recall--seal--seed0"].parent == compared.folder / "bases"
    assert (compared.policy_path, compared.version) == (saved / "learner" / "model", 2)
    (run / BASIS_FILE).write_bytes(b"")
    with pytest.raises(BasisError):
        prepare_comparison(request)


def test_an_exported_checkpoint_has_a_card_and_can_be_evaluated(
    settings: tuple[str, ...], tiny_model_path: Path, tmp_path: Path
) -> None:
    run, exported = tmp_path / "old-1", tmp_path / "exported"
    config = load_config(QUICKSTART, settings)

    async def save_learner(folder: Path) -> None:
        shutil.copytree(tiny_model_path, folder / "model")
        (folder / "model" / "model.safetensors").chmod(0o600)  # as safetensors makes it

    state = replace(START, step=2, version=2)
    saved = asyncio.run(save_checkpoint(run, state, to_yaml(config), save_learner, 1))
    save_basis(run_basis(tiny_model_path, config), run / BASIS_FILE)
    for version, label in ((0, "TMEM before"), (9, "TMEM of a later step")):
        save_row(RowResult(label, version, (), ("engine: gone",)), run / "evaluation" / f"{version}.json")
    before = os.umask(0o022)
    try:
        export(run, exported, "")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in exported.rglob("*") if path.is_file()} == {0o644}
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "0 supervised steps, 2 RL steps" in card
    assert "| TMEM before | 0 | 0 | 1 |" in card and "later step" not in card
    assert f"| write.epochs | {config.write.epochs} |" in card and "engram chat exported" in card
    (named,) = re.findall(r"^engram evaluate (\S+) checkpoint=exported$", card, re.MULTILINE)
    assert load_config(tmp_path / named, []) == config

    request = Request(QUICKSTART, settings, exported, ("tmem",), (), (), "", (), "")
    compared = prepare_comparison(request)
    assert (compared.policy_path, compared.version, compared.step) == (exported, 2, 2)
    assert compared.bases["recall--tmem--seed0"] == exported / "engram" / BASIS_FILE
    assert saved.title == "old-1/step-000002" and compared.checkpoint is not None
    assert compared.checkpoint.title == "exported (exported)"
    (exported / "engram" / "state.json").unlink()  # as an older version made it
    with pytest.raises(CheckpointError, match=f"export it again, or evaluate with model.name={exported}"):
        prepare_comparison(request)


def test_an_evaluation_keeps_the_day_that_its_model_is_told(
    settings: tuple[str, ...], tiny_model_path: Path, tmp_path: Path
) -> None:
    """A template may write the day into prompts: a resumed evaluation must ask under the same one."""
    model = with_dated_template(tiny_model_path, tmp_path / "dated")
    settings = (*settings, f"model.name={model}")
    today = dt.date.today().isoformat()
    first = prepared(settings, ("tmem",))
    assert {cell.config.model.date for cell in first.plan.cells} == {today} == {first.plan.base.model.date}
    first.config_path.write_text(first.config_path.read_text().replace(today, "2026-01-02"))
    again = prepared(settings, ("tmem",), resume=str(first.folder))
    assert {cell.config.model.date for cell in again.plan.cells} == {"2026-01-02"}
    assert load_config(again.config_path, []).model.date == "2026-01-02"


def test_what_is_measured_of_the_model_does_not_depend_on_the_seeds_asked_for(
    settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seeds, then one of them alone: its cell must find the basis that it began with.

    The sensitivity is measured under the seed that run_basis gets.
    """
    seeds: list[int] = []

    def noted(model: Path, config: RunConfig) -> Basis:
        seeds.append(config.seed)
        return run_basis(model, config)

    monkeypatch.setattr(prepare, "run_basis", noted)
    prepared(settings, ("tmem",), seeds=(1, 2))
    prepared(settings, ("tmem",), seeds=(2,))
    prepared((*settings, "seed=4"), ("tmem",))
    assert seeds == [0, 0, 4]


def test_figures_of_numpy_can_be_saved() -> None:
    played = trajectory(task_at(0), 0, 0.5)
    answer = played.outcome.answers[0]
    numbers = {"f1": np.float32(0.5), "em": np.int64(0)}
    outcome = replace(
        played.outcome,
        reward=np.float32(0.5),
        reward_parts=numbers,
        answers=(replace(answer, scores=numbers),),
    )  # type: ignore[arg-type]
    score = score_episode(replace(played, outcome=outcome))
    assert json.loads(json.dumps([score.reward, score.reward_parts, score.answers[0].scores])) == [
        0.5,
        {"f1": 0.5, "em": 0.0},
        {"f1": 0.5, "em": 0.0},
    ]
