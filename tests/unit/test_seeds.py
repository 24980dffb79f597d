"""``train --seeds --sweep``: which runs there are, what of them is missing, and the table at the end."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from cluster.cli import main
from cluster.common.display import Display
from cluster.common.errors import ClusterError
from cluster.compare import seeds
from cluster.compare.seeds import Wanted, train_runs, wanted_runs
from cluster.fleet.ray_runtime import cancel_on_sigterm
from cluster.runs.run_folders import mark_finished
from configs.bounds import ConfigError
from configs.load import to_yaml
from tests.unit.test_pooling import save_run

QUICKSTART = Path(__file__).parents[2] / "tests" / "quickstart.yaml"
STAGES = {"before": [0.0, 0.5], "after_rl": [0.5, 1.0]}


class Trainer:
    """Trains as ``engram train`` does, without the training. ``ends``: the exit statuses, in turn."""

    def __init__(self, folder: Path, ends: Sequence[int] = ()) -> None:
        self.folder, self.ends, self.asked = folder, list(ends), list[tuple[str, ...]]()

    def __call__(self, words: Sequence[str]) -> int:
        self.asked.append(tuple(words))
        status = self.ends.pop(0) if self.ends else 0
        if status == 0:
            given = dict(word.split("=", 1) for word in words[2:] if "=" in word)
            self.finish(given)
        return status

    def finish(self, given: dict[str, str]) -> None:
        more = [f"{key}={value}" for key, value in given.items() if key not in ("name", "seed", "resume")]
        run = save_run(self.folder / "made", given["name"], int(given["seed"]), STAGES, more)
        run = run.rename(self.folder / f"{given['name']}-20260101-12000{given['seed']}")
        mark_finished(run, 1)


def runs_in(folder: Path, seeds: Sequence[int], sweep: Sequence[str] = ()) -> list[Wanted]:
    words = [f"output_dir={folder}", "train.steps=1", "name=tmem"]
    return wanted_runs(QUICKSTART, words, seeds, sweep)


def trained(runs: Sequence[Wanted], trainer: Trainer) -> tuple[int, str]:
    output = io.StringIO()
    status = train_runs(runs, False, Display(Console(file=output, width=200)), trainer)
    return status, output.getvalue()


def test_every_kind_is_trained_on_every_seed_and_compared(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    runs = runs_in(tmp_path, [0, 1], ["learner.learning_rate=1e-4,2e-4"])
    status, text = trained(runs, trainer)
    assert status == 0 and "4 runs, 0 of them done before" in text
    assert [words[-3:] for words in trainer.asked] == [
        ("learner.learning_rate=1e-4", "name=tmem-1e-4", "seed=0"),
        ("learner.learning_rate=1e-4", "name=tmem-1e-4", "seed=1"),
        ("learner.learning_rate=2e-4", "name=tmem-2e-4", "seed=0"),
        ("learner.learning_rate=2e-4", "name=tmem-2e-4", "seed=1"),
    ]
    assert "What training gained" in text and "tmem-2e-4 (seeds 0, 1)" in text and "+50.0, +50.0" in text
    assert (tmp_path / "tmem-1e-4-compared" / "gains.png").is_file()


def test_only_what_is_missing_is_trained_and_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_in(tmp_path, [0, 1, 2])
    begun = tmp_path / "tmem-20260101-115900"
    begun.mkdir()
    (begun / "config.yaml").write_text(to_yaml(runs[1].config))
    checkpoint = type("Whole", (), {"folder": begun / "checkpoints" / "step-000001"})
    monkeypatch.setattr(seeds, "newest_whole", lambda folder: checkpoint if folder == begun else None)
    trainer = Trainer(tmp_path)
    assert trained(runs[:1], trainer)[0] == 0
    status, text = trained(runs, trainer)
    assert status == 0 and "3 runs, 1 of them done before" in text and "tmem (seeds 0, 1, 2)" in text
    assert [words[-1] for words in trainer.asked] == ["seed=0", f"resume={checkpoint.folder}", "seed=2"]
    assert trained(runs, trainer)[0] == 0 and len(trainer.asked) == 3


def test_a_run_that_fails_does_not_stop_the_others_and_an_interrupt_does(tmp_path: Path) -> None:
    runs = runs_in(tmp_path, [0, 1])
    with pytest.raises(ClusterError, match="1 of 2 runs failed, the first tmem, seed 0: its own error"):
        trained(runs, trainer := Trainer(tmp_path, ends=[1]))
    assert len(trainer.asked) == 2
    status, text = trained(runs, trainer := Trainer(tmp_path, ends=[130]))
    assert status == 130 and "the same command again goes on" in text and "What training" not in text


def test_a_finished_run_of_other_settings_is_refused_before_any_run(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trained(runs_in(tmp_path, [0]), trainer)
    other = wanted_runs(
        QUICKSTART, [f"output_dir={tmp_path}", "train.steps=1", "name=tmem", "write.epochs=9"], [1, 0], []
    )
    with pytest.raises(ConfigError, match=r"has write.epochs=\d+, not 9; give these runs another name"):
        trained(other, trainer)
    assert len(trainer.asked) == 1


def test_an_interrupted_run_of_other_settings_is_refused_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_in(tmp_path, [1, 0])
    begun = tmp_path / "tmem-20260101-115900"
    state = begun / "checkpoints" / "step-000001" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text("{}")
    checkpoint = type("Whole", (), {"folder": state.parent})
    monkeypatch.setattr(seeds, "newest_whole", lambda folder: checkpoint if folder == begun else None)

    def begin_with(*words: str) -> None:
        given = [f"output_dir={tmp_path}", "train.steps=1", "name=tmem", *words]
        (config,) = (run.config for run in wanted_runs(QUICKSTART, given, [0], []))
        (begun / "config.yaml").write_text(to_yaml(config))

    begin_with("objective.advantage=rloo", "train.steps=9")
    with pytest.raises(ConfigError, match=r"has objective.advantage=rloo, not grpo; give these runs another"):
        trained(runs, trainer := Trainer(tmp_path))
    assert trainer.asked == []
    begin_with("train.steps=9", "model.date=2026-01-01")
    assert trained(runs, trainer)[0] == 0 and trainer.asked[1][-1] == f"resume={state.parent}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=3", "--seeds", "0,1"], "argument 'seed=3': --seeds sets it for each run"),
        (["--seeds", "0,x"], "argument --seeds: '0,x' is not allowed"),
        (["--sweep", "write.epochs"], "write key=value,value"),
        (["--sweep", "seed=0,1"], "seeds are given by --seeds"),
        (["--sweep", "write.epoch=1,2"], "did you mean write.epochs"),
        (["write.epochs=3", "--sweep", "write.epochs=1,2"], "is also given as an argument"),
        (
            ["--sweep", "train.steps=1", "--sweep", "write.epochs=3", "--sweep", "train.steps=2"],
            "--sweep train.steps is given twice: write train.steps=1,2",
        ),
        (["--sweep", "write.epochs=1,1"], "two values give runs of the same name"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(QUICKSTART), *words]) == 2
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1


def test_a_run_has_a_process_of_its_own_that_a_users_modules_do_not_hide(tmp_path: Path) -> None:
    (tmp_path / "cluster.py").write_text("raise SystemExit('the user\\'s')")
    script = "import sys; from cluster.compare.seeds import play_in_process as p; sys.exit(p(sys.argv[1:]))"
    root = str(QUICKSTART.parents[1])
    command = [sys.executable, "-P", "-c", script]
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [*command, "train", str(QUICKSTART), "train.steps=7", "--print-config"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "steps: 7" in done.stdout, done.stderr


def test_a_stop_is_passed_on_and_no_further_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    child = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
    monkeypatch.setattr(seeds, "_START", child)
    assert seeds.play_in_process([]) == 130  # although it ended well


def test_a_second_stop_does_not_cut_off_what_the_first_one_saves() -> None:
    saved = []

    async def run() -> None:
        cancel_on_sigterm()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)
            saved.append(1)
            raise

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert saved == [1]
