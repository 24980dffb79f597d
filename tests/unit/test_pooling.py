"""Runs pooled over seeds: gains are paired by seed and task, groups compared on what both played, a mixture is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from actors.types import Answer
from cluster.cli import main
from cluster.errors import CheckpointError
from cluster.evaluate import EpisodeScore, RowResult, save_row
from cluster.pooling.report import Pool
from cluster.pooling.runs import load_groups
from configs.load import load_config, to_yaml

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def save_run(folder: Path, name: str, seed: int, stages: dict[str, Sequence[float]], more: Sequence[str] = ()) -> Path:
    """A run whose tasks 0, 1, ... scored the given F1 at each stage."""
    run = folder / f"{name}-{seed}-{len(more)}"
    (run / "report").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load_config(QUICKSTART, [f"name={name}", f"seed={seed}", *more])))
    for stage, scores in stages.items():
        episodes = tuple(episode(f"task-{number}", score) for number, score in enumerate(scores))
        save_row(RowResult(stage, 0, episodes, ()), run / "evaluation" / f"{stage}.json")
    (run / "report" / "report.json").write_text(json.dumps({"rewards": [0.1, 0.2, 0.3]}))
    return run


def episode(task: str, score: float) -> EpisodeScore:
    answer = Answer("q", ("a",), "a", "c", {"f1": score, "em": float(score == 1)})
    return EpisodeScore(task, task, score, {}, (answer,), {}, {}, 1, 1, 1, 0.0)


def test_gains_are_paired_and_groups_compared_on_shared_tasks(tmp_path: Path) -> None:
    folders = [
        save_run(tmp_path, "tmem", 0, {"after_warm_start": [0.0, 0.5], "after_rl": [0.5, 1.0]}),
        save_run(tmp_path, "tmem", 1, {"after_warm_start": [0.25, 0.5], "after_rl": [0.5, 0.5]}),
        save_run(tmp_path, "off", 0, {"after_warm_start": [0.0, 0.0, 0.0], "after_rl": [0.0, 0.25, 1.0]}),
    ]
    pool = Pool(load_groups(folders), 1000, 0)
    tmem, off = pool.gains()
    assert (tmem.name, tmem.difference.count, tmem.difference.mean, tmem.by_seed) == ("tmem", 4, 0.3125, (0.5, 0.125))
    assert (off.difference.count, off.difference.mean) == (3, pytest.approx(1.25 / 3))
    (versus,) = pool.versus()
    assert (versus.name, versus.other, versus.difference.count) == ("tmem", "off", 2)  # seed 1 and the third task were not played by both
    assert versus.difference.mean == pytest.approx(0.5 - 0.125)


def test_a_stage_that_one_run_has_not_got_is_left_out(tmp_path: Path) -> None:
    folders = [
        save_run(tmp_path, "tmem", 0, {"before": [0.0], "after_rl": [0.5]}),
        save_run(tmp_path, "tmem", 1, {"after_rl": [0.5]}),
    ]
    pool = Pool(load_groups(folders), 100, 0)
    assert pool.gains() == []
    assert [line[1] for line in pool.tables()[0].rows] == ["after_rl"]


def test_from_the_command_line_to_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = {"before": [0.0, 0.5], "after_rl": [0.5, 1.0]}
    runs = [str(save_run(tmp_path, name, seed, stages)) for name in ("tmem", "off") for seed in (0, 1)]
    assert main(["pool", *runs, "--output", str(tmp_path / "pool")]) == 0
    assert "+50.0 [+50.0, +50.0]" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "pool").iterdir()} == {"pool.md", "pool.json", "reward.png"}
    assert json.loads((tmp_path / "pool" / "pool.json").read_text())["gains"][0]["difference"]["mean"] == 0.5
    assert "Whether it gained more" in (tmp_path / "pool" / "pool.md").read_text()


def test_what_does_not_belong_together_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = {"before": [0.0], "after_rl": [0.5]}
    first = save_run(tmp_path, "tmem", 0, done)
    cases = [
        ([tmp_path / "nowhere"], "holds no config.yaml"),
        ([save_run(tmp_path, "unfinished", 0, {"before": [0.0]})], "its run has not finished"),
        ([first, save_run(tmp_path, "tmem", 0, done, ["train.steps=9"])], "is a second run of name=tmem seed=0"),
        ([first, save_run(tmp_path, "tmem", 1, done, ["train.steps=9"])], "has train.steps=9"),
    ]
    for folders, part in cases:
        with pytest.raises(CheckpointError, match=part) as caught:
            load_groups(folders)
        assert "\n" not in str(caught.value)
    assert main(["pool", str(tmp_path / "nowhere")]) == 2
    assert "holds no config.yaml" in capsys.readouterr().err
