"""A user's agent harness behind the loopback endpoint: what it sends, what it gets, and what is trained.

The harnesses use the official client. The policy is scripted.
"""

from __future__ import annotations

import asyncio
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from actors.environments.base import Environment
from actors.environments.build import build_environment
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.text.chat_template import ChatFormat
from actors.types import AdapterKey, Generation, Sampling, Task, Trajectory, TrajectoryGroup
from configs.load import load_config
from configs.schema import (
    EmbedderConfig,
    EnvironmentConfig,
    HarnessConfig,
    MemoryConfig,
    RolloutConfig,
    WriteConfig,
)
from configs.shipped import shipped
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, sampled

ROOT = Path(__file__).parents[2]
CARDS = '[{"instruction": "Who moved?", "output": "Nora"}]'
MODULE = '''
import asyncio, json, time
import openai
from actors.environments.base import Observation
from actors.text.tools import Tool
from actors.types import Outcome

SYSTEM = "You are a clerk."
TURNS = ["Nora moved to Lisbon. " * 3, "Omar bakes bread. " * 3, "Who lives in Lisbon?", "And who bakes?"]
seen = {}

def tasks(split):
    return [{"question": "Who lives in Lisbon?", "answer": "Nora", "place": place} for place in range(3)]

def bare(split): return [{"place": place} for place in range(3)]

async def talks(base_url, api_key, task):
    """Tells and asks, turn by turn; resends the whole history."""
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key)
    messages = [{"role": "system", "content": SYSTEM}]
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        answer = await client.chat.completions.create(model="gpt", messages=messages)
        messages.append(answer.choices[0].message)
    seen[task.id] = answer
    return 0.25

class Same:
    """The same talk as an ordinary environment."""
    name, system_prompt = "harness", SYSTEM
    def __init__(self, options): pass
    def tasks(self, split, seed, start): return iter(())
    def start(self, task): return SameSession()

class SameSession:
    question = ""
    def __init__(self): self.turns = list(reversed(TURNS))
    def observe(self): return Observation(self.turns.pop(), True) if self.turns else None
    def act(self, text): pass
    def outcome(self): return Outcome(0.25, {}, ())

PRICE = {"type": "object", "properties": {"item": {"type": "string"}}}

async def shops(base_url, api_key, task):
    """Gives the policy a tool, runs its calls, and asks for an answer in the end."""
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key)
    price = {"name": "price", "description": "Of an item", "parameters": PRICE}
    tool = {"type": "function", "function": price}
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "What does a lamp cost?"}]
    answer = await client.chat.completions.create(model="m", messages=messages, tools=[tool])
    message = answer.choices[0].message
    (call,) = message.tool_calls
    seen["call"] = (message.content, call.function.name, json.loads(call.function.arguments))
    seen["reason"] = answer.choices[0].finish_reason
    result = {"role": "tool", "tool_call_id": call.id, "content": "7 dollars"}
    for key, wrong in (("id", [{**result, "tool_call_id": "call_9"}]), ("tools", [result])):
        offered = [tool] if key == "id" else []
        sent = [*messages, message, *wrong]
        try: await client.chat.completions.create(model="m", messages=sent, tools=offered)
        except openai.APIStatusError as error: seen[key] = (error.status_code, error.body["message"])
    messages += [message, result, {"role": "user", "content": "Say it in words."}]
    stream = await client.chat.completions.create(model="m", messages=messages, tools=[tool], stream=True)
    chunks = [chunk async for chunk in stream]
    seen["answer"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return 1.0

def anew(base_url, api_key, task):
    """Keeps its history as another program's objects, and so writes the calls' arguments anew."""
    client = client_of(base_url, api_key)
    tool = {"type": "function", "function": {"name": "price", "parameters": PRICE}}
    messages = [{"role": "user", "content": "What does a lamp cost?"}]
    def ask():
        answer = client.chat.completions.create(model="m", messages=messages, tools=[tool])
        return answer.choices[0].message
    (call,) = ask().tool_calls
    arguments = json.loads(call.function.arguments)
    seen["arguments"] = arguments
    edited = seen.get("edit", {})
    turned = {name: arguments[name] for name in reversed(arguments)} | {"most": 3} | edited
    function = {"name": "price", "arguments": json.dumps(turned, separators=(",", ":"))}
    calls = [{"id": call.id, "type": "function", "function": function}]
    messages.append({"role": "assistant", "content": None, "tool_calls": calls})
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "7 dollars"})
    seen["anew"] = ask().content
    return 1.0

class SameShop:
    name, system_prompt = "harness", SYSTEM
    def __init__(self, options): pass
    def tasks(self, split, seed, start): return iter(())
    def start(self, task): return SameShopSession()

class SameShopSession(SameSession):
    tools = (Tool("price", "Of an item", PRICE),)
    def __init__(self): self.turns = [
        Observation("Say it in words.", True), Observation("7 dollars", False, role="tool"),
        Observation("What does a lamp cost?", True)]
    def observe(self): return self.turns.pop() if self.turns else None

def client_of(base_url, api_key): return openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)

def asks(client, *texts, **options):
    messages = [{"role": "user", "content": text} for text in texts]
    return client.chat.completions.create(model="m", messages=messages, **options)

def refused(work):
    try: work()
    except openai.APIStatusError as error: return error.status_code, error.body["message"]
    raise AssertionError("it was not refused")

def probes(base_url, api_key, task):
    client = client_of(base_url, api_key)
    said = {}
    said["models"] = [model.id for model in client.models.list()]
    fields = dict(n=2, temperature=0.3, top_p=0.5, seed=1, logprobs=True)
    for field, value in {**fields, "response_format": {"type": "json_object"}}.items():
        said[field] = refused(lambda: asks(client, "Hello?", **{field: value}))
    said["top_k"] = refused(lambda: asks(client, "Hello?", extra_body={"top_k": 4}))
    said["key"] = refused(lambda: asks(client_of(base_url, "another"), "Hello?"))
    said["path"] = refused(lambda: client.embeddings.create(model="m", input="a"))
    example = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]
    said["example"] = refused(lambda: client.chat.completions.create(model="m", messages=example))
    late = [*example, {"role": "system", "content": "Be kind."}, {"role": "user", "content": "2?"}]
    said["late"] = refused(lambda: client.chat.completions.create(model="m", messages=late))
    first = asks(client, "Hello?", "Are you there?", max_tokens=10**6)
    reply = {"role": "assistant", "content": first.choices[0].message.content}
    known = [{"role": "user", "content": "Hello?"}, {"role": "user", "content": " Are you there?\\n"}, reply]
    def again(*messages, **options):
        return client.chat.completions.create(model="m", messages=messages, **options)
    new = {"role": "user", "content": "Good."}
    said["edited"] = refused(lambda: again(known[0], {"role": "user", "content": "Are you?"}, reply, new))
    said["branch"] = refused(lambda: again(*known[:2]))
    said["reply"] = refused(lambda: again(*known[:2], {"role": "assistant", "content": "No."}, new))
    said["shorter"] = refused(lambda: again(new))
    said["nothing new"] = refused(lambda: again(*known))
    retry = again(*known[:2], extra_headers={"x-stainless-retry-count": "1"})
    said["retry"] = retry.choices[0].message.content
    parts = [{"type": "text", "text": "Good."}]
    options = dict(stream=True, max_tokens=3, stop=["Lis"], stream_options={"include_usage": True})
    chunks = list(again(*known, {"role": "user", "content": parts}, **options))
    said["stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    said["finish"] = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]
    said["usage"] = chunks[-1].usage.completion_tokens
    seen.update(said)
    return {"reward": 1, "parts": {"polite": 0.5}}

async def parallel(base_url, api_key, task):
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    messages = [{"role": "user", "content": "Hello?"}]
    both = [client.chat.completions.create(model="m", messages=messages) for _ in range(2)]
    answers = await asyncio.gather(*both, return_exceptions=True)
    seen["parallel"] = [str(getattr(answer, "status_code", 200)) for answer in answers]
    return 0.5

def endless(base_url, api_key, task):
    client, texts, messages = client_of(base_url, api_key), 0, []
    while True:
        messages.append({"role": "user", "content": "And?"})
        try: answer = client.chat.completions.create(model="m", messages=messages)
        except openai.APIStatusError as error:
            seen["endless"] = (error.status_code, error.body["message"])
            return len(messages)
        messages.append(answer.choices[0].message)

def stubborn(base_url, api_key, task):
    client, messages = client_of(base_url, api_key), []
    while True:
        messages.append({"role": "user", "content": "And?"})
        messages.append(client.chat.completions.create(model="m", messages=messages).choices[0].message)

def raises(base_url, api_key, task):
    asks(client_of(base_url, api_key), "Hello?")
    return {}["no such key"]  # this line

def silent(base_url, api_key, task): return 1.0
def odd(base_url, api_key, task):
    asks(client_of(base_url, api_key), "Hello?")
    return {"rewards": 1}
def answers(base_url, api_key, task): return asks(client_of(base_url, api_key), "Hello?") and "Nora, I say"
def says_nothing(base_url, api_key, task): asks(client_of(base_url, api_key), "Hello?")
def waits(base_url, api_key, task):
    asks(client_of(base_url, api_key), "Hello?")
    time.sleep(60)
'''


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_harness.py").write_text(MODULE, encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield importlib.import_module("my_harness")
    sys.path.remove(str(folder))


class Talk:
    """A scripted policy: cards where it is asked for them, else a reply with the number of the sample."""

    def __init__(self, chat: ChatFormat, says: Sequence[str]) -> None:
        self.chat, self.says, self.samples = chat, says, 0

    def __call__(self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        if sampling.kind == "extract":
            return sampled(self.chat.reply(CARDS))
        self.samples += 1
        text = self.says[self.samples - 1] if self.says else f"Nora, in Lisbon, {self.samples}."
        ids = self.chat.reply(text)
        if len(ids) > sampling.max_tokens:
            cut = sampled(ids[: sampling.max_tokens])
            return Generation(cut.token_ids, cut.logprobs, "length")
        return sampled(ids)


def rollout_in(
    chat: ChatFormat,
    environment: Environment,
    limit_s: float = 30.0,
    max_turns: int = 64,
    says: Sequence[str] = (),
) -> Rollout:
    return Rollout(
        ScriptedPolicy(Talk(chat, says)),
        ScriptedWriter(),
        environment,
        chat,
        WriteConfig(),
        RolloutConfig(environment_timeout_s=limit_s, max_turns=max_turns),
        8,
        SURROUNDINGS,
        "basis",
        "worker-0",
    )


def request_of(environment: Environment, size: int = 1, most: int = 64, context: int = 60) -> RolloutRequest:
    task = next(environment.tasks("train", 0, 0), Task("harness-train-0-0", "harness", {}, 7))
    return RolloutRequest(task, "g", size, MemoryConfig(max_context_tokens=context), 1.0, most, seed=1)


def play(
    chat: ChatFormat,
    config: EnvironmentConfig,
    size: int = 1,
    limit_s: float = 30.0,
    most: int = 64,
    context: int = 60,
    max_turns: int = 64,
    says: Sequence[str] = (),
) -> TrajectoryGroup:
    environment = build_environment(config, EmbedderConfig())
    rollout = rollout_in(chat, environment, limit_s, max_turns, says)
    return asyncio.run(rollout.group(request_of(environment, size, most, context)))


def function(name: str, tasks: str = "tasks", **options: Any) -> EnvironmentConfig:
    harness = HarnessConfig(function=f"my_harness:{name}", tasks=f"my_harness:{tasks}", **options)
    return EnvironmentConfig(name="harness", harness=harness)


def only(group: TrajectoryGroup) -> Trajectory:
    assert group.failed == ()
    (trajectory,) = group.trajectories
    return trajectory


def fault(group: TrajectoryGroup) -> str:
    (failed,) = group.failed
    assert failed.boundary == "environment"
    return failed.message


def test_a_harness_is_trained_like_the_same_talk_in_an_ordinary_environment(
    chat: ChatFormat, user: ModuleType
) -> None:
    mine = only(play(chat, function("talks", "bare")))
    same = EnvironmentConfig(name="custom", custom="my_harness:Same")
    theirs = only(play(chat, same))
    assert len(mine.writes) == len(theirs.writes) >= 2  # past L_max
    assert len(mine.segments) == len(theirs.segments) >= 3
    for one, other in zip(mine.segments, theirs.segments, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)
        assert np.array_equal(one.action_mask, other.action_mask)
        assert np.array_equal(one.logprobs, other.logprobs)
        assert (one.spans, one.revision) == (other.spans, other.revision)
    assert [record.flashcards for record in mine.writes] == [record.flashcards for record in theirs.writes]
    assert (mine.outcome.reward, mine.outcome.answers) == (0.25, ())


def test_the_worked_example(chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "actors/README.md").read_text("utf-8").split("\n## An agent harness of your own\n")[1]
    section = section.split("\n## ")[0]
    (tmp_path / "my_agent.py").write_text(section.split("```python\n")[1].split("```")[0], "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    (command,) = re.findall(r"```sh\nengram train quickstart (.*?)\n```", section, re.DOTALL)
    config = load_config(shipped()["quickstart"], command.replace("\\\n", " ").split())
    trajectory = only(play(chat, config.environment, most=16, context=100))
    assert sum(span.kind == "act" for segment in trajectory.segments for span in segment.spans) == 4
    assert len(trajectory.writes) == 1
    assert trajectory.outcome.answers[0].prediction == "Nora, in Lisbon, 4."


def test_tools_stand_in_the_prompt_and_calls_come_back_in_the_protocols_form(
    chat: ChatFormat, user: ModuleType
) -> None:
    call = '<tool_call>{"name": "price", "arguments": {"item": "lamp"}}</tool_call>'
    says = [f"Let me look.\n{call}", "Seven dollars."]
    config = EnvironmentConfig(name="custom", custom="my_harness:SameShop")
    mine, theirs = (
        only(play(chat, each, context=500, says=says)) for each in (function("shops", "bare"), config)
    )
    assert user.seen["call"] == ("Let me look.", "price", {"item": "lamp"})
    assert user.seen["reason"] == "tool_calls" and user.seen["answer"] == "Seven dollars."
    assert user.seen["id"] == (
        400,
        "messages[3].tool_call_id must be the id of a call in the newest reply",
    )
    assert user.seen["tools"][0] == 409 and "the same in all calls" in user.seen["tools"][1]
    (one,), (other,) = mine.segments, theirs.segments
    assert np.array_equal(one.token_ids, other.token_ids) and one.spans == other.spans
    assert "Of an item" in chat.decode(one.token_ids.tolist())


def test_a_call_may_be_sent_again_in_a_form_of_the_clients_own(chat: ChatFormat, user: ModuleType) -> None:
    call = '{"name": "price", "arguments": {"item": "caf\\u00e9 \\ud83d", "most": 3.0}}'
    says = [f"<tool_call>{call}</tool_call>", "Seven dollars."]
    only(play(chat, function("anew", "bare"), context=500, says=says))
    assert user.seen["arguments"] == {"item": "caf\u00e9 \ufffd", "most": 3.0}
    assert user.seen["anew"] == "Seven dollars."
    user.seen["edit"] = {"most": 4}
    said = fault(play(chat, function("anew", "bare"), context=500, says=says))
    assert "409" in said and "messages[1] is not what was said in this episode" in said
