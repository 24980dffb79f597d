"""The worked example of "Bring your own", as it stands in a README: from a user's module to a trained policy.

It runs as ``engram`` in a folder whose files have the names of Engram's packages.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADING = "\n## Your own parts\n"
SMALL = [
    "learner.trainable_layers=3",
    "train.steps=1",
    "train.tasks_per_step=2",
    "train.group_size=2",
    "warm_start.steps=0",
    "evaluation.tasks=2",
    "evaluation.bootstrap_samples=100",
    "memory.max_extract_tokens=24",
    "sampling.max_answer_tokens=8",
    "engine.slots=4",
    "engine.kv_cache_gib=0.2",
    "ray.object_store_gib=0.5",
]


def example() -> tuple[str, list[str]]:
    """The module and the settings of its command."""
    texts = [
        (ROOT / name).read_text("utf-8")
        for name in ("README.md", "actors/README.md")
        if (ROOT / name).exists()
    ]
    (section,) = (text.split(HEADING)[1].split("\n## ")[0] for text in texts if HEADING in text)
    module = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    command = re.search(r"```sh\n(?:python -m cluster|engram) train \S+ (.*?)\n```", section, re.DOTALL)
    assert module is not None and command is not None
    return module[1], shlex.split(command[1].replace("\\\n", " "))


def test_the_worked_example_trains(tiny_model_path: Path, tmp_path: Path) -> None:
    module, settings = example()
    assert module.count("\n") <= 60
    (tmp_path / "my_tasks.py").write_text(module, encoding="utf-8")
    for name in ("cluster.py", "actors.py", "learner.py", "configs/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise RuntimeError('this is the user\\'s own module')\n")
    script = tmp_path / "bin" / "engram"  # as the console script that pip writes
    script.parent.mkdir()
    script.write_text("from cluster.cli import console_script\nconsole_script()\n")

    command = [
        sys.executable,
        script,
        "train",
        "quickstart",
        *settings,
        *SMALL,
        f"model.name={tiny_model_path}",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
    )
    assert ended.returncode == 0, ended.stdout[-1500:] + ended.stderr[-3000:]
    (row,) = tmp_path.glob("runs/*/evaluation/after_rl.json")
    episodes = json.loads(row.read_text(encoding="utf-8"))
    assert "How many lamps are in the shop?" in json.dumps(episodes)
