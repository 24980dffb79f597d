"""infra/recall_rl.sh: every kind that it offers can be trained, is an arm of its own, and has its warm start.

A stand-in for ``python`` writes down what the script would run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.train.prepare import _refuse_control, _require_trained_tokens
from configs.load import flatten, load_config
from configs.schema import RunConfig

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "infra" / "recall_rl.sh"
CONFIGS = ("recall_rl", "recall_asking")
KINDS = re.findall(r"^    ([a-z-]+)\)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
REFUSED = {
    ("recall_rl", "by-episode"): "its credit is by episode already",
    ("recall_rl", "one-wording"): "its cards are in one wording already",
    ("recall_asking", "no-extraction-credit"): "nothing would be left to train",
}
OF_A_RUN = ("name", "output_dir", "model.name", "resume")
STAND_IN = """#!/bin/sh
printf '%s\\n' "$*" >> "$RAN"
case "$*" in *"$REFUSED"*) exit 2 ;; esac
for word in "$@"; do case $word in output_dir=*) mkdir -p "${word#output_dir=}/start-1" ;; esac; done
case $3 in export) mkdir -p "$5" ;; esac
"""


def run_script(
    tmp_path: Path, config: str, *kinds: str, refused: str = "-none-"
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """What the script printed, and its ``python -m cluster`` commands. One with ``refused`` in it fails."""
    (tmp_path / "bin").mkdir(parents=True)
    (tmp_path / "bin" / "python").write_text(STAND_IN, encoding="utf-8")
    (tmp_path / "bin" / "python").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "CONFIG": config,
        "REFUSED": refused,
        "RAN": str(tmp_path / "ran"),
    }
    command = ["sh", str(SCRIPT), str(tmp_path / "runs"), "0 1", *kinds]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    ran = tmp_path / "ran"
    lines = ran.read_text(encoding="utf-8").splitlines() if ran.exists() else []
    return done, [shlex.split(line)[2:] for line in lines]  # without -m cluster


def runs_of(commands: list[list[str]]) -> list[RunConfig]:
    """The configurations of the runs, as ``train`` resolves them."""
    trained = [words for words in commands if words[0] == "train" and "--print-config" not in words]
    return [load_config(ROOT / config, settings) for _, config, *settings in trained]


def arm(config: RunConfig) -> Mapping[str, object]:
    return {key: value for key, value in flatten(config).items() if key not in OF_A_RUN}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_trained_from_a_warm_start_with_its_prompts(
    tmp_path: Path, config: str, kind: str
) -> None:
    done, commands = run_script(tmp_path, config, kind)
    if (config, kind) in REFUSED:
        assert done.returncode == 2 and not commands, commands
        assert kind in done.stderr and REFUSED[config, kind] in done.stderr and done.stderr.count("\n") == 1
        return
    assert done.returncode == 0, done.stderr
    start, run, *of_seed_1 = runs_of(commands)
    assert [each.seed for each in (start, run, *of_seed_1)] == [0, 0, 1, 1]
    for each in (start, run):
        _refuse_control(each)
        _require_trained_tokens(each)
    assert (start.warm_start.steps > 0, start.train.steps, run.warm_start.steps) == (True, 0, 0)
    exported = next(words for words in commands if words[0] == "export")
    assert run.model.name == exported[2] and Path(exported[1]).parent == Path(start.output_dir)
    assert start.memory.wordings == run.memory.wordings, "the warm start taught another number of wordings"
    main = load_config(ROOT / "configs" / f"{config}.yaml", ["warm_start.steps=0"])
    assert (arm(run) == arm(main)) is (kind == "tmem"), "an arm differs from the main one by its own setting"


def test_a_kind_whose_settings_are_refused_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    """The refusal ends the script, and with it the kinds behind: so all are asked for first."""
    done, commands = run_script(tmp_path, "recall_asking", "tmem", "summary", refused="memory.policy=summary")
    assert done.returncode == 2
    assert [("--print-config" in words) for words in commands] == [True, True]
    done, commands = run_script(tmp_path / "unknown", "recall_asking", "tmem", "sumary")
    assert done.returncode == 2 and "sumary is not known" in done.stderr and runs_of(commands) == []


def test_kinds_share_a_warm_start_unless_it_taught_something_else(tmp_path: Path) -> None:
    done, commands = run_script(tmp_path, "recall_asking", "tmem", "one-wording", "by-episode")
    assert done.returncode == 0, done.stderr
    runs = runs_of(commands)
    assert [run.name for run in runs[:5]] == ["start", "tmem", "start", "one-wording", "by-episode"]
    tmem, _, one_wording, by_episode = (run.model.name for run in runs[1:5])
    assert tmem == by_episode != one_wording
