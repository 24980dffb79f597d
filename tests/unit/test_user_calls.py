"""Calls of a user's session: their deadline, their thread, and faults of a memory or a reward."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from actors.protocols import EngineError
from actors.text.chat_template import ChatFormat
from actors.types import AdapterKey, Generation, Sampling, Task, TrajectoryGroup
from configs.schema import MemoryConfig
from tests.unit.rollout_fakes import ScriptedPolicy
from tests.unit.test_user_code import REQUEST, _play, _rollout, _says, _shop, mine

__all__ = ["mine"]  # fixtures


@pytest.mark.parametrize("session", ["Late", "LateAsync"])
def test_a_call_has_a_deadline_that_says_whom_it_waited_for(
    mine: Any, chat: ChatFormat, session: str
) -> None:
    group = _play(chat, _shop(session), environment_timeout_s=1.0)
    late = re.compile(
        r"task shop-0: the environment shop's act \(my_env\.py:7\d\) did not answer within "
        r"rollout\.environment_timeout_s=1 s: raise it, or give the call a limit of its own"
    )
    assert all(late.fullmatch(failed.message) for failed in group.failed) and len(group.failed) == 3
    assert {failed.boundary for failed in group.failed} == {"environment"}
    assert mine.closed == ["shop-0"] * 3  # also where the session's own thread still hangs
    group = _play(chat, _shop(session), episode_timeout_s=1.0)
    assert {failed.boundary for failed in group.failed} == {"timeout"}
    assert "waiting for task shop-0: the environment shop's act (my_env.py:7" in group.failed[0].message
    assert len(mine.closed) == 6
    mine.gate.set()


@pytest.mark.parametrize("session", ["Meets", "MeetsAsync"])
def test_siblings_wait_at_the_same_time(mine: Any, chat: ChatFormat, session: str) -> None:
    group = _play(chat, _shop(session), replace(REQUEST, group_size=64))
    assert group.failed == () and len(group.trajectories) == 64


def test_an_async_call_that_blocks_stops_no_worker(mine: Any, chat: ChatFormat) -> None:
    async def play() -> TrajectoryGroup:
        running = asyncio.create_task(
            _rollout(chat, _shop("Blocks"), ScriptedPolicy(_says(chat))).group(REQUEST)
        )
        await asyncio.sleep(0.05)
        mine.gate.set()  # never reached where the call holds this loop
        return await running

    assert len(asyncio.run(play()).trajectories) == 3


def test_all_calls_of_a_session_come_from_one_thread(mine: Any, chat: ChatFormat) -> None:
    _play(chat, _shop(), replace(REQUEST, group_size=1))
    assert len(mine.threads) == 6 and len(set(mine.threads)) == 1
    assert mine.threads[0] != threading.get_ident()


def test_a_cancelled_group_closes_its_sessions(mine: Any, chat: ChatFormat) -> None:
    async def play() -> None:
        policy = ScriptedPolicy(_says(chat), delay_s=60)
        running = asyncio.create_task(_rollout(chat, _shop(), policy).group(REQUEST))
        while policy.running < 3:
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(play())
    assert mine.closed == ["shop-0"] * 3


def test_an_episode_that_the_engine_fails_closes_its_session(mine: Any, chat: ChatFormat) -> None:
    def fails(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        raise EngineError("no room")

    group = asyncio.run(_rollout(chat, _shop(), ScriptedPolicy(fails)).group(REQUEST))
    assert {failed.boundary for failed in group.failed} == {"engine"} and mine.closed == ["shop-0"] * 3


@pytest.mark.parametrize(
    ("custom", "failed", "said"),
    [
        ("forgets", 1, "task shop-0: the memory Forgets: KeyError: 'three' (my_env.py:132)"),
        ("quits", 1, "task shop-0: the memory Quits: SystemExit: 4 (my_env.py:162)"),
        ("no_memory", 3, "memory.custom=my_env:no_memory: RuntimeError: no disk (my_env.py:135)"),
    ],
)
def test_a_fault_of_a_users_memory_is_the_memorys(
    mine: Any, chat: ChatFormat, custom: str, failed: int, said: str
) -> None:
    memory = MemoryConfig(policy="custom", custom=f"my_env:{custom}")
    group = _play(chat, _shop(), replace(REQUEST, memory=memory))
    assert [(failure.boundary, failure.message) for failure in group.failed] == [("memory", said)] * failed
    assert len(mine.closed) == 3 - (custom == "no_memory") * 3


def test_an_error_of_the_engine_below_a_users_memory_is_the_engines(mine: Any, chat: ChatFormat) -> None:
    memory = MemoryConfig(policy="custom", custom="my_env:forgets")

    def fails(error: Exception) -> Callable[..., Generation]:
        def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
            raise error

        return script

    rollout = _rollout(chat, _shop(), ScriptedPolicy(fails(EngineError("no room"))))
    group = asyncio.run(rollout.group(replace(REQUEST, memory=memory)))
    assert {failed.boundary for failed in group.failed} == {"engine"}
    rollout = _rollout(chat, _shop(), ScriptedPolicy(fails(KeyError("a typo of ours"))))
    with pytest.raises(KeyError, match="a typo of ours"):
        asyncio.run(rollout.group(replace(REQUEST, memory=memory)))


def test_a_users_reward_may_be_async_and_its_fault_has_its_line(mine: Any, chat: ChatFormat) -> None:
    group = _play(chat, _shop("Scores", reward="slow_reward"), replace(REQUEST, group_size=2))
    assert [trajectory.outcome.reward for trajectory in group.trajectories] == [0.25]
    assert [failed.message for failed in group.failed] == [
        "task shop-0: the environment shop's outcome: ZeroDivisionError: division by zero (my_env.py:65)"
    ]
    group = _play(chat, _shop(reward="reward"))
    said = "task shop-0: environment.reward=my_env:reward: KeyError: 'price' (my_env.py:136)"
    assert [failed.message for failed in group.failed] == [said] * 3
    assert mine.closed == ["shop-0"] * 5


def test_what_cannot_be_encoded_is_cleaned_and_counted(mine: Any, chat: ChatFormat) -> None:
    group = _play(chat, _shop("Halves"), replace(REQUEST, group_size=1))
    (trajectory,) = group.trajectories
    assert trajectory.memory_events["cleaned_texts"] == 3
    assert "caf\ufffd" in chat.decode(trajectory.segments[0].token_ids.tolist())


def test_a_task_may_bring_its_own_system_prompt(mine: Any, chat: ChatFormat) -> None:
    def prompt(task: Task) -> str:
        (trajectory,) = _play(chat, _shop(), replace(REQUEST, group_size=1, task=task)).trajectories
        return chat.turns(trajectory.segments[0].token_ids.tolist())[0].text

    assert prompt(REQUEST.task) == "Count."
    assert prompt(replace(REQUEST.task, system_prompt="Count in dozens.")) == "Count in dozens."
