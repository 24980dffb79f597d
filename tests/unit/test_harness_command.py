"""A harness that is a command: its result, its failures, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from actors.environments.build import build_environment
from actors.text.chat_template import ChatFormat
from configs.load import ConfigError, load_config
from configs.schema import EmbedderConfig, EnvironmentConfig, HarnessConfig
from tests.unit.test_harness import fault, only, play, request_of, rollout_in

PROGRAM = """
import json, os, subprocess, sys
import openai
task = json.loads(sys.stdin.readline())
mode, client = sys.argv[1], openai.OpenAI()
print("a log line")
ask = lambda messages: client.chat.completions.create(model="m", messages=messages).choices[0].message
messages = [{"role": "user", "content": task["payload"]["question"]}]
messages.append(ask(messages))
messages.append({"role": "user", "content": "Are you sure?"})
if mode == "crash":
    print("Traceback: this and that", file=sys.stderr)
    sys.exit("the sandbox is gone")
if mode in ("leaves", "hangs"):
    children = [subprocess.Popen(["sleep", "600"], start_new_session=apart) for apart in (False, True)]
    open(task["payload"]["file"], "w").write(" ".join(str(child.pid) for child in children))
    if mode == "hangs": children[0].wait()
last = ask(messages).content
print({"json": json.dumps({"reward": 0.75}), "broken": "{reward: 1}"}.get(mode, last))
"""


def command(folder: Path, mode: str) -> EnvironmentConfig:
    program, tasks = folder / "agent.py", folder / "tasks.jsonl"
    program.write_text(PROGRAM, encoding="utf-8")
    payload = {"question": "Who moved?", "answer": ["Nora", "she"], "file": str(folder / "children")}
    tasks.write_text("".join(f"{json.dumps(payload)}\n" for _ in range(2)), encoding="utf-8")
    harness = HarnessConfig(command=(sys.executable, str(program), mode), tasks=str(tasks), eval_fraction=0.5)
    return EnvironmentConfig(name="harness", harness=harness)


def gone(folder: Path) -> bool:
    """Whether the children that the program started end soon."""
    children = [int(pid) for pid in (folder / "children").read_text().split()]
    assert len(children) == 2
    for _ in range(100):
        alive = [pid for pid in children if psutil.pid_exists(pid)]
        if not any(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in alive):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(("mode", "reward"), [("json", 0.75), ("leaves", 0.4)])
def test_a_command_gives_its_result_in_its_last_line_and_leaves_nothing_behind(
    chat: ChatFormat, tmp_path: Path, mode: str, reward: float
) -> None:
    trajectory = only(play(chat, command(tmp_path, mode), limit_s=200.0))
    assert trajectory.outcome.reward == pytest.approx(reward)
    assert trajectory.outcome.answers[0].prediction == "Nora, in Lisbon, 2."
    assert mode == "json" or gone(tmp_path)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("crash", r"the harness \S+python\S* \S+agent.py crash exited with status 1: the sandbox is gone$"),
        ("broken", r"its last line is not JSON: \{reward: 1\}"),
    ],
)
def test_a_command_that_fails_is_one_failed_episode(
    chat: ChatFormat, tmp_path: Path, mode: str, message: str
) -> None:
    assert re.search(message, fault(play(chat, command(tmp_path, mode), limit_s=200.0)))


def test_the_home_folder_stands_for_a_tilde_in_a_command(
    chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = command(tmp_path, "json")
    harness = replace(config.harness, command=(sys.executable, "~/agent.py", "json"))
    assert only(play(chat, replace(config, harness=harness), limit_s=200.0)).outcome.reward == 0.75


def test_a_command_that_is_not_there_is_named(chat: ChatFormat, tmp_path: Path) -> None:
    config = command(tmp_path, "json")
    harness = HarnessConfig(command=("no-such-agent", "-x"), tasks=config.harness.tasks)
    message = fault(play(chat, EnvironmentConfig(name="harness", harness=harness)))
    assert "environment.harness.command=no-such-agent -x cannot be started" in message


def test_a_command_is_killed_with_its_children_when_its_episode_is_given_up(
    chat: ChatFormat, tmp_path: Path
) -> None:
    environment = build_environment(command(tmp_path, "hangs"), EmbedderConfig())

    async def give_up() -> None:
        rollout = rollout_in(chat, environment, 200.0)
        playing = asyncio.create_task(rollout.group(request_of(environment)))
        while not (tmp_path / "children").exists() and not playing.done():
            await asyncio.sleep(0.05)
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing

    asyncio.run(give_up())
    assert gone(tmp_path)


def test_settings_that_make_no_harness() -> None:
    for settings, message in (
        (
            ["environment.name=harness"],
            "environment.harness.command=.* is not allowed: .*or else harness.fun",
        ),
        (
            ["environment.name=harness", "environment.harness.command=[python,a.py]"],
            "environment.harness.tasks=.* a .jsonl file, hub:org/name, or package.module:name",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(None, settings)
