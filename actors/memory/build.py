"""From the config's name to a memory policy."""

from __future__ import annotations

from actors.memory.base import Memory
from actors.memory.parametric import ParametricMemory
from actors.memory.truncation import TruncationMemory
from configs.schema import MemoryConfig, WriteConfig


def build_memory(config: MemoryConfig, write: WriteConfig) -> Memory:
    """The policy that ``config.policy`` says; shared by all the episodes that use it."""
    return ParametricMemory(config, write) if config.policy == "parametric" else TruncationMemory(config)
