"""Groups of four recall episodes that a scripted policy plays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from actors.environments.recall import RecallEnvironment, RecallSession
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.protocols import FastWeightWriter
from actors.text.chat_template import ChatFormat
from actors.types import (
    AdapterKey,
    Generation,
    Outcome,
    Sampling,
    Task,
    TrajectoryGroup,
)
from configs.schema import MemoryConfig, RecallConfig, RolloutConfig, WriteConfig
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, sampled

CARDS = '[{"instruction": "Who moved?", "output": "Nora"}]'
RECALL = RecallConfig(sessions=2, facts_per_session=4, questions=2, filler_sentences=1)
ENVIRONMENT = RecallEnvironment(RECALL)
TASK = next(ENVIRONMENT.tasks("train", 0, 0))
MEMORY = MemoryConfig(max_context_tokens=50)
Script = Callable[[Sequence[int], Sampling, AdapterKey], Generation]


def talk(chat: ChatFormat) -> Script:
    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        return sampled(chat.reply(CARDS if sampling.kind == "extract" else "Lisbon"))

    return script


def rollout_of(
    chat: ChatFormat,
    policy: ScriptedPolicy,
    writer: FastWeightWriter,
    slots: int = 8,
    timeout_s: float = 30,
    environment: RecallEnvironment = ENVIRONMENT,
) -> Rollout:
    config = RolloutConfig(episode_timeout_s=timeout_s)
    return Rollout(
        policy, writer, environment, chat, WriteConfig(), config, slots, SURROUNDINGS, "basis", "worker-0"
    )


def request(group_id: str = "g", group_size: int = 4, seed: int = 1) -> RolloutRequest:
    return RolloutRequest(TASK, group_id, group_size, MEMORY, temperature=1.0, max_answer_tokens=8, seed=seed)


def group_in(
    chat: ChatFormat, environment: RecallEnvironment, slots: int = 8, timeout_s: float = 30
) -> TrajectoryGroup:
    """Play one group in ``environment``."""
    policy, writer = ScriptedPolicy(talk(chat)), ScriptedWriter()
    return asyncio.run(rollout_of(chat, policy, writer, slots, timeout_s, environment).group(request()))


def with_outcome(change: Callable[[Outcome], Outcome]) -> RecallEnvironment:
    """The recall environment, with ``change`` done to each outcome."""

    class Changed(RecallSession):
        def outcome(self) -> Outcome:
            return change(super().outcome())

    class Changing(RecallEnvironment):
        def start(self, task: Task) -> RecallSession:
            return Changed(task)

    return Changing(RECALL)
