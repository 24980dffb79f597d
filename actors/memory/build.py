"""From the config's name to an episode's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from actors.embedder import load_embedder
from actors.memory.base import Memory
from actors.memory.parametric import ParametricMemory
from actors.memory.truncation import TruncationMemory
from actors.retrieval import Embedder
from configs.schema import EmbedderConfig, MemoryConfig, WriteConfig

_REPLY_OPENING = 16  # the chat template's tokens in front of a reply, with room to spare


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a memory may need of the worker it runs on: the engine's window, the longest answer (tokens), and the sentence embedder, loaded when asked for."""

    window_tokens: int
    answer_tokens: int
    embedder: Callable[[], Embedder]


def surroundings(window_tokens: int, answer_tokens: int, embedder: EmbedderConfig) -> Surroundings:
    return Surroundings(window_tokens, answer_tokens, partial(load_embedder, embedder))


def build_memory(config: MemoryConfig, write: WriteConfig, surroundings: Surroundings) -> Memory:
    """The memory of one episode, as ``config.policy`` says."""
    if config.policy == "full":
        return TruncationMemory(surroundings.window_tokens - surroundings.answer_tokens - _REPLY_OPENING)
    if config.policy == "truncation":
        return TruncationMemory(config.max_context_tokens)
    return ParametricMemory(config, write)
