"""Two steps of RL on three environments at once: tools of an MCP server, a verifiers environment, and recall.

A tiny random model, one Ray cluster, started as a user does. One training episode of the verifiers
environment raises.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.test_bring_your_own import ROOT, SMALL

SHOP = '''
from pathlib import Path
from mcp.server.mcpserver import MCPServer

server = MCPServer("shop")

@server.tool()
def price(item: str) -> str:
    """What an item costs."""
    return "12 crowns"

with Path("started").open("a") as file: file.write("started\\n")
server.run()
'''
WORDS = """
from pathlib import Path
import verifiers as vf
from datasets import Dataset

class Words(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
        if state["answer"] == "train" and not Path("raised").exists():
            Path("raised").touch()
            raise RuntimeError("the dictionary is gone")  # line 10
        return [vf.UserMessage(content="Once more.")]

def letters(completion): return float(sum(len(message.content) for message in completion))

def load_environment():
    rows = [{split: [{"question": f"Say {word}.", "answer": split} for word in ("stone", "river")]}
            for split in ("train", "eval")]
    data = {name: Dataset.from_list(rows[n][split])
            for n, (name, split) in enumerate((("dataset", "train"), ("eval_dataset", "eval")))}
    return Words(max_turns=2, rubric=vf.Rubric(funcs=[letters]), **data)
"""


def _configuration(folder: Path) -> Path:
    (folder / "shop.py").write_text(SHOP, encoding="utf-8")
    (folder / "my_words.py").write_text(WORDS, encoding="utf-8")
    records = [{"question": f"What does a {item} cost?", "answer": "12 crowns"} for item in ("lamp", "stool")]
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    servers = {"shop": {"command": [sys.executable, "shop.py"], "cwd": str(folder)}}
    tools = {"name": "mcp", "mcp": {"path": "questions.jsonl", "servers": servers, "max_turns": 2}}
    tree = yaml.safe_load((ROOT / "tests" / "quickstart.yaml").read_text(encoding="utf-8"))
    recall = tree.pop("environment")
    mix = [
        {"share": 0.3, "name": "shop", "environment": tools},
        {
            "share": 0.4,
            "name": "words",
            "environment": {"name": "verifiers", "verifiers": {"id": "my_words"}},
        },
        {"share": 0.3, "environment": recall},
    ]
    path = folder / "mixed.yaml"
    path.write_text(yaml.safe_dump({**tree, "environment": {"mix": mix}}), encoding="utf-8")
    return path


@pytest.mark.slow
def test_each_environment_of_a_mix_is_trained_and_reported_and_fails_alone(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    settings = [
        "train.steps=2",
        "train.tasks_per_step=3",
        "objective.advantage=tests.integration.advantages:by_place",
        "evaluation.tasks=3",
        "evaluation.memory_off_row=false",
        "tracking.enabled=false",
        f"model.name={tiny_model_path}",
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "cluster", "train", _configuration(tmp_path), *SMALL, *settings],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"}
        | {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"},  # as in a Ray job: Ray's warning of it is noise
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stdout[-1500:] + ended.stderr[-3000:]
    (run,) = (path.parent for path in tmp_path.glob("runs/*/figures.jsonl"))

    # the learner took three groups in each step, of all environments
    lines = [json.loads(line) for line in (run / "figures.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line["figures"] for line in lines if "learner/optimizer_steps" in line["figures"]]
    assert len(steps) == 2 and all(step["learner/optimizer_steps"] > 0 for step in steps)
    members = ("recall", "shop", "words")
    groups = {name: sum(step.get(f"mix/{name}_groups", 0) for step in steps) for name in members}
    assert sum(groups.values()) == 6 and min(groups.values()) >= 1, groups
    episodes = {name: sum(step.get(f"mix/{name}_episodes", 0) for step in steps) for name in members}
    assert episodes == {name: 2 * count for name, count in groups.items()}
    assert max(step.get("mix/words_letters", 0) for step in steps) > 0
    assert max(step.get("mix/shop_unanswered", -1) for step in steps) >= 0

    # the fault: its own episode, and so its group, which the next task replaced
    assert steps[-1]["mix/words_failed_episodes"] == steps[-1]["rollout/failed_episodes_environment"] == 1
    assert not any(step.get(f"mix/{name}_failed_episodes") for step in steps for name in ("recall", "shop"))
    assert "tasks: 7 issued: 1 failed, 6 trained" in ended.stdout and "(1 of words)" in ended.stdout
    assert "is lost" not in ended.stdout

    report = (run / "report" / "report.md").read_text(encoding="utf-8")
    apart = report.split("Scores by environment")[1]
    assert all(f"| {name} | 1 | 0 |" in apart for name in members), apart
    played = len((tmp_path / "started").read_text(encoding="utf-8").splitlines())
    assert played >= 2 * groups["shop"] + 2, "each episode has a server of its own, in both rows too"
