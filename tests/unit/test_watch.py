"""A run is watched from its folder alone: its figures, its newest episodes, its end."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from actors.types import Answer, Outcome, Timings
from cluster.cli import main
from cluster.inspection.record import FOLDER, EpisodeRecord, Origin, save
from cluster.inspection.watch import look, spark, view
from cluster.inspection.watch import watch as follow
from cluster.runs.run_folders import mark_finished
from cluster.runs.run_lock import held
from cluster.tracking.figure_file import FIGURES, FigureFile, read_figures
from cluster.tracking.tracker import Tracker
from configs.load import load_config, to_yaml

QUICKSTART = Path("tests/quickstart.yaml")


def record(step: int, reward: float, label: str = "", said: str = "Lisbon", number: int = 0) -> EpisodeRecord:
    source = "evaluation" if label else "train"
    origin = Origin("r-1", source, label, step, "worker-0", "tiny", "parametric", "settings.yaml")
    answer = Answer("Where is Nora?", ("Lisbon",), said, "recall", {"f1": reward})
    return EpisodeRecord(
        origin=origin,
        task_id="recall-0-1",
        environment="recall",
        episode_id=f"{label or 'train'}-{step}.{number}",
        policy_version=step,
        basis_id="",
        segments=(),
        writes=(),
        memory_events={},
        outcome=Outcome(reward, {}, (answer,)),
        siblings=(),
        stop_reason="done",
        timings=Timings(1.0, 0.5, 0.5, 0.0, 0.0, 0.0),
        ended=0.0,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "r-1"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(load_config(QUICKSTART, ["train.steps=40"])))
    figures = FigureFile(Tracker(), folder)
    figures.log({"eval/before/f1": 0.125}, 0)
    for step, reward in enumerate((0.1, 0.3, 0.2), start=1):
        figures.log(
            {"reward/mean": reward, "reward/told_elsewhere": 0.25, "fast_weights/accepted": 7.0}, step
        )
    figures.log({"fast_weights/empty": 1.0, "fast_weights/rolled_back": 0.0}, 3)
    figures.log({"timeline/worker_write": 0.75, "timeline/worker_idle": 0.25}, 3)
    save(record(3, 0.5), folder / FOLDER)
    return folder


def shown(folder: Path, width: int = 80) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(view(look(folder), width))
    return output.getvalue()


def test_a_look_at_a_run_tells_how_it_goes(run: Path) -> None:
    with held(run):
        text = shown(run)
    for said in (
        "r-1 · running · step 3 of 40 · last figures 0 s ago",
        "▁█▅ 0.200 (0.100 to 0.300)",
        "held-out  before F1 12.5 %",
        "writes    7 accepted, 1 empty, 0 rolled back",
        "leak      told_elsewhere 0.250",
        "write 75 %  idle 25 %",
        "recall-0-1",
    ):
        assert said in text, text
    assert max(map(len, text.splitlines())) <= 80
    assert "not running" in shown(run)
    mark_finished(run, 40)
    assert "r-1 · finished" in shown(run)


def test_steps_that_a_resume_took_back_are_not_shown(run: Path) -> None:
    figures = FigureFile(Tracker(), run)
    figures.log({"warm_start/loss": 1.0}, 30)
    figures.log({"eval/during/f1": 0.5}, 3)
    figures.log({"reward/mean": 0.4, "fast_weights/accepted": 5.0}, 2)
    text, figures_now = shown(run), look(run).figures
    assert "step 2 of 40" in text and " 0.400 (0.100 to 0.400)" in text and "writes    5 accepted" in text
    assert "held-out  before F1 12.5 %\n" in text and "rolled back" in text
    assert figures_now["warm_start/loss"] == {30: 1.0} and "timeline/worker_write" not in figures_now


def test_without_rl_steps_no_step_is_told(run: Path) -> None:
    (run / FIGURES).unlink()
    assert "r-1 · not running\n" in shown(run).replace(" \n", "\n")
    FigureFile(Tracker(), run).log({"warm_start/loss": 1.0}, 5)
    text = shown(run)
    assert "r-1 · not running · last figures" in text and "warm start, loss" in text


def test_an_evaluation_tells_its_cells(run: Path) -> None:
    (run / "cells").mkdir()
    (run / "cells" / "recall--off--seed0.json").write_text("{}")
    (run / "cells" / "recall--off--seed0.jsonl").write_text("{}\n{}\n")
    (run / "cells" / "recall--tmem--seed0.jsonl").write_text("{}\n{}\n{}\n")
    text = shown(run)
    assert "cells     1 finished, recall--tmem--seed0 at 2 tasks" in text and "step 3 of 40" not in text
    assert "r-1 · not running" in text
    (run / "report").mkdir()
    (run / "report" / "report.json").write_text("{}")
    assert "r-1 · finished" in shown(run)


def test_held_out_scores_are_those_of_rows_and_not_of_the_training(run: Path) -> None:
    """A training step has an F1 among its reward's parts. Environments without answers have no F1."""
    figures = FigureFile(Tracker(), run)
    figures.log({"reward/f1": 0.9, "eval/before/reward": 0.2, "eval/after_rl/f1_home": 0.7}, 3)
    figures.log({"eval/after_rl/reward": 0.625}, 3)
    assert "held-out  before F1 12.5 %, after_rl reward 0.625\n" in shown(run)


def test_newest_episodes_stay_whole_in_a_narrow_terminal(run: Path) -> None:
    text = shown(run, width=30)
    for cell in ("recall-0-1", "F1 0.5", "writes 0/0/0"):
        assert cell in text
    assert max(map(len, text.splitlines())) <= 30


def test_the_command_shows_the_newest_run_once_where_there_is_no_terminal(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", "--output-dir", str(run.parent)]) == 0
    assert main(["watch", str(run), "--once"]) == 0
    assert capsys.readouterr().out.count("r-1 · not running · step 3 of 40") == 2
    assert main(["watch", str(run / "nothing")]) == 2
    assert "is no run's folder" in capsys.readouterr().err


def test_a_live_view_ends_with_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([True, True, False])
    monkeypatch.setattr("cluster.inspection.watch.is_held", lambda folder: next(looks))
    monkeypatch.setattr("cluster.inspection.watch._EVERY_S", 0.0)
    output = io.StringIO()
    follow(run, Console(file=output, width=80, force_terminal=True))
    assert output.getvalue().count("step 3 of 40") >= 2 and next(looks, None) is None


def test_figures_are_read_back_and_a_torn_line_is_skipped(run: Path) -> None:
    FigureFile(Tracker(), run).log({"reward/mean": math.nan, "learner/loss": 1.5}, 4)
    with (run / FIGURES).open("a") as file:
        file.write('{"step": 5, "time": 1.0, "figu')
    *_, last = read_figures(run)
    assert (last.step, last.figures["learner/loss"]) == (4, 1.5) and math.isnan(last.figures["reward/mean"])
    assert list(read_figures(run / "nowhere")) == []


def test_a_folder_that_takes_no_figures_is_one_warning(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / FIGURES).unlink()
    (run / FIGURES).mkdir()
    figures = FigureFile(Tracker(), run)
    figures.log({"a": 1.0}, 1)
    figures.log({"a": 1.0}, 2)
    assert len(caplog.records) == 1 and "takes no figures" in caplog.text


def test_a_curve_in_one_line() -> None:
    assert spark([0.0, 1.0], 10) == "▁█" and spark([0.5, 0.5], 10) == "▁▁"
    assert spark([0.0, 0.0, 1.0, 1.0], 2) == "▁█" and spark([math.nan], 10) == ""


def test_episodes_of_a_task_stand_side_by_side(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(record(3, 0.0, said="Porto", number=1), run / FOLDER)
    save(record(0, 1.0, label="TMEM before"), run / FOLDER)
    assert main(["inspect", str(run), "--task", "recall-0-1"]) == 0
    text = capsys.readouterr().out
    assert "task recall-0-1: 3 kept episodes" in text and "Porto" in text and "TMEM before" in text
    assert main(["inspect", str(run), "--task", "other"]) == 2
    assert "kept no episode of it; it has some of recall-0-1" in capsys.readouterr().err
    assert main(["inspect", str(run), "--task", "recall-0-1", "--compare"]) == 2
