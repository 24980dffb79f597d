"""verifiers environments with tools: the real package, the rollout worker's episodes, a scripted policy.

Its ToolEnv makes a tool's schema with the package openai-agents. Where that is left out, as in the lock, a
function of this file makes it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.environments.base import Environment
from actors.text.chat_template import ChatFormat
from actors.text.tools import Tool
from actors.types import Trajectory
from configs.schema import EnvironmentConfig, VerifiersConfig
from tests.unit import tokenizer_families as families
from tests.unit.ecosystem_cases import MODULES, build, ended, failure, first_task, play

TILL = '''
import sys, threading
import verifiers as vf
from datasets import Dataset

together = threading.Barrier(3)

def wait() -> str:
    """Waits for two others."""
    together.wait(60)
    return "they came"

def add(a: int, b: int = 1) -> list:
    """Adds."""
    return [{"type": "text", "text": f"It is {a + b}."}]

async def leave() -> str:
    """Ends the program."""
    sys.exit(7)

class Till(vf.ToolEnv):
    async def env_response(self, messages, state, **kwargs):
        if state["answer"] == "grows" and len(state["trajectory"]) == 1:
            state["tool_defs"] = state["tool_defs"][:1]
        return await super().env_response(messages, state, **kwargs)

def said(completion): return float(len(completion))

def load_environment(answer="x"):
    text = lambda said: [{"type": "text", "text": said}]
    call = [{"id": "0", "name": "add", "arguments": "{}"}]
    examples = [
        {"role": "user", "content": text("Say 2.")},
        {"role": "assistant", "content": text(""), "tool_calls": call},
        {"role": "tool", "tool_call_id": "0", "content": text("2")},
        {"role": "user", "content": text("Again.")},
    ]
    rows = [{"prompt": examples, "answer": answer}] * 2
    return Till(tools=[wait, add, leave], dataset=Dataset.from_list(rows), rubric=vf.Rubric(funcs=[said]))
'''


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("tools")
    (folder / "my_till.py").write_text(TILL, encoding="utf-8")
    (folder / "my_prices.py").write_text(MODULES["my_prices"], encoding="utf-8")
    sys.path.insert(0, str(folder))
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("agents") is None:
            schemas = ModuleType("agents.function_schema")
            schemas.function_schema = _schema  # type: ignore[attr-defined]
            patch.setitem(sys.modules, "agents", ModuleType("agents"))
            patch.setitem(sys.modules, "agents.function_schema", schemas)
        yield
    sys.path.remove(str(folder))
    for name in ("my_till", "my_prices"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def qwen() -> ChatFormat:
    return ChatFormat(families.byte_level(families.QWEN3_TOOLS, takes_lines=True))


def _schema(function: Callable[..., object]) -> SimpleNamespace:
    names = list(inspect.signature(function).parameters)
    schema = {"type": "object", "properties": {name: {} for name in names}, "required": names}
    return SimpleNamespace(description=function.__doc__, params_json_schema=schema, strict_json_schema=True)


def _environment(name: str, **args: object) -> Environment:
    config = VerifiersConfig(id=name, args=args)
    return build(EnvironmentConfig(name="verifiers", verifiers=config))


def _says(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


async def _tools(environment: Any) -> tuple[Tool, ...]:
    session = await environment.start(first_task(environment))
    await session.close()
    tools: tuple[Tool, ...] = session.tools
    return tools


def _one(chat: ChatFormat, environment: Environment, replies: list[str]) -> Trajectory:
    said = iter(replies)
    task = first_task(environment)
    (episode,) = ended(play(chat, environment, task, lambda _: next(said), siblings=1, context=4000))
    return episode


def test_the_worked_example_is_told_called_and_scored(qwen: ChatFormat) -> None:
    environment = _environment("my_prices")
    answer = first_task(environment).payload["answer"]
    item = {"12 crowns": "lamp", "30 crowns": "stool"}[str(answer)]
    episode = _one(qwen, environment, [_says("price", item=item), _says("price", item="bed"), str(answer)])
    assert episode.outcome.reward == 1.0
    counted = {"right": 1.0, "num_turns": 3.0, "total_tool_calls": 2.0, "price_calls": 2.0}
    assert episode.outcome.reward_parts == counted
    (segment,) = episode.segments
    ids = tuple(map(int, segment.token_ids))
    told = qwen.with_tools(asyncio.run(_tools(environment)))
    for result in (str(answer), "'bed'"):  # what the tool raises is told, as in verifiers
        turn = told.result(result)
        place = next(n for n in range(len(ids)) if ids[n : n + len(turn)] == turn)
        assert not segment.action_mask[place : place + len(turn)].any(), "a result is never trained"
    said = qwen.decode(int(i) for i in segment.token_ids[np.asarray(segment.action_mask)])
    assert said.startswith("<tool_call>") and said.endswith(str(answer))
    assert '"name": "price"' in qwen.decode(ids).split("What does")[0], "the system turn tells the tool"


def test_a_call_that_cannot_be_read_is_an_answer_and_a_model_without_tools_plays_too(
    chat: ChatFormat,
) -> None:
    episode = _one(chat, _environment("my_prices"), ['<tool_call>{"name": "price", "argu'])
    assert episode.outcome.reward_parts["total_tool_calls"] == 0.0 and episode.outcome.reward == 0.0
    assert "You can call these tools:" in chat.decode(episode.segments[0].token_ids)


def test_examples_and_parts_of_messages_are_told(qwen: ChatFormat) -> None:
    episode = _one(qwen, _environment("my_till"), [_says("add", a=2), _says("add", a=4, b=2), "done"])
    text = qwen.decode(episode.segments[0].token_ids)
    assert "Say 2." in text and 'assistant: <tool_call>{"name": "add", "arguments": {}}' in text
    assert re.search(r"It is 3\..*It is 6\.", text, re.DOTALL)


def test_siblings_wait_for_slow_tools_at_the_same_time(chat: ChatFormat) -> None:
    environment = _environment("my_till")
    before = threading.active_count()

    def reply(last: str) -> str:
        return "done" if "they came" in last else _says("wait")

    episodes = ended(play(chat, environment, first_task(environment), reply, siblings=3))
    assert {episode.outcome.reward_parts["wait_calls"] for episode in episodes} == {1.0}
    assert threading.active_count() <= before + 1, "each call's thread has ended; the loop of all stays"


def test_tools_that_end_the_program_or_change_fail_their_own_episode(chat: ChatFormat) -> None:
    environment = _environment("my_till")
    message = failure(play(chat, environment, first_task(environment), lambda _: _says("leave")))
    assert re.search(r"verifiers\.id=my_till: SystemExit: 7 \(my_till\.py:\d+\)$", message)
    episode = _one(chat, environment, [_says("add", a=1), "done"])  # the loop of all sessions goes on
    assert episode.outcome.reward_parts["num_turns"] == 2.0
    grows = _environment("my_till", answer="grows")
    message = failure(play(chat, grows, first_task(grows), lambda _: _says("add", a=1)))
    assert "it changes its tools in mid-episode" in message
