"""No memory: the context keeps its last L_max tokens (the rows "no memory", with a large L_max, and "truncation" of the comparison)."""

from __future__ import annotations

from actors.memory.base import Agent
from configs.schema import MemoryConfig


class TruncationMemory:
    """Keeps the system prompt and drops the oldest tokens. What remains opens a new segment, so that each segment is what the engine saw."""

    def __init__(self, config: MemoryConfig) -> None:
        self.max_context_tokens = config.max_context_tokens

    async def relieve(self, agent: Agent, incoming: int) -> None:
        agent.truncate(self.max_context_tokens - incoming)
