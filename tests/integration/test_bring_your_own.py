"""The README's worked example, as it stands there: a user's environment, reward and advantage estimator through the whole circle."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
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


def _example() -> tuple[str, list[str]]:
    """The module and the settings of the command under "Bring your own"."""
    text = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Bring your own\n")[1].split("\n## ")[0]
    )
    module = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    command = re.search(r"```sh\n(python -m cluster train .*?)\n```", text, re.DOTALL)
    assert module is not None and command is not None
    words = command.group(1).replace("\\\n", " ").split()
    return module.group(1), [
        word.strip("'\"") for word in words[5:]
    ]  # the configuration file is looked for in the user's folder: ours is elsewhere


def test_the_worked_example_trains(tiny_model_path: Path, tmp_path: Path) -> None:
    module, settings = _example()
    assert module.count("\n") < 60
    (tmp_path / "my_tasks.py").write_text(module, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "cluster",
        "train",
        str(ROOT / "configs/quickstart.yaml"),
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
