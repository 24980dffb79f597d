"""MCP tools: real servers over stdio and HTTP, the real episode machinery, and a scripted policy."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from actors.environments.base import prepare
from actors.environments.build import build_environment
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from actors.types import Task, Trajectory, TrajectoryGroup
from cluster.common.tasks import TaskSource
from configs.load import load_config, to_yaml
from configs.schema import EmbedderConfig, MemoryConfig, RolloutConfig, RunConfig, WriteConfig
from tests.unit import tokenizer_families as families
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, sampled

ROOT = Path(__file__).parents[2]
SERVER = '''
import os, sys, time
from mcp.server.mcpserver import MCPServer

server = MCPServer("shop")

@server.tool()
def price(item: str) -> str:
    """What an item costs."""
    return {"lamp": "It costs 12 crowns."}[item]

@server.tool()
def key() -> str:
    """The key."""
    return os.environ.get("SHOP_KEY", "none") + f" of {os.getpid()}"

@server.tool()
def crash() -> str:
    """Ends the server."""
    os._exit(3)

@server.tool()
def wait() -> str:
    """Takes long."""
    time.sleep(120)
    return "done"

if sys.argv[1:2] == ["broken"]:
    sys.exit("no shop for " + os.environ["SHOP_KEY"])
if sys.argv[1:2] == ["http"]:
    server.run("streamable-http", port=int(sys.argv[2]))
else:
    server.run()
'''
SECRET = "s3cret-of-the-shop"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shop.py").write_text(SERVER)
    records = [{"question": f"What does a {item} cost?", "answer": "12 crowns"} for item in ("lamp", "stool")]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setenv("SHOP_KEY", SECRET)
    return tmp_path


@pytest.fixture(scope="module")
def qwen() -> ChatFormat:
    return ChatFormat(families.byte_level(families.QWEN3_TOOLS, takes_lines=True))


def _config(folder: Path, server: dict[str, Any], **settings: object) -> RunConfig:
    given = {"servers": {"shop": server}, "path": str(folder / "questions.jsonl"), **settings}
    path = folder / "run.yaml"
    path.write_text(json.dumps({"environment": {"name": "mcp", "mcp": given}}))
    return load_config(path, [])


def _stdio(folder: Path, *arguments: str, **more: object) -> dict[str, Any]:
    return {"command": [sys.executable, str(folder / "shop.py"), *arguments], "env": ["SHOP_KEY"], **more}


def _says(name: str, **arguments: object) -> str:
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def _play(
    config: RunConfig, chat: ChatFormat, replies: Callable[[str], str], siblings: int = 1, **rollout: float
) -> TrajectoryGroup:
    """Play the first training task. ``replies``: from the prompt's text to what the policy says."""
    environment = build_environment(config.environment, EmbedderConfig())
    task = TaskSource(environment, "train", 0).at(0)

    def script(prompt_ids: Sequence[int], sampling: Any, adapter: Any) -> Any:
        return sampled(chat.reply(replies(chat.decode(prompt_ids))))

    parts = (ScriptedPolicy(script), ScriptedWriter(), environment, chat, WriteConfig())
    limits = replace(RolloutConfig(), **rollout)  # type: ignore[arg-type]
    memory = MemoryConfig(policy="truncation", max_context_tokens=4000)
    request = RolloutRequest(task, "g", siblings, memory, 1.0, 256, seed=1)
    return asyncio.run(Rollout(*parts, limits, 8, SURROUNDINGS, "b", "w").group(request))


def _one(group: TrajectoryGroup) -> Trajectory:
    assert not group.failed, group.failed
    (trajectory,) = group.trajectories
    return trajectory


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_episode_calls_a_tool_and_answers(folder: Path, qwen: ChatFormat) -> None:
    config = _config(folder, _stdio(folder))
    replies = iter([_says("price", item="lamp"), _says("key"), _says("buy"), "12 crowns"])
    trajectory = _one(_play(config, qwen, lambda prompt: next(replies)))

    (answer,) = trajectory.outcome.answers
    assert (answer.prediction, answer.gold, answer.scores["em"]) == ("12 crowns", ("12 crowns",), 1.0)
    parts = trajectory.outcome.reward_parts
    assert (parts["tool_calls"], parts["malformed_calls"], parts["well_formed"]) == (2, 1, 0)
    (segment,) = trajectory.segments
    ids = tuple(map(int, segment.token_ids))
    told = ChatFormat.with_tools(qwen, _tools(config))
    # a result stands in the template's own turn, to the token, and none of it is trained
    result = told.result("It costs 12 crowns.")
    place = next(n for n in range(len(ids)) if ids[n : n + len(result)] == result)
    assert not segment.action_mask[place : place + len(result)].any()
    said = qwen.decode(int(i) for i in segment.token_ids[np.asarray(segment.action_mask)])
    assert said.startswith("<tool_call>") and said.endswith("12 crowns") and "crowns." not in said
    text = qwen.decode(ids)
    assert '"name": "price"' in text and "there is no tool buy; there are price, key" in text
    assert "Turns left: 5." in text
    # the server got its secret, and the episode does not have it
    pid = re.search(r"\*\*\* of (\d+)", text)
    assert pid is not None and SECRET not in text
    assert not _is_alive(int(pid[1]))


def _tools(config: RunConfig) -> Any:
    environment: Any = build_environment(config.environment, EmbedderConfig())
    session: Any = asyncio.run(_opened(environment, Task("t", "mcp", _PAYLOAD, 0)))
    return session.tools


_PAYLOAD = {"texts": [], "question": "?", "answers": ["x"], "category": "records"}


async def _opened(environment: Any, task: Task) -> Any:
    session = await environment.start(task)
    await session.close()
    return session


def test_a_model_without_tools_plays_too(
    folder: Path, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    server = {"command": [sys.executable, "~/shop.py"], "tools": ["price"]}
    config = _config(folder, server, repeat_question=False, max_turns=2)
    # half a character is a thing that the shop does not have, and no end of its server
    replies = iter([_says("price", item="stool \ud83d"), _says("price", item="lamp")])
    trajectory = _one(_play(config, chat, lambda prompt: next(replies)))
    parts = trajectory.outcome.reward_parts
    assert (parts["tool_errors"], parts["unanswered"], trajectory.outcome.reward) == (1, 1, 0)
    text = chat.decode(int(i) for i in trajectory.segments[0].token_ids)
    assert "You can call these tools:" in text and "Result of the tool:\nError executing tool price" in text
    assert '"key"' not in text and "Turns left" not in text


def test_a_server_that_dies_or_is_late_fails_its_episode_alone(folder: Path, qwen: ChatFormat) -> None:
    config = _config(folder, _stdio(folder), timeout_s=25)
    firsts = iter([_says("crash"), _says("wait"), _says("price", item="lamp")])
    group = _play(
        config, qwen, lambda prompt: "12 crowns" if "12 crowns." in prompt else next(firsts), siblings=3
    )
    assert [trajectory.outcome.reward for trajectory in group.trajectories] == [1.0]
    died, late = sorted(group.failed, key=lambda failed: "longer" in failed.message)
    command = f"the MCP server shop ({sys.executable} {folder}/shop.py)"
    assert died.boundary == late.boundary == "environment"
    assert f"{command}: its tool crash failed: Connection closed" in died.message
    assert f"{command}: its tool wait took longer than environment.mcp.timeout_s=25 s" in late.message


def test_a_server_that_does_not_start_is_named_before_the_first_episode(folder: Path) -> None:
    config = _config(folder, _stdio(folder, "broken"))
    environment = build_environment(config.environment, EmbedderConfig())
    with pytest.raises(TaskError) as raised:
        prepare(environment)
    message = str(raised.value)
    assert "shop.py broken): its start failed: Connection closed; it said: no shop for ***" in message
    missing = _config(folder, {"command": ["no-such-program"]}).environment
    with pytest.raises(TaskError, match=r"shop \(no-such-program\): its start failed: No such file"):
        prepare(build_environment(missing, EmbedderConfig()))
    unset = _config(folder, {"command": ["x"], "env": ["NOT_SET_HERE"]}).environment
    with pytest.raises(TaskError, match="the environment variable NOT_SET_HERE is not set"):
        prepare(build_environment(unset, EmbedderConfig()))


def test_a_start_that_is_given_up_leaves_no_process(folder: Path, qwen: ChatFormat) -> None:
    mark = f"import time; time.sleep(120)  # {folder}"
    config = _config(folder, {"command": [sys.executable, "-c", mark]})
    (failed,) = _play(config, qwen, lambda prompt: "", environment_timeout_s=1.0).failed
    assert "start did not answer within rollout.environment_timeout_s=1 s" in failed.message
    deadline = time.monotonic() + 20
    while any(mark in process.cmdline() for process in psutil.Process().children(recursive=True)):
        assert time.monotonic() < deadline, "the server outlived its episode"
        time.sleep(0.2)


def test_secrets_are_names_in_the_configuration(folder: Path) -> None:
    config = _config(folder, _stdio(folder))
    assert "SHOP_KEY" in to_yaml(config) and SECRET not in to_yaml(config)
    for server in ({"command": ["x"], "env": {"SHOP_KEY": SECRET}}, {"url": f"http://me:{SECRET}@host/mcp"}):
        with pytest.raises(ValueError, match=r"environment\.mcp\.servers\.shop") as raised:
            _config(folder, server)
        assert SECRET not in str(raised.value)


@pytest.fixture
def over_http(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(folder / "shop.py"), "http", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/mcp", process
        process.kill()


def test_a_server_over_http(
    folder: Path, qwen: ChatFormat, over_http: tuple[str, subprocess.Popen[bytes]]
) -> None:
    url, process = over_http
    config = _config(folder, {"url": url, "headers": {"Authorization": "SHOP_KEY"}}, timeout_s=10)
    replies = iter([_says("price", item="lamp"), "12 crowns"])
    assert _one(_play(config, qwen, lambda prompt: next(replies))).outcome.reward == 1.0

    def dies(prompt: str) -> str:
        process.kill()
        process.wait()
        return _says("price", item="lamp")

    (failed,) = _play(config, qwen, dies).failed
    assert f"the MCP server shop ({url}): its tool price failed" in failed.message
    (failed,) = _play(config, qwen, dies).failed
    assert f"the MCP server shop ({url}): its start failed" in failed.message


def test_the_worked_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: ChatFormat) -> None:
    """The files and the settings of actors/README.md, played by a scripted policy."""
    text = (ROOT / "actors" / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Tools of MCP servers\n")[1].split("\n## ")[0]
    blocks = dict(re.findall(r"```(python|json|sh)\n(.*?)```", section, re.DOTALL))
    (tmp_path / "shop.py").write_text(blocks["python"])
    (tmp_path / "questions.jsonl").write_text(blocks["json"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    words = shlex.split(blocks["sh"].replace("\\\n", " "))
    assert words[:3] == ["engram", "train", "quickstart"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", words[3:])

    def replies(prompt: str) -> str:
        item = "lamp" if "a lamp cost" in prompt else "stool"
        found = re.search(r"Result of the tool:\n(\d+ crowns)", prompt)
        return found[1] if found else _says("price", item=item)

    trajectory = _one(_play(config, chat, replies))
    assert trajectory.outcome.reward == 1.0 and trajectory.outcome.reward_parts["tool_calls"] == 1
