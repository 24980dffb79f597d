"""The latest state alone: after every turn the agent writes a state that replaces all that it has seen (MEM1, arXiv 2506.15841).

MEM1 writes state and action in one reply, in a form it is trained for. Ours asks for the state in a turn of its own, before the next turn is read, so
that untrained models and environments with a form of their own can be compared; what is kept is the same.
"""

from __future__ import annotations

from collections import Counter

from actors.memory.base import Agent, user_turns
from actors.memory.summary import Summary
from configs.schema import MemoryConfig


class StateMemory:
    """The row "MEM1". A turn read, or answered, is consolidated into the state before the next one comes."""

    def __init__(self, config: MemoryConfig) -> None:
        self.events: Counter[str] = Counter()
        self._limit = config.max_context_tokens
        self._state = Summary(config)

    async def read(self, agent: Agent, text: str) -> None:
        for turn in user_turns(text, agent.chat, self._limit):
            await self._consolidate(agent)
            agent.context.observe(turn)
        await self._consolidate(agent)

    async def answer(self, agent: Agent, text: str, max_tokens: int) -> str:
        await self._consolidate(agent)
        agent.context.observe(agent.chat.user(text))
        return await agent.reply("act", max_tokens)

    async def _consolidate(self, agent: Agent) -> None:
        if agent.context.is_fresh:
            return
        self.events[await self._state.rewrite(agent)] += 1
        agent.clear(self._state.remembered)
