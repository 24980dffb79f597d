"""No memory: the context keeps its newest tokens (the rows "truncation", and "full context" with the engine's window as the limit)."""

from __future__ import annotations

from actors.memory.base import Agent, ContextMemory


class TruncationMemory(ContextMemory):
    """Keeps the system prompt and drops the oldest tokens. What remains opens a new segment, so that each segment is what the engine saw."""

    async def relieve(self, agent: Agent, incoming: int) -> None:
        self.events["truncations"] += 1
        agent.truncate(self.max_context_tokens - incoming)
