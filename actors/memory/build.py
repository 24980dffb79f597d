"""From the name in ``memory.policy`` to an episode's memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from actors.memory.base import Memory, TruncationMemory
from actors.memory.controls import OWN_CARDS, WriteControl
from actors.memory.notes import NotesMemory
from actors.memory.paging import PagingMemory
from actors.memory.parametric import HybridMemory, ParametricMemory
from actors.memory.summary import StateMemory, SummaryMemory
from actors.memory.supervised import ImplicationsMemory, RawMemory, SummaryWriteMemory
from actors.protocols import MemoryFault
from actors.text.retrieval import Embedder, load_embedder
from configs.schema import EmbedderConfig, MemoryConfig, MemoryPolicy, WriteConfig
from configs.user_code import load_extension, owned

_MEMBERS = ("events", "read", "answer")
_REPLY_OPENING = 16  # the chat template's tokens in front of a reply, with room to spare


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a memory may need of its worker."""

    window_tokens: int  # of the engine
    answer_tokens: int  # of the longest answer
    embedder: Callable[[], Embedder]  # loads the sentence embedder


Builder = Callable[[MemoryConfig, WriteConfig, Surroundings], Memory]


def surroundings(window_tokens: int, answer_tokens: int, embedder: EmbedderConfig) -> Surroundings:
    return Surroundings(window_tokens, answer_tokens, partial(load_embedder, embedder))


def build_memory(
    config: MemoryConfig, write: WriteConfig, around: Surroundings, control: WriteControl = OWN_CARDS
) -> Memory:
    """Build the memory of one episode.

    Raises ExtensionError if a custom memory cannot be loaded, MemoryFault if its function fails.
    """
    if (writes_cards := _CARD_MEMORIES.get(config.policy)) is not None:
        return writes_cards(config, write, around.window_tokens, control)
    if config.policy != "custom":
        return _BUILDERS[config.policy](config, write, around)
    builder, whom = custom_memory(config), f"memory.custom={config.custom}"
    with owned(whom, MemoryFault, builder):
        memory = builder(config, write, around)
    if missing := [member for member in _MEMBERS if not hasattr(memory, member)]:
        lacks = f"{type(memory).__name__} without {', '.join(missing)}"
        raise MemoryFault(f"{whom} returned {lacks}: see Memory in actors/memory/base.py")
    return memory


def custom_memory(config: MemoryConfig) -> Builder:
    """Load the user's own function that makes an episode's memory. Raises ExtensionError."""
    return load_extension("memory.custom", config.custom)


_BUILDERS: Mapping[MemoryPolicy, Builder] = {
    "full": lambda config, write, around: TruncationMemory(
        around.window_tokens - around.answer_tokens - _REPLY_OPENING
    ),
    "truncation": lambda config, write, around: TruncationMemory(config.max_context_tokens),
    "summary": lambda config, write, around: SummaryMemory(config),
    "state": lambda config, write, around: StateMemory(config),
    "paging": lambda config, write, around: PagingMemory(config, around.embedder),
    "notes": lambda config, write, around: NotesMemory(config, around.embedder),
    "raw": lambda config, write, around: RawMemory(config, write),
    "summary_write": lambda config, write, around: SummaryWriteMemory(config, write),
    "implications": lambda config, write, around: ImplicationsMemory(config, write),
}
_CARD_MEMORIES: Mapping[MemoryPolicy, Callable[[MemoryConfig, WriteConfig, int, WriteControl], Memory]] = {
    "parametric": ParametricMemory,
    "hybrid": HybridMemory,
}
"""Only they write flashcards, so only they have controls (actors/memory/controls.py)."""
