"""The rows of a run's table, and the end of a tracked run."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster.common.display import Display
from cluster.common.errors import AllFinished, UnloadableError, WorkerLost
from cluster.measure.rows import load_row
from cluster.runs.checkpoint import load_checkpoint
from cluster.train import run
from cluster.train.prepare import RunFolder, Start
from cluster.train.scoreboard import Scoreboard, evaluation_rows
from configs.schema import EvaluationConfig, MemoryConfig, RunConfig, WarmStartConfig
from tests.unit.loop_cases import Recorder
from tests.unit.test_killed_saves import checkpoint
from tests.unit.test_run_stages import Seat, observers_of, spec_of


def test_a_row_is_measured_once_and_again_after_it_was_forgotten(tmp_path: Path) -> None:
    seat = Seat()
    observers, tracker, _ = observers_of(seat)
    scores = Scoreboard(spec_of(RunConfig()), RunFolder(tmp_path), observers)
    for _ in range(2):
        asyncio.run(scores.measure("before", 0, [seat]))
    assert seat.calls == [f"t{number}: TMEM before" for number in range(3)]
    assert load_row(tmp_path / "evaluation" / "before.json").label == "TMEM before"
    assert tracker.steps[0]["eval/before/f1"] == 0.5
    scores.forget("before")
    asyncio.run(scores.measure("before", 0, [seat]))
    assert len(seat.calls) == 6


def test_the_summary_has_the_held_out_score_of_the_trained_policy_alone(tmp_path: Path) -> None:
    """Before RL it is what the warm start made, where there was one."""
    for warm_steps, first in ((0, "before"), (9, "after_warm_start")):
        logged = []
        for key in ("memory_off", "before", "after_warm_start", "after_rl"):
            observers, tracker, _ = observers_of(Seat())
            config = RunConfig(warm_start=WarmStartConfig(steps=warm_steps))
            folder = RunFolder(tmp_path / str(warm_steps) / key)
            asyncio.run(Scoreboard(spec_of(config), folder, observers).measure(key, 0, [Seat()]))
            logged += [key] if tracker.steps[0].get("Summary/held_out_f1") == 0.5 else []
        assert logged == [first, "after_rl"]


def test_a_run_without_memory_has_no_second_row_with_its_memory_off(tmp_path: Path) -> None:
    memory_off = MemoryConfig(policy="truncation")
    assert "memory_off" in evaluation_rows(RunConfig())
    assert "memory_off" not in evaluation_rows(RunConfig(memory=memory_off))
    seat = Seat()
    observers, _, _ = observers_of(seat)
    scores = Scoreboard(spec_of(RunConfig(memory=memory_off)), RunFolder(tmp_path), observers)
    asyncio.run(scores.measure("memory_off", 0, [seat]))
    assert seat.calls == []


def test_control_rows_are_the_runs_memory_with_other_cards() -> None:
    config = replace(RunConfig(), evaluation=EvaluationConfig(control_rows=True))
    rows = evaluation_rows(config)
    assert {key: rows[key].memory for key in ("oracle", "other_cards")} == {
        "oracle": replace(config.memory, control="oracle"),
        "other_cards": replace(config.memory, control="other_cards"),
    }
    assert not {"oracle", "other_cards"} & set(evaluation_rows(RunConfig()))
    summary = replace(config, memory=MemoryConfig(policy="summary"))
    assert "oracle" not in evaluation_rows(summary)  # it writes no flashcards


def test_a_control_that_the_environment_cannot_make_is_left_out_and_said(tmp_path: Path) -> None:
    seat, environment = Seat(), SimpleNamespace(name="recall", demonstrate_flashcards=print)
    observers, _, output = observers_of(seat)
    config = replace(RunConfig(), evaluation=EvaluationConfig(control_rows=True))
    spec = replace(spec_of(config), environment=environment)
    scores = Scoreboard(spec, RunFolder(tmp_path), observers)
    for key in ("oracle", "other_cards"):
        asyncio.run(scores.measure(key, 5, [seat]))
    assert seat.calls == [f"t{number}: oracle: gold cards" for number in range(3)]
    assert "no row 'control: other cards': the environment recall has no questions about" in output.getvalue()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (WorkerLost("worker-0 died"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (asyncio.CancelledError(), "KILLED"),
    ],
    ids=["done", "failed", "Ctrl-C", "SIGTERM"],
)
def test_the_tracked_run_ends_with_the_status_of_the_run(error: BaseException | None, status: str) -> None:
    statuses: list[str] = []
    tracker: Any = SimpleNamespace(finish=statuses.append)
    output = io.StringIO()
    expected = nullcontext() if error is None else pytest.raises(type(error))
    with expected, run.ending(tracker, Display(Console(file=output, width=160))):
        logging.getLogger("cluster.tracking").warning("the store is slow")
        if error is not None:
            raise error
    assert statuses == [status]
    assert output.getvalue() == "the store is slow\n"


@pytest.mark.parametrize(("resume", "step", "run_id"), [("auto", 2, "abc"), ("x", 4, "abc"), ("x", 2, "")])
def test_a_user_who_goes_back_by_name_gets_a_new_mlflow_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    resume: str,
    step: int,
    run_id: str,
) -> None:
    """Where the newest checkpoint is damaged, ``auto`` goes back too: its steps are made again."""
    for saved in (2, 4):
        checkpoint(tmp_path, saved, "x")
    opened = []

    def open_run(
        config: RunConfig, output: Path, name: str, file: Path, resumed: str, from_step: int
    ) -> Recorder:
        opened.append((resumed, from_step))
        return Recorder()

    monkeypatch.setattr(run, "start_tracking", open_run)
    loaded = load_checkpoint(tmp_path / "checkpoints" / f"step-{step:06d}")
    start = Start(loaded, replace(loaded.state, tracking_run_id="abc"), tmp_path)
    run._track(RunConfig(resume=resume), RunFolder(tmp_path), start)
    assert opened == [(run_id, step)]
    said = [line for line in caplog.messages if "go to a new MLflow run" in line]
    assert len(said) == (run_id == "")


@pytest.mark.parametrize("resume", ["auto", "its run", "/runs/x/checkpoints/step-000004"])
def test_a_checkpoint_that_cannot_be_loaded_is_passed_over_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], resume: str, tmp_path: Path
) -> None:
    """With auto or a run the run goes on from the next one; a checkpoint that was named ends it."""
    if resume == "its run":
        (tmp_path / "config.yaml").write_text("")
        resume = str(tmp_path)
    damaged, asked = Path("/runs/x/checkpoints/step-000004"), list[list[Path]]()

    def prepare(_: RunConfig, refused: list[Path], say: Callable[[str], None]) -> tuple[str]:
        asked.append(list(refused))
        return ("older",) if refused else ("newer",)

    async def train(which: str, _: Display) -> None:
        if which == "newer":
            raise UnloadableError(damaged, "learner.json: not a learner checkpoint")

    monkeypatch.setattr(run, "prepare_training", prepare)
    monkeypatch.setattr(run, "train", train)
    config = RunConfig(resume=resume)
    if "checkpoints" not in resume:
        run.train_config(config, Display())
        assert asked == [[], [damaged]]
        assert (
            f"passes over a checkpoint: {damaged} cannot be loaded: learner.json" in capsys.readouterr().out
        )
    else:
        with pytest.raises(UnloadableError, match="step-000004 cannot be loaded"):
            run.train_config(config, Display())


def test_where_all_runs_are_finished_it_says_so_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(_: RunConfig, refused: list[Path], say: Callable[[str], None]) -> None:
        raise AllFinished("resume=auto: nothing is left to do")

    monkeypatch.setattr(run, "prepare_training", nothing)
    run.train_config(RunConfig(resume="auto"), Display())
    assert capsys.readouterr().out == "resume=auto: nothing is left to do\n"
