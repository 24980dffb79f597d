"""What a user's environment, reward or memory raises is one failed episode that names their file and line.

What waits stops nobody."""

from __future__ import annotations

import asyncio
import importlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.environments.build import build_environment
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from actors.text.tools import Tool
from actors.types import Generation, Task, TrajectoryGroup
from cluster.train.demonstrations import Demonstrations
from configs.schema import (
    EmbedderConfig,
    EnvironmentConfig,
    MemoryConfig,
    RolloutConfig,
    RunConfig,
    WarmStartConfig,
    WriteConfig,
)
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, sampled

MODULE = """
import asyncio, threading
from actors.environments.base import Observation
from actors.memory.base import TruncationMemory
from actors.types import Answer, Flashcard, Outcome, Task

closed, threads, gate, faults = [], [], threading.Event(), []

class Session:
    question = "How many?"
    def __init__(self, task): self.task, self.turns = task, 2
    def observe(self):
        threads.append(threading.get_ident())
        return Observation("How many?", True) if self.turns else None
    def act(self, text):
        threads.append(threading.get_ident())
        self.turns -= 1
    def outcome(self): return Outcome(0.5, {}, ())
    def close(self):
        threads.append(threading.get_ident())
        closed.append(self.task.id)

class Shop:
    name, system_prompt, session = "shop", "Count.", Session
    def __init__(self, options): self.options = options
    def tasks(self, split, seed, start):
        for position in range(start, 9): yield Task(f"shop-{position}", "shop", {}, 0)
    def start(self, task): return self.session(task)

def first():  # the first sibling that comes here
    faults.append(1)
    return len(faults) == 1

class Parses(Session):
    def act(self, text):
        if first(): int(text)  # line 36
        super().act(text)

class Stops(Session):
    def observe(self):
        if first(): next(iter(()))  # line 41
        return super().observe()

class Exits(Session):
    def act(self, text):
        if first(): raise SystemExit(3)  # line 46
        super().act(text)

class Gathers(Session):
    async def act(self, text):
        async def fails(): raise ConnectionError("no route\\n to the shop")  # line 51
        if first():
            async with asyncio.TaskGroup() as tools: tools.create_task(fails())
        super().act(text)

class Cancels(Session):
    async def act(self, text):
        if first(): raise asyncio.CancelledError  # line 58
        super().act(text)

class Texts(Session):
    def observe(self): return "a text" if first() else super().observe()  # line 62

class Scores(Session):
    async def outcome(self): return 1 / 0 if first() else super().outcome()  # line 65

class Leaves(Session):
    def close(self):
        if first(): raise OSError("the sandbox is gone")  # line 69

class Late(Session):
    def act(self, text): gate.wait(20)  # line 72

class LateAsync(Session):
    async def act(self, text): await asyncio.sleep(20)  # line 75

class Blocks(Session):
    async def act(self, text):
        assert gate.wait(20)
        super().act(text)

class Meets(Session):
    barrier = threading.Barrier(64, timeout=20)
    def act(self, text):
        self.barrier.wait()
        super().act(text)

class MeetsAsync(Session):
    here = 0
    async def act(self, text):
        MeetsAsync.here += 1
        while MeetsAsync.here < 64: await asyncio.sleep(0.001)
        super().act(text)

class Halves(Session):
    question = "How \\udc00 many?"
    def observe(self): return Observation("caf\\ud83d", True) if self.turns else None

class Shops(Shop):
    def tasks(self, split, seed, start):
        for position in range(start, 6):
            if position in (1, 4): raise LookupError("no such shelf")  # line 102
            yield Task(f"shop-{position}", "shop", {}, 0)

class Unsent(Shop):
    def tasks(self, split, seed, start): return iter([Task("a", "shop", {"lock": threading.Lock()}, 0)])

class Dicts(Shop):
    def tasks(self, split, seed, start): return [{"id": "a"}]  # line 109

class AlwaysParses(Session):
    def act(self, text): int(text)

class Reads(Session):
    def observe(self):
        self.turns -= 1
        told = "Three lamps came in, and then two more lamps came in."
        return Observation(told, False) if self.turns else None

class Teaches(Shop):
    session, lost = Reads, False
    def demonstrate_flashcards(self, task, text, blind):
        if self.lost or task.id == "shop-0": [].pop()
        return (Flashcard("How many lamps?", "5"),)

class Broken(Shop):
    def __init__(self, options): options["shelves"]  # line 127

class Forgets(TruncationMemory):
    async def answer(self, agent, text, max_tokens):
        reply = await super().answer(agent, text, max_tokens)
        return {}[reply] if first() else reply  # line 132

def forgets(config, write, around): return Forgets(40)
def no_memory(config, write, around): raise RuntimeError("no disk")  # line 135
def reward(task, outcome): return float(task.payload["price"])  # line 136
async def slow_reward(task, outcome): return 0.25

class Fetches:
    question, turns = "How many?", 1
    def __init__(self, task): self.task = task
    def __getattr__(self, name): return {}[name]  # line 142
    def observe(self): return None
    def act(self, text): pass
    def outcome(self): return Outcome(0.5, {}, ())

class Evaluates(Session):
    def act(self, text):
        if first(): import ast; ast.literal_eval("(")  # line 149
        super().act(text)

class Opens(Shop):
    def start(self, task):
        gate.wait(20)
        return self.session(task)

class Prompts(Shop):
    def tasks(self, split, seed, start): return [Task("shop-1", "shop", {}, 0, system_prompt="Count\\ud83d.")]

class Quits(TruncationMemory):
    async def answer(self, agent, text, max_tokens):
        if first(): raise SystemExit(4)  # line 162
        return await super().answer(agent, text, max_tokens)

def quits(config, write, around): return Quits(40)

class Tells(Session):
    given = ()
    @property
    def tools(self): return self.given() if callable(self.given) else self.given  # line 170

def lost(self): raise LookupError("no such toolbox")  # line 172

class Hears(Session):
    def observe(self): return Observation("How many?", True, heard=self.hear) if self.turns else None
    def hear(self, reply): {}[reply.text]  # line 176

class HearsLate(Hears):
    async def hear(self, reply): await asyncio.sleep(20)  # line 179

class Role(Session):
    role = "system"
    def observe(self): return Observation("How many?", True, role=self.role)  # line 183

from actors.text.tools import Tool

class Sets(Session):
    def __init__(self, task):
        super().__init__(task)
        self.system_prompt, self.tools = "Count lamps alone.", [Tool("shelf", "What is on it?", {})]

class BothFail(Session):
    def act(self, text): int(text)  # line 193
    def close(self): raise OSError("the sandbox is gone")

class TeachesNothing(Teaches):
    session = BothFail
"""
TASK = Task("shop-0", "shop", {}, 0)
REQUEST = RolloutRequest(TASK, "g", 3, MemoryConfig(policy="truncation"), 1.0, 8, seed=1)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "my_env.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "my_typo.py").write_text("x = 1\nclass Shop(:\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("my_env")
    for name in ("my_env", "my_typo"):
        sys.modules.pop(name, None)


def _shop(session: str = "Session", kind: str = "Shop", reward: str = "") -> Any:
    config = EnvironmentConfig(name="custom", custom=f"my_env:{kind}", reward=reward and f"my_env:{reward}")
    environment: Any = build_environment(config, EmbedderConfig())
    getattr(environment, "inner", environment).session = getattr(sys.modules["my_env"], session)
    return environment


def _rollout(chat: ChatFormat, environment: Any, policy: ScriptedPolicy, **rollout: float) -> Rollout:
    config = replace(RolloutConfig(), **rollout)  # type: ignore[arg-type]
    slots, writer = 64, ScriptedWriter()
    return Rollout(policy, writer, environment, chat, WriteConfig(), config, slots, SURROUNDINGS, "b", "w")


def _says(chat: ChatFormat, text: str = "three") -> Callable[..., Generation]:
    return lambda prompt_ids, sampling, adapter: sampled(chat.reply(text))


def _play(
    chat: ChatFormat, environment: Any, request: RolloutRequest = REQUEST, **rollout: float
) -> TrajectoryGroup:
    policy = ScriptedPolicy(_says(chat))
    return asyncio.run(_rollout(chat, environment, policy, **rollout).group(request))


@pytest.mark.parametrize(
    ("session", "said"),
    [
        ("Parses", "act: ValueError: invalid literal for int() with base 10: 'three' (my_env.py:36)"),
        ("Stops", "observe: StopIteration (my_env.py:41)"),
        ("Exits", "act: SystemExit: 3 (my_env.py:46)"),
        ("Gathers", "act: ConnectionError: no route to the shop (my_env.py:51)"),
        ("Cancels", "act: CancelledError (my_env.py:58)"),
        ("Texts", "observe (my_env.py:62) gave str, it must be an Observation or None"),
        ("Scores", "outcome: ZeroDivisionError: division by zero (my_env.py:65)"),
        ("Evaluates", "act: SyntaxError: '(' was never closed (<unknown>, line 1) (my_env.py:149)"),
        ("Leaves", "close: OSError: the sandbox is gone (my_env.py:69)"),
    ],
)
def test_a_fault_of_the_environment_is_one_failed_episode_with_its_line(
    mine: Any, chat: ChatFormat, session: str, said: str
) -> None:
    group = _play(chat, _shop(session))
    assert [failed.boundary for failed in group.failed] == ["environment"]
    assert group.failed[0].message == f"task shop-0: the environment shop's {said}"
    assert len(group.trajectories) == 2 and group.trajectories[0].outcome.reward == 0.5
    assert session == "Leaves" or mine.closed == ["shop-0"] * 3


OPENAI_TOOL = {"type": "function", "function": {"name": "shelf", "parameters": {}}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([OPENAI_TOOL], "gave dict, it must be a Tool(name, description, parameters)"),
        (7, "gave int, it must be a sequence of Tool"),
        (
            [Tool("shelf", None, {})],  # type: ignore[arg-type]
            "gave a name or a description that is none, it must be a text",
        ),
        (
            [Tool("shelf", "What is on it?", {"enum": {"lamp"}})],
            "gave parameters of shelf that are no JSON (Object of type set is not JSON serializable), "
            "it must be a JSON schema",
        ),
        ("lost", "LookupError: no such toolbox (my_env.py:172)"),
    ],
)
def test_a_fault_of_a_sessions_tools_is_its_own(
    mine: Any, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch, given: Any, said: str
) -> None:
    monkeypatch.setattr(mine.Tells, "given", mine.lost if given == "lost" else given)
    group = _play(chat, _shop("Tells"))
    whom = "task shop-0: the environment shop's tools"
    where = ": " if given == "lost" else " (my_env.py:169) "
    assert {failed.message for failed in group.failed} == {f"{whom}{where}{said}"}
    assert [failed.boundary for failed in group.failed] == ["environment"] * 3
    assert mine.closed == ["shop-0"] * 3


def test_a_tools_half_characters_are_cleaned_and_counted(
    mine: Any, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = Tool("shelf\udc00", "caf\ud83d", {"properties": {"lamp\udc00": {"enum": ["\ud83d"]}}})
    monkeypatch.setattr(mine.Tells, "given", (tool,))
    (trajectory,) = _play(chat, _shop("Tells"), replace(REQUEST, group_size=1)).trajectories
    prompt = chat.decode(trajectory.segments[0].token_ids.tolist())
    assert all(text in prompt for text in ("shelf\ufffd", "caf\ufffd", "lamp\ufffd", '["\ufffd"]'))
    assert trajectory.memory_events["cleaned_texts"] == 3


def test_how_a_reply_was_sampled_is_heard_by_the_session_under_its_own_name(
    mine: Any, chat: ChatFormat
) -> None:
    group = _play(chat, _shop("Hears"))
    said = "task shop-0: the environment shop's heard: KeyError: 'three' (my_env.py:176)"
    assert [failed.message for failed in group.failed] == [said] * 3
    late = _play(chat, _shop("HearsLate"), environment_timeout_s=0.5)
    assert {failed.boundary for failed in late.failed} == {"environment"}
    assert (
        "heard (my_env.py:179) did not answer within rollout.environment_timeout_s" in late.failed[0].message
    )


@pytest.mark.parametrize(
    ("role", "said"),
    [
        ("system", "role='system' must be one of user, tool, assistant"),
        ("assistant", "role='assistant' is a reply: it wants no action, wants_action must be False"),
    ],
)
def test_a_role_that_cannot_be_played_is_refused(
    mine: Any, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch, role: str, said: str
) -> None:
    monkeypatch.setattr(mine.Role, "role", role)
    message = _play(chat, _shop("Role")).failed[0].message
    assert message == f"task shop-0: the environment shop's observe: ValueError: {said} (my_env.py:183)"


@pytest.mark.parametrize("reward", ["", "slow_reward"])
def test_a_session_may_set_its_prompt_and_its_tools_where_it_is_made(
    mine: Any, chat: ChatFormat, reward: str
) -> None:
    (trajectory,) = _play(chat, _shop("Sets", reward=reward), replace(REQUEST, group_size=1)).trajectories
    prompt = chat.turns(trajectory.segments[0].token_ids.tolist())[0].text
    assert prompt.startswith("Count lamps alone.") and "What is on it?" in prompt


def test_a_fault_of_close_hides_no_other(mine: Any, chat: ChatFormat, model_path: Path) -> None:
    said = "act: ValueError: invalid literal for int() with base 10: '{}' (my_env.py:193)"
    played = _play(chat, _shop("BothFail")).failed[0].message
    assert played == f"task shop-0: the environment shop's {said.format('three')}"
    config = RunConfig(
        environment=EnvironmentConfig(name="custom", custom="my_env:TeachesNothing"),
        warm_start=WarmStartConfig(steps=1, tasks_per_step=1),
    )
    teacher: Any = build_environment(config.environment, EmbedderConfig())
    with pytest.raises(TaskError, match=re.escape(said.format(""))):
        Demonstrations(config, teacher, model_path).of_step(0)


def test_a_fault_of_looking_for_close_is_the_sessions_own(mine: Any, chat: ChatFormat) -> None:
    group = _play(chat, _shop("Fetches"))
    said = "task shop-0: the environment shop's close: KeyError: 'close' (my_env.py:142)"
    assert [failed.message for failed in group.failed] == [said] * 3


def test_a_session_that_starts_too_late_is_closed_all_the_same(mine: Any, chat: ChatFormat) -> None:
    group = _play(chat, _shop(kind="Opens"), environment_timeout_s=0.2)
    assert len(group.failed) == 3 and mine.closed == []
    mine.gate.set()
    deadline = time.monotonic() + 10
    while len(mine.closed) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
