"""A training whose process died is started again. Real processes; a script stands for the training."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.runs.run_folders import create_run, mark_finished
from cluster.train.supervise import this_command
from configs.schema import RunConfig

# Each life does the next act: it takes what `acts.json` holds first. Its words are noted.
TRAINING = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from configs.schema import RunConfig
folder = Path(sys.argv[1])
acts = json.loads((folder / "acts.json").read_text())
(folder / "acts.json").write_text(json.dumps(acts[1:]))
with (folder / "lives").open("a") as lives:
    lives.write(json.dumps(sys.argv[2:]) + "\\n")
run = folder / "runs" / "name-20260101-000000"
if str(acts[0]).startswith("saves "):
    saved = Path(acts[0].removeprefix("saves "))
    run = saved.parent.parent
if len(sys.argv) > 2 and acts[0] != "before its folder":
    run.mkdir(parents=True, exist_ok=True)
    (run / ".lock").write_text(json.dumps({"pid": os.getpid(), "host": "here"}))
if str(acts[0]).startswith("saves "):
    saved.mkdir(parents=True)
    (saved / "state.json").write_text("{}")
if acts[0] == "finishes":
    (run / "finished").write_text(str(RunConfig().train.steps))
if acts[0] == "leaves a process":
    left = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (folder / "left").write_text(str(left.pid))
if acts[0] == "is stopped":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
if isinstance(acts[0], int):
    sys.exit(acts[0])
os.kill(os.getpid(), signal.SIGKILL)
"""
SUPERVISOR = """
import sys
from functools import partial
from pathlib import Path
from cluster.train.supervise import Supervisor
from configs.schema import RunConfig
folder, restarts, *settings = sys.argv[1:]
resume = next((word.removeprefix("resume=") for word in settings if word.startswith("resume=")), "")
config = RunConfig(name="name", output_dir=f"{folder}/runs", resume=resume)
command = [sys.executable, f"{folder}/training.py", folder]
sys.exit(Supervisor(command, settings, config, int(restarts), partial(print, flush=True), 0.3).run())
"""


@dataclass(frozen=True)
class Ended:
    status: int
    lives: list[list[str]]  # the settings of each
    said: list[str]


def supervised(folder: Path, restarts: int, acts: list[object], *settings: str) -> Ended:
    (folder / "training.py").write_text(TRAINING)
    (folder / "acts.json").write_text(json.dumps(acts))
    words = [sys.executable, "-c", SUPERVISOR, str(folder), str(restarts), *settings]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    lives = [json.loads(line) for line in (folder / "lives").read_text().splitlines()]
    return Ended(done.returncode, lives, done.stdout.splitlines())


def test_a_training_that_dies_goes_on_from_what_it_saved_until_it_is_done(tmp_path: Path) -> None:
    ended = supervised(tmp_path, 5, ["before its folder", "killed", 1, 0], "train.steps=3")
    resumed = ["train.steps=3", f"resume={tmp_path}/runs/name-20260101-000000"]
    # before it had a folder there was nothing to go on from, perhaps but a stranger's run of the name
    assert ended.lives == [["train.steps=3"], ["train.steps=3"], resumed, resumed] and ended.status == 0
    assert ended.said == [
        "the training's process died (SIGKILL): restart 1 of 5 in 1 s",
        "the training's process died (SIGKILL): restart 2 of 5 in 2 s",
        "the training's process died (exit status 1): restart 3 of 5 in 4 s",
    ]


@pytest.mark.parametrize("status", [0, 2, 130], ids=["done", "a user's mistake", "stopped"])
def test_what_ended_by_itself_is_not_started_again(tmp_path: Path, status: int) -> None:
    ended = supervised(tmp_path, 3, [status], "resume=auto")
    assert (ended.status, len(ended.lives), ended.said) == (status, 1, [])


def test_it_goes_on_with_its_own_run_whatever_else_has_its_name(tmp_path: Path) -> None:
    """The older was given up, the newer is at work: auto would train the first, or fail at the other."""
    output_dir = tmp_path / "runs"
    older, newer = create_run(output_dir, "name"), create_run(output_dir, "name")
    for stranger in (older, newer):
        (stranger / ".lock").write_text('{"pid": 1, "host": "here"}')
    ended = supervised(tmp_path, 2, ["killed", "finishes"], "seed=0")
    own = output_dir / "name-20260101-000000"
    assert ended.lives == [["seed=0"], ["seed=0", f"resume={own}"]] and ended.status == 0
    died = f"the training's process died (SIGKILL) after its end: {own} is finished"
    assert ended.said[-1] == died  # with auto, the run that was given up would be trained now


def test_restarts_are_bounded_and_what_a_dead_training_left_is_ended(tmp_path: Path) -> None:
    ended = supervised(tmp_path, 1, ["killed", "leaves a process"], "resume=auto")
    assert (ended.status, len(ended.lives)) == (137, 2)
    assert ended.said[-1].endswith("(SIGKILL), and 1 restart(s) were allowed: it is not started again")
    left = Path(f"/proc/{(tmp_path / 'left').read_text()}/stat")
    assert not left.exists() or left.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_stop_ends_both(tmp_path: Path) -> None:
    ended = supervised(tmp_path, 3, ["is stopped"], "resume=auto")
    assert (ended.status, len(ended.lives), ended.said) == (130, 1, [])


def test_a_named_checkpoint_is_gone_on_from_in_its_own_run(tmp_path: Path) -> None:
    """With resume=auto a later run of the name would be taken. That it was finished once says nothing."""
    output_dir = tmp_path / "runs"
    older, _ = create_run(output_dir, "name"), create_run(output_dir, "name")
    (older / ".lock").write_text('{"pid": 1, "host": "here"}')
    mark_finished(older, RunConfig().train.steps)
    saved = older / "checkpoints" / "step-000002"
    ended = supervised(tmp_path, 1, [f"saves {saved}", 0], f"resume={older}/checkpoints/step-000001")
    assert ended.lives[1] == [f"resume={saved}"]


def test_a_life_that_saved_nothing_begins_again_where_it_was_told_to(tmp_path: Path) -> None:
    """The run's own later checkpoint is another branch."""
    run = create_run(tmp_path / "runs", "name")
    for step in (1, 2):
        saved = run / "checkpoints" / f"step-{step:06}"
        saved.mkdir(parents=True)
        (saved / "state.json").write_text("{}")
    named = f"resume={run}/checkpoints/step-000001"
    assert supervised(tmp_path, 1, ["killed", 0], named).lives == [[named], [named]]


def test_the_command_is_found_again_and_wants_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    shown = "import sys; from cluster.train.supervise import this_command; print(this_command(sys.argv[1:]))"
    words = [sys.executable, "-X", "utf8", "-c", shown, "train", "quickstart"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str([sys.executable, "-X", "utf8", "-c", shown])
    assert this_command([])[0] == sys.executable
    assert main(["train", "quickstart", "trian.steps=1", "--supervise", "2"]) == 2
    assert "did you mean train.steps" in capsys.readouterr().err
