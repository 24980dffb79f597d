"""A user's environment that fails, waits and gives a reward without answers, in whole training runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.integration.test_bring_your_own import ROOT, SMALL

MODULE = """
import asyncio
from pathlib import Path
from actors.environments.base import Observation
from actors.types import Outcome, Task

class Session:
    question = "How long?"
    def __init__(self, task, folder): self.task, self.folder, self.turns = task, folder, 1
    def observe(self): return Observation("Say anything.", True) if self.turns else None
    async def act(self, text):
        self.turns -= 1
        self.said = text
        await asyncio.sleep(0.01)
        if self.task.payload["fails"]:
            int(f"no number: {text}")  # line 16
    async def outcome(self): return Outcome(3.0 + len(self.said), {}, ())
    async def close(self):
        with (Path(self.folder) / "closed").open("a") as file: file.write("closed\\n")

class Talk:
    name, system_prompt = "talk", "Talk."
    def __init__(self, options): self.options = options
    def tasks(self, split, seed, start):
        for position in range(start, 40):
            fails = self.options["all"] or (split == "eval" and position == 1)
            yield Task(f"talk-{split}-{position}", "talk", {"fails": fails}, position, "Talk freely.")
    def start(self, task): return Session(task, self.options["folder"])
"""


def _train(tiny_model_path: Path, folder: Path, fails: bool) -> subprocess.CompletedProcess[str]:
    (folder / "my_talk.py").write_text(MODULE, encoding="utf-8")
    settings = [
        "environment.name=custom",
        "environment.custom=my_talk:Talk",
        f"environment.options={{folder: {folder}, all: {str(fails).lower()}}}",
        "evaluation.memory_off_row=false",
        "tracking.enabled=false",
        "evaluation.tasks=4",
        f"model.name={tiny_model_path}",
    ]
    words = [setting for setting in SMALL if not setting.startswith("evaluation.tasks=")]
    return subprocess.run(
        [sys.executable, "-m", "cluster", "train", ROOT / "tests" / "quickstart.yaml", *words, *settings],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
        | {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"},  # as in a Ray job: Ray's warning of it is noise
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_all_failing_alike_ends_the_run_with_that_line(tiny_model_path: Path, tmp_path: Path) -> None:
    ended = _train(tiny_model_path, tmp_path, fails=True)
    assert ended.returncode == 2, ended.stdout[-1500:] + ended.stderr[-3000:]
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1, ended.stderr
    line = lines[0]
    assert line.startswith("error: TMEM before: all 4 episodes failed alike: environment: ")
    assert "the environment talk's act: ValueError: invalid literal for int()" in line
    assert line.endswith("(my_talk.py:16)") and "is lost" not in ended.stdout
    assert (tmp_path / "closed").read_text().count("closed") == 4
    assert not [*tmp_path.glob("runs/*/evaluation/*.json")]  # what is mended is measured again


def test_a_reward_without_answers_trains_and_is_compared(tiny_model_path: Path, tmp_path: Path) -> None:
    ended = _train(tiny_model_path, tmp_path, fails=False)
    assert ended.returncode == 0, ended.stdout[-1500:] + ended.stderr[-3000:]
    (report,) = tmp_path.glob("runs/*/report/report.md")
    text = report.read_text(encoding="utf-8")
    assert "| row | tasks | failed | reward [95% CI] |" in text
    assert "TMEM after RL against TMEM before: reward " in text and "(my_talk.py:16)" in text
    assert "is lost" not in ended.stdout
