"""What the parts of the assistant hand to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from actors.fast_weights.delta import Basis
from actors.protocols import AsyncWriter, Policy
from actors.text.chat_template import ChatFormat
from actors.types import FastWeights, FinishReason, Flashcard, Probe, WriteRecord
from configs.models import ResolvedModel
from configs.schema import RunConfig


class AssistantError(ValueError):
    """A user's mistake: a folder that is no memory or another model's, a command that cannot be done. One line."""


@dataclass(frozen=True, slots=True, eq=False)
class Opening:
    """All that is known before an engine starts. ``title`` is what the user named; ``model`` the folder on this machine."""

    title: str
    config: RunConfig
    model: ResolvedModel
    basis: Basis
    system_prompt: str

    @property
    def base_model(self) -> str:
        """What an adapter names as its base: a hub's name, which works elsewhere too, or the folder here."""
        name = self.config.model.name
        return name if name.count("/") == 1 and not Path(name).expanduser().exists() else str(self.model.path)


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What conversations share. ``policy`` keeps its version as long as they live; ``failure`` says why it is dead, "" while it serves."""

    opening: Opening
    policy: Policy
    writer: AsyncWriter
    chat: ChatFormat
    failure: Callable[[], str]


@dataclass(frozen=True, slots=True, eq=False)
class SavedMemory:
    """A conversation as it is written to disk. ``writes`` lack their examples: Delta itself is kept. ``context_ids``: what was not yet written.

    ``probe``: what the last write's receipt checked, so that a loaded Delta can be checked the same way; None where nothing is known.
    """

    weights: FastWeights
    system_prompt: str
    context_ids: tuple[int, ...]
    writes: tuple[WriteRecord, ...]
    probe: Probe | None

    @property
    def cards(self) -> tuple[Flashcard, ...]:
        return tuple(
            card for record in self.writes if record.outcome == "accepted" for card in record.flashcards
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. ``writes`` came before it, to make room. ``revision``: of the fast weights it was said under, 0 without Delta.

    ``prompt_tokens`` is the context that the answer was sampled from.
    """

    text: str
    finish_reason: FinishReason
    revision: int
    prompt_tokens: int
    reply_tokens: int
    writes: tuple[WriteRecord, ...]


COMPANION = Path(
    "engram"
)  # inside an exported model: a subfolder, because vLLM takes every safetensors file beside config.json for weights
