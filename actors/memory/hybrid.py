"""Summary and writes at once: the row "hybrid", MemAgent's memory text with TMEM's T.

The summary is written first, so that with T the identity (write.epochs=0, where no flashcards are asked for) the agent is the summary agent, to the
token.
"""

from __future__ import annotations

from actors.memory.base import Agent, ContextMemory
from actors.memory.parametric import Flashcards
from actors.memory.summary import Summary
from configs.schema import MemoryConfig, WriteConfig


class HybridMemory(ContextMemory):
    """A full context becomes a new summary and a write, and is cleared."""

    def __init__(self, config: MemoryConfig, write: WriteConfig) -> None:
        super().__init__(config.max_context_tokens)
        self._summary = Summary(config)
        self._flashcards = None if write.epochs == 0 else Flashcards(config, write)

    async def relieve(self, agent: Agent, incoming: int) -> None:
        self.events[await self._summary.rewrite(agent)] += 1
        if self._flashcards is None:
            agent.clear(self._summary.remembered)
            return
        text = await self._flashcards.extract(agent)
        agent.clear(self._summary.remembered)
        await self._flashcards.write(agent, text)
