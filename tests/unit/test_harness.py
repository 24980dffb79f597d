"""A user's agent harness behind the loopback endpoint: what it sends, what it gets, and what is trained.

The harnesses use the official client. The policy is scripted.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest

from actors.environments.base import Environment
from actors.environments.build import build_environment
from actors.environments.harness_process import _ended
from actors.episodes.recovery import Recovery
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.text.chat_template import ChatFormat
from actors.types import AdapterKey, Generation, Sampling, Task, Trajectory, TrajectoryGroup
from cluster.fleet.episode_journal import GroupJournal
from configs.load import ConfigError, load_config
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


LINE = MODULE[: MODULE.index("# this line")].count("\n") + 1


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


def test_replies_that_were_not_sampled_are_context(chat: ChatFormat, user: ModuleType) -> None:
    def shows(base_url: str, api_key: str, task: Task) -> float:
        example = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]
        messages = [*example, {"role": "user", "content": "2?"}]
        client = user.client_of(base_url, api_key)
        answer = client.chat.completions.create(model="m", messages=messages).choices[0].message
        messages += [answer, {"role": "assistant", "content": "So."}, {"role": "user", "content": "3?"}]
        client.chat.completions.create(model="m", messages=messages)
        return 0.5

    user.shows = shows  # type: ignore[attr-defined]
    (segment,) = only(play(chat, function("shows", "bare"), context=500)).segments
    turns = chat.turns(segment.token_ids.tolist())
    assert [(turn.role, turn.text) for turn in turns[-7:]] == [
        ("user", "1?"),
        ("assistant", "2"),
        ("user", "2?"),
        ("assistant", "Nora, in Lisbon, 1."),
        ("assistant", "So."),
        ("user", "3?"),
        ("assistant", "Nora, in Lisbon, 2."),
    ]
    sampled_ids = [segment.token_ids[span.start : span.end].tolist() for span in segment.spans]
    assert [chat.said(ids) for ids in sampled_ids] == ["Nora, in Lisbon, 1.", "Nora, in Lisbon, 2."]


def test_an_episode_of_a_lost_worker_goes_on_with_the_harness_played_again(
    chat: ChatFormat, user: ModuleType
) -> None:
    environment = build_environment(function("talks", "bare"), EmbedderConfig())
    journal, trajectories = GroupJournal(10**6), []
    for reissued in (False, True):
        rollout = rollout_in(chat, environment)
        recovery = Recovery(journal, reissued, journal.progress("g"))
        group, recovered = asyncio.run(rollout.recoverable_group(request_of(environment), recovery))
        trajectories.append(only(group))
        assert recovered.continued == reissued
    first, second = trajectories
    pairs = list(zip(first.segments, second.segments, strict=True))
    assert len(pairs) >= 3 and all(np.array_equal(one.token_ids, other.token_ids) for one, other in pairs)


def test_siblings_have_channels_of_their_own(chat: ChatFormat, user: ModuleType) -> None:
    group = play(chat, function("talks"), size=4)
    assert len(group.trajectories) == 4 and group.failed == ()


def test_what_a_call_may_ask_for_and_what_is_refused_by_name(chat: ChatFormat, user: ModuleType) -> None:
    trajectory = only(play(chat, function("probes", "bare"), context=500, most=32))
    seen = user.seen
    assert seen["models"] == ["policy"]
    for field in ("n", "temperature", "top_p", "top_k", "seed", "logprobs", "response_format"):
        assert seen[field][0] == 400 and seen[field][1].startswith(f"{field} is not supported"), seen[field]
    assert seen["seed"][1].endswith("environment.harness.ignored_fields=[seed]")
    assert "ignored_fields" not in seen["n"][1]
    assert seen["key"][0] == 401 and "api_key" in seen["key"][1]
    assert seen["path"][0] == 404 and "only /v1/chat/completions" in seen["path"][1]
    assert seen["example"] == seen["nothing new"]
    assert seen["late"] == (400, "messages[2]: a system message can only be the first")
    assert seen["edited"][0] == 409 and seen["edited"][1].startswith("messages[1] is not what was said")
    assert seen["branch"][0] == 409 and seen["branch"][1].startswith("messages[2] is missing")
    assert seen["reply"][0] == 409 and seen["shorter"][0] == 409
    assert seen["nothing new"] == (400, "the last message must be the user's, or a tool's")
    assert seen["retry"] == "Nora, in Lisbon, 1."  # as it was: it is not sampled again
    assert (seen["stream"], seen["finish"]) == ("Nora,", "length")
    (segment,) = trajectory.segments
    assert len(segment.spans) == 2 and seen["usage"] == 3
    assert [turn.text for turn in chat.turns(segment.token_ids.tolist())[-5:]] == [
        "Hello?",
        "Are you there?",
        "Nora, in Lisbon, 1.",
        "Good.",
        "Nora,",
    ]
    assert (trajectory.outcome.reward, trajectory.outcome.reward_parts) == (1.0, {"polite": 0.5})


def test_a_stop_text_ends_the_reply_and_what_is_behind_it_is_not_trained(
    chat: ChatFormat, user: ModuleType
) -> None:
    def stops(base_url: str, api_key: str, task: Task) -> float:
        client = user.client_of(base_url, api_key)
        first = user.asks(client, "Hello?", stop=["Omar", "bon, "]).choices[0]
        history = [{"role": "user", "content": "Hello?"}, first.message, {"role": "user", "content": "And?"}]
        second = client.chat.completions.create(model="m", messages=history).choices[0]
        user.seen["stops"] = (first.message.content, first.finish_reason, second.message.content)
        return 0.5

    user.stops = stops  # type: ignore[attr-defined]
    (segment,) = only(play(chat, function("stops"), context=500)).segments
    assert user.seen["stops"] == ("Nora, in Lis", "stop", "Nora, in Lisbon, 2.")
    said = [segment.token_ids[span.start : span.end].tolist() for span in segment.spans]
    whole = list(chat.reply("Nora, in Lisbon, 1."))
    assert said[0] == whole[: len(said[0])] and chat.decode(said[0]).startswith("Nora, in Lisbon,")
    assert "1" not in chat.decode(said[0])
    assert [turn.role for turn in chat.turns(segment.token_ids.tolist())][-4:] == [
        "user",
        "assistant",
        "user",
        "assistant",
    ]


def test_a_message_longer_than_the_window_is_read_in_pieces(chat: ChatFormat, user: ModuleType) -> None:
    def reads(base_url: str, api_key: str, task: Task) -> float:
        text = " ".join(f"Nora met {name} in Lisbon." for name in range(900)) + " Whom did she meet first?"
        user.asks(user.client_of(base_url, api_key), text)
        return 0.5

    user.reads = reads  # type: ignore[attr-defined]
    trajectory = only(play(chat, function("reads", "bare"), context=1000))
    assert len(trajectory.writes) >= 3
    assert max(len(segment.token_ids) for segment in trajectory.segments) < SURROUNDINGS.window_tokens
    assert "meet first?" in chat.decode(trajectory.segments[-1].token_ids.tolist())


def test_a_second_branch_at_the_same_time_is_refused(chat: ChatFormat, user: ModuleType) -> None:
    only(play(chat, function("parallel", "bare")))
    assert sorted(user.seen["parallel"]) == ["200", "409"]


def test_fields_that_the_run_replaces(chat: ChatFormat, user: ModuleType) -> None:
    def hot(base_url: str, api_key: str, task: Task) -> None:
        user.asks(user.client_of(base_url, api_key), "Hello?", temperature=0.7, extra_body={"top_k": 4})

    user.hot = hot  # type: ignore[attr-defined]
    trajectory = only(play(chat, function("hot", ignored_fields=("temperature", "top_k"))))
    assert trajectory.outcome.answers[0].prediction == "Nora, in Lisbon, 1."  # it said nothing itself
    with pytest.raises(ConfigError, match=r"environment.harness.ignored_fields=.*some of temperature, top_p"):
        load_config(None, ["environment.harness.ignored_fields=[stop]"])


def test_the_turn_limit_ends_the_calls_and_the_harness_may_still_give_its_reward(
    chat: ChatFormat, user: ModuleType
) -> None:
    trajectory = only(play(chat, function("endless", "bare"), max_turns=3))
    assert trajectory.stop_reason == "max_turns" and trajectory.outcome.reward == 7
    assert user.seen["endless"] == (410, "all rollout.max_turns replies are given")


def test_a_harness_that_the_turn_limit_ends_is_scored_by_its_last_reply(
    chat: ChatFormat, user: ModuleType
) -> None:
    trajectory = only(play(chat, function("stubborn"), max_turns=3))
    assert trajectory.stop_reason == "max_turns" and trajectory.outcome.reward == pytest.approx(0.4)
    assert trajectory.outcome.answers[0].prediction == "Nora, in Lisbon, 3."
    assert "gave no reward, and the task has no answer" in fault(
        play(chat, function("stubborn", "bare"), max_turns=3)
    )


@pytest.mark.parametrize(
    ("line", "with_answer", "without"),
    [("1984", "1984", 1984), ("Nora", "Nora", None), ('{"reward": 1}', {"reward": 1}, {"reward": 1})],
)
def test_a_number_in_a_commands_last_line_is_the_answer_where_there_is_one(
    line: str, with_answer: object, without: object
) -> None:
    given = [_ended("agent", 0, line, "", has_answer).result for has_answer in (True, False)]
    assert given == [with_answer, without] and [type(each) for each in given] == [
        type(with_answer),
        type(without),
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", rf"KeyError: 'no such key' \(.*my_harness.py:{LINE}\)"),
        ("silent", r"the harness ended without one call: it must call OPENAI_BASE_URL"),
        ("odd", r"the harness gave rewards: its result must be a number \(the reward\), a text"),
        ("says_nothing", r"the harness gave no reward, and the task has no answer"),
        ("probes.", r"harness.function=.my_harness:probes"),
    ],
)
def test_a_harness_that_fails_is_one_failed_episode(
    chat: ChatFormat, user: ModuleType, name: str, message: str
) -> None:
    if name.endswith("."):
        with pytest.raises(ValueError, match=message):
            function(name)
    else:
        assert re.search(message, fault(play(chat, function(name, "bare"))))


def test_the_answer_is_scored_by_the_task(chat: ChatFormat, user: ModuleType) -> None:
    outcome = only(play(chat, function("answers"))).outcome
    assert outcome.answers[0].gold == ("Nora",) and outcome.answers[0].prediction == "Nora, I say"
    assert outcome.reward == outcome.reward_parts["f1"] == pytest.approx(0.5)


def test_a_harness_that_makes_no_next_call_is_late(chat: ChatFormat, user: ModuleType) -> None:
    started = time.monotonic()
    message = fault(play(chat, function("waits"), limit_s=2.0))
    assert "did not answer within rollout.environment_timeout_s=2" in message
    assert time.monotonic() - started < 50


# --- a command -----------------------------------------------------------------------------------------


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
