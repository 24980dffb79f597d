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

from cluster.common.errors import CheckpointError, InUseError
from cluster.runs.checkpoint import START, Checkpoint, find_checkpoint, list_checkpoints, save_checkpoint
from cluster.runs.resume import begun_run, new_run, note_run_id, run_id_of
from cluster.runs.run_lock import held, require_free
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


def _spoil(folder: Path) -> None:
    (folder / "state.json").write_text('{"format"')


def _lose_state(folder: Path) -> None:
    (folder / "state.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_cut, r"is damaged: learner/model/model\.safetensors has 999 bytes, 1000 were written$"),
        (_grow, r"is damaged: learner/model/model\.safetensors has 1001 bytes, 1000 were written$"),
        (_lose, r"is incomplete: learner/model/model\.safetensors is missing$"),
        (_spoil, r"state\.json cannot be used"),
        (_lose_state, r"is no checkpoint: it has no state\.json"),
    ],
    ids=["cut", "grown", "lost", "spoiled", "no state"],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], reason: str
) -> None:
    run = tmp_path / "run"
    older, newer = save(run, 2), save(run, 4)
    found = find_checkpoint("auto", tmp_path)
    assert found is not None and found.folder == newer and not warnings(caplog)
    damage(newer)
    found = find_checkpoint("auto", tmp_path)
    assert found is not None and found.folder == older
    (line,) = warnings(caplog)
    assert "\n" not in line and re.search(reason, line)
    assert line.startswith("resume=auto skips a damaged checkpoint: ")
    with pytest.raises(CheckpointError, match=reason.removesuffix("$")):
        find_checkpoint(str(newer), tmp_path)
    damage(older)
    with pytest.raises(CheckpointError, match=r"no checkpoint in \S+ is whole: start anew"):
        find_checkpoint("auto", tmp_path)


def test_sizes_are_not_checked_where_an_older_version_wrote_none(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", 2)
    state = json.loads((folder / "state.json").read_text())
    assert state.pop("files") and state.pop("written")
    (folder / "state.json").write_text(json.dumps(state))
    _cut(folder)
    assert find_checkpoint("auto", tmp_path) is not None


def begin(output_dir: Path, config: RunConfig, stamp: str, run_id: str) -> Path:
    run = output_dir / f"{config.name}-{stamp}"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    note_run_id(run, run_id)
    return run


def test_a_run_that_died_before_its_first_checkpoint_goes_on_under_its_id(tmp_path: Path) -> None:
    assert begun_run(tmp_path, CONFIG, None) is None
    begin(tmp_path, CONFIG, "20260101-120000", "older")
    run = begin(tmp_path, CONFIG, "20260101-130000", "abc")
    begin(tmp_path, replace(CONFIG, name="trial-two"), "20260101-140000", "other")
    (tmp_path / "trial-99999999-999999").mkdir()
    found = begun_run(tmp_path, replace(CONFIG, resume="auto"), None)
    assert found == run and run_id_of(found) == "abc"
    assert run_id_of(tmp_path / "trial-two-20260101-140000") == "other" and run_id_of(tmp_path) == ""
    assert new_run(tmp_path, "trial").name.startswith("trial-20")


def test_a_begun_run_is_not_continued_with_other_settings_or_beside_a_checkpoint(tmp_path: Path) -> None:
    run = begin(tmp_path, CONFIG, "20260101-130000", "abc")
    other = replace(CONFIG, learner=replace(CONFIG.learner, learning_rate=1.0))
    assert begun_run(tmp_path, other, None) is None
    newer = Checkpoint(save(tmp_path / "elsewhere", 2), START)
    assert begun_run(tmp_path, CONFIG, newer) is None
    late = begin(tmp_path, CONFIG, time.strftime("%Y%m%d-%H%M%S", time.localtime(time.time() + 60)), "def")
    assert begun_run(tmp_path, CONFIG, newer) == late
    save(late, 1)
    assert begun_run(tmp_path, CONFIG, None) is None and list_checkpoints(late)
    assert run.exists()


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
