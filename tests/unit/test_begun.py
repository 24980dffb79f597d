"""What ``resume=auto`` goes on from: the newest whole checkpoint, or a run without one. The run's lock."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.common.errors import AllFinished, CheckpointError, InUseError, StartupError
from cluster.fleet.ray_runtime import _cluster_address
from cluster.runs.checkpoint import START, Checkpoint, save_checkpoint
from cluster.runs.resume import find_checkpoint, find_in_run, find_unfinished, is_run, note_run_id, run_id_of
from cluster.runs.run_folders import create_run, mark_finished, runs_of
from cluster.runs.run_lock import held, require_free
from configs.bounds import BoundError
from configs.load import load_config, to_yaml
from configs.schema import RunConfig

CONFIG = load_config(Path("tests/quickstart.yaml"), ["name=trial"])


def save(run_dir: Path, step: int) -> Path:
    async def write(target: Path) -> None:
        (target / "model").mkdir(parents=True)
        (target / "model" / "model.safetensors").write_bytes(b"x" * 1000)

    return asyncio.run(save_checkpoint(run_dir, replace(START, step=step), "name: test\n", write, 3)).folder


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def _cut(folder: Path) -> None:
    os.truncate(folder / "learner/model/model.safetensors", 999)


def _grow(folder: Path) -> None:
    os.truncate(folder / "learner/model/model.safetensors", 1001)


def _lose(folder: Path) -> None:
    (folder / "learner/model/model.safetensors").unlink()


def _flip(folder: Path) -> None:
    """One byte, and the same size and time: only a digest tells."""
    file = folder / "learner/model/model.safetensors"
    file.write_bytes(b"x" * 500 + b"y" + b"x" * 499)


def _flip_state(folder: Path) -> None:
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace('"version": 0', '"version": 1'))


def _lose_digest(folder: Path) -> None:
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(line for line in lines if "safetensors" not in line))


def _lose_digests(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()


def _spoil(folder: Path) -> None:
    (folder / "state.json").write_text('{"format"')


def _lose_state(folder: Path) -> None:
    (folder / "state.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_cut, r"is damaged: learner/model/model\.safetensors is not as it was written$"),
        (_grow, r"is damaged: learner/model/model\.safetensors is not as it was written$"),
        (_lose, r"is incomplete: learner/model/model\.safetensors is missing$"),
        (_flip, r"is damaged: learner/model/model\.safetensors is not as it was written$"),
        (_flip_state, r"is damaged: state\.json is not as it was written$"),
        (_lose_digest, r"is damaged: SHA256SUMS is not as it was written$"),
        (_lose_digests, r"is incomplete: SHA256SUMS is missing$"),
        (_spoil, r"state\.json cannot be used"),
        (_lose_state, r"is no checkpoint: it has no state\.json"),
    ],
    ids=[
        "cut",
        "grown",
        "lost",
        "flipped",
        "flipped state",
        "no digest",
        "no digests",
        "spoiled",
        "no state",
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], reason: str
) -> None:
    run = begin(tmp_path, CONFIG, "20260101-120000", "abc")
    older, newer = save(run, 2), save(run, 4)
    found = find_unfinished(tmp_path, CONFIG)
    assert isinstance(found, Checkpoint) and found.folder == newer and not warnings(caplog)
    damage(newer)
    found = find_unfinished(tmp_path, CONFIG)
    assert isinstance(found, Checkpoint) and found.folder == older
    (line,) = warnings(caplog)
    assert "\n" not in line and re.search(reason, line)
    assert line.startswith("resume=auto passes over a damaged checkpoint: ")
    with pytest.raises(CheckpointError, match=reason.removesuffix("$")):
        find_checkpoint(newer)
    damage(older)
    (run / "config.yaml").write_text(to_yaml(replace(CONFIG, seed=9)))  # nor is it begun anew
    with pytest.raises(CheckpointError, match=r"no checkpoint of trial in \S+ is whole: start anew"):
        find_unfinished(tmp_path, CONFIG)


def test_digests_are_not_checked_where_an_older_version_wrote_none(tmp_path: Path) -> None:
    run = begin(tmp_path, CONFIG, "20260101-120000", "abc")
    folder = save(run, 2)
    state = json.loads((folder / "state.json").read_text())
    assert state.pop("has_digests") is True and state.pop("generation") == 0
    (folder / "state.json").write_text(json.dumps(state))
    _cut(folder)
    assert isinstance(find_unfinished(tmp_path, CONFIG), Checkpoint)


def test_a_checkpoint_that_could_not_be_loaded_is_passed_over(tmp_path: Path) -> None:
    run = begin(tmp_path, CONFIG, "20260101-120000", "abc")
    older, newer = save(run, 2), save(run, 4)
    found = find_unfinished(tmp_path, CONFIG, refused=[newer])
    assert isinstance(found, Checkpoint) and found.folder == older
    with pytest.raises(CheckpointError, match="is whole"):
        find_unfinished(tmp_path, CONFIG, refused=[newer, older])


def begin(output_dir: Path, config: RunConfig, stamp: str, run_id: str) -> Path:
    run = output_dir / f"{config.name}-{stamp}"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    note_run_id(run, run_id)
    return run


def test_a_run_that_died_before_its_first_checkpoint_goes_on_under_its_id(tmp_path: Path) -> None:
    assert find_unfinished(tmp_path / "nothing", CONFIG) is None
    begin(tmp_path, CONFIG, "20260101-120000", "older")
    run = begin(tmp_path, CONFIG, "20260101-130000", "abc")
    begin(tmp_path, replace(CONFIG, name="trial-two"), "20260101-140000", "other")
    (tmp_path / "trial-99999999-999999").mkdir()
    found = find_unfinished(tmp_path, replace(CONFIG, resume="auto"))
    assert found == run and run_id_of(run) == "abc"
    assert run_id_of(tmp_path / "trial-two-20260101-140000") == "other" and run_id_of(tmp_path) == ""


def test_auto_takes_the_newest_unfinished_run_of_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The clock goes back by a day between the runs: the order is that of their beginnings."""
    runs = []
    for day in ("20260103", "20260102", "20260101"):
        monkeypatch.setattr(time, "strftime", lambda form, day=day: f"{day}-120000")
        runs.append(create_run(tmp_path, "trial"))
        save(runs[-1], 2)
    saved = save(create_run(tmp_path, "other"), 50)

    def found() -> Path:
        checkpoint = find_unfinished(tmp_path, CONFIG)
        assert isinstance(checkpoint, Checkpoint)
        return checkpoint.run_dir

    assert found() == runs[2]
    mark_finished(runs[2], CONFIG.train.steps)
    assert found() == runs[1]
    mark_finished(runs[1], CONFIG.train.steps)
    mark_finished(runs[0], CONFIG.train.steps)
    with pytest.raises(AllFinished, match=rf"every run of trial in \S+ is finished.*{runs[2].name}.*resume="):
        find_unfinished(tmp_path, CONFIG)
    more = replace(CONFIG, train=replace(CONFIG.train, steps=CONFIG.train.steps + 2))
    further = find_unfinished(tmp_path, more)
    assert isinstance(further, Checkpoint) and further.run_dir == runs[2]
    assert saved.exists() and not warnings(caplog)


def test_a_runs_folder_means_that_run_alone(tmp_path: Path) -> None:
    """What supervision resumes: neither an older run of the name, nor a newer one."""
    run, other = create_run(tmp_path, "trial"), create_run(tmp_path, "trial")
    for folder in (run, other):
        (folder / "config.yaml").write_text(to_yaml(CONFIG))
    assert is_run(run) and find_in_run(run, CONFIG) == run
    saved, later = save(run, 2), save(run, 4)
    save(other, 6)
    assert not is_run(saved)
    for refused, expected in (([], later), ([later], saved)):
        found = find_in_run(run, CONFIG, refused)
        assert isinstance(found, Checkpoint) and found.folder == expected
    mark_finished(run, CONFIG.train.steps)
    with pytest.raises(AllFinished, match="nothing is left to do"):
        find_in_run(run, CONFIG)
    changed = begin(tmp_path, CONFIG, "20260101-130000", "")
    with pytest.raises(CheckpointError, match="has no checkpoint, and began with other settings: start anew"):
        find_in_run(changed, replace(CONFIG, seed=CONFIG.seed + 1))


def test_a_begun_run_of_other_settings_is_passed_over_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = begin(tmp_path, CONFIG, "20260101-130000", "abc")
    other = replace(CONFIG, learner=replace(CONFIG.learner, learning_rate=1.0))
    assert find_unfinished(tmp_path, other) is None
    (line,) = warnings(caplog)
    assert str(run) in line and "learner.learning_rate=" in line and "not 1.0" in line
    assert find_unfinished(tmp_path, CONFIG) == run


def test_runs_that_begin_in_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from cluster.runs.run_folders import create_run\n"
        "time.strftime = lambda form: '20260101-120000'\n"
        "for _ in range(5): create_run(Path(sys.argv[1]) / 'new', 'trial')"
    )
    starts = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(4)]
    assert [start.wait(timeout=60) for start in starts] == [0] * 4
    runs = runs_of(tmp_path / "new", "trial")
    assert len(runs) == 20
    assert [(run / "number").read_text().strip() for run in runs] == [str(n) for n in range(20, 0, -1)]


def test_another_process_leaves_a_save_alone_that_is_on_its_way(tmp_path: Path) -> None:
    """Between the two renames of a replacement: only the process with the lock may tidy up."""
    run = begin(tmp_path, CONFIG, "20260101-120000", "abc")
    folder = save(run, 2)
    old = folder.with_name(f".{folder.name}.old")
    folder.rename(old)
    with held(run):
        find_unfinished(tmp_path, replace(CONFIG, seed=9))
        assert old.exists()
    assert isinstance(find_unfinished(tmp_path, CONFIG), Checkpoint) and folder.exists()


def test_two_processes_in_one_folder_are_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from cluster.runs.run_lock import held\n"
        "with held(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        for attempt in (lambda: require_free(tmp_path), lambda: held(tmp_path).__enter__()):
            holder = rf"{tmp_path} is in use by process {other.pid} on \S+: wait for it or stop it"
            with pytest.raises(InUseError, match=holder):
                attempt()
        other.send_signal(signal.SIGKILL)
    require_free(tmp_path)
    with held(tmp_path), pytest.raises(InUseError, match=f"process {os.getpid()} "):
        require_free(tmp_path)
    require_free(tmp_path)
    require_free(tmp_path / "not there")


@pytest.mark.parametrize("name", ["", "..", "../up", "a/b", "/abs", ".hidden", "-x", "a\nb", "n" * 101])
def test_a_name_cannot_leave_its_folder(name: str) -> None:
    with pytest.raises(BoundError, match=r"name=.*is not allowed: it must be 1 to 100 printable characters"):
        replace(CONFIG, name=name)


def test_auto_joins_the_cluster_of_ray_start_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not whatever local Ray runs on the machine, which Ray itself would join."""
    monkeypatch.setattr("ray._private.utils.get_ray_address_file", lambda _: str(tmp_path / "current"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(StartupError, match=r"ray\.address=auto finds no cluster on this machine"):
        _cluster_address("auto")
    (tmp_path / "current").write_text("10.0.0.1:6379\n")
    assert _cluster_address("auto") == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert _cluster_address("auto") == "10.0.0.2:6379"
    assert _cluster_address("10.0.0.3:1") == "10.0.0.3:1"
