"""Saves a conversation's memory as a folder: a plain PEFT adapter, and what the conversation needs to go on.

    DIR/adapter_config.json, adapter_model.safetensors   what stock PEFT and stock vLLM load
    DIR/memory.json                                      model, flashcards, losses, context, last probe

The folder appears whole or not at all, and an earlier one stays until then. An adapter folder without
memory.json loads too if it is on the same basis. Nothing is ever unpickled. A folder that cannot be used is
one line: AssistantError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from safetensors import SafetensorError

from actors.fast_weights.delta import BasisError
from actors.fast_weights.peft_format import export_peft, from_peft
from actors.memory.parametric import standing_cards
from actors.types import FastWeights, Flashcard, Probe, WriteRecord
from cluster.assistant.opening import AssistantError, Opening
from configs.files import FileError, Measured, dump_json, new_folder, read_json, write_text

MEMORY_FILE = "memory.json"
_ADAPTER = "adapter_model.safetensors"
_FILES = {"adapter_config.json", _ADAPTER, MEMORY_FILE}
_CURE = "give a folder that /save, serve or export wrote"


@dataclass(frozen=True, slots=True, eq=False)
class SavedMemory:
    """A conversation's state. ``context_ids`` are the tokens that are not yet written.

    ``writes`` have no examples: Delta itself is kept. ``probe`` is what the last write's receipt checked, so
    that a loaded Delta can be checked the same way; None if no write was accepted. ``context`` is the text of
    ``context_ids``. ``wordings``: see memory.wordings.
    """

    weights: FastWeights
    system_prompt: str
    context_ids: tuple[int, ...]
    writes: tuple[WriteRecord, ...]
    probe: Probe | None
    context: str = ""
    wordings: int = 1

    @property
    def cards(self) -> tuple[Flashcard, ...]:
        """The flashcards in the weights that no later one answers anew, oldest first."""
        return tuple(standing_cards(self.writes, self.wordings))


@dataclass(frozen=True, slots=True)
class _Write(WriteRecord):
    """A write record whose losses may be null in the file: an empty write has none."""

    loss_before: Measured
    loss_after: Measured


@dataclass(frozen=True, slots=True)
class MemoryContent:
    """The fields of memory.json. ``model`` names the model, ``fingerprint`` identifies its weights.

    ``context`` and ``wordings`` came later: older files lack them.
    """

    format: Literal["engram-memory-1"]
    model: str
    fingerprint: str
    basis_id: str
    revision: int
    system_prompt: str
    context_ids: tuple[int, ...]
    writes: tuple[_Write, ...]
    probe: Annotated[tuple[Probe, ...], Field(max_length=1)]
    context: str = ""
    wordings: int = 1

    @property
    def cards(self) -> tuple[Flashcard, ...]:
        return tuple(standing_cards(self.writes, self.wordings))


@dataclass(frozen=True, slots=True, eq=False)
class SavedAdapter:
    """The adapter of ``weights`` as it was saved in ``folder``. ``stamp`` tells it from a later one."""

    folder: Path
    weights: FastWeights
    stamp: tuple[int, int]

    @classmethod
    def of(cls, folder: Path, weights: FastWeights) -> SavedAdapter:
        """The one that stands in ``folder``. Raises OSError."""
        return cls(folder, weights, _stamp(folder))

    def stands_in(self, folder: Path, weights: FastWeights) -> bool:
        """Whether ``folder`` still holds the adapter of ``weights``. Raises OSError."""
        is_same = self.folder == folder and self.weights is weights
        return is_same and (folder / _ADAPTER).exists() and _stamp(folder) == self.stamp


def _stamp(folder: Path) -> tuple[int, int]:
    status = (folder / _ADAPTER).stat()
    return status.st_ino, status.st_mtime_ns


def save_memory(
    memory: SavedMemory,
    opening: Opening,
    folder: Path,
    overwrite: bool,
    earlier: SavedAdapter | None = None,
) -> SavedAdapter:
    """Write ``memory`` to ``folder``; returns what ``earlier`` is of its next save.

    Without ``overwrite`` the folder must be new or empty; with it, it may hold an earlier memory, and nothing
    else. Where the ``earlier`` adapter is this memory's and still there, memory.json alone is replaced.
    Raises AssistantError if it cannot be written.
    """
    try:
        held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        held.discard(f".{MEMORY_FILE}.partial")  # of a process that was killed
    except OSError as error:
        raise _cannot_write(folder, error) from error
    if not overwrite and (held or (folder.exists() and not folder.is_dir())):
        raise AssistantError(f"{folder}: already holds something; name a new folder")
    if other := held - _FILES:
        raise AssistantError(
            f"{folder}: holds {min(other)!r}, which is no part of a memory; name a new folder"
        )
    content = MemoryContent(
        format="engram-memory-1",
        model=_model_name(opening),
        fingerprint=opening.model.fingerprint,
        basis_id=opening.basis.id,
        revision=memory.weights.revision,
        system_prompt=memory.system_prompt,
        context_ids=memory.context_ids,
        writes=tuple(map(_as_saved, memory.writes)),
        probe=() if memory.probe is None else (memory.probe,),
        context=memory.context,
        wordings=memory.wordings,
    )
    text = dump_json(content, indent=None) + "\n"
    try:
        if earlier is not None and earlier.stands_in(folder, memory.weights) and held == _FILES:
            write_text(folder / MEMORY_FILE, text)
            return earlier
        with new_folder(folder, replace=overwrite) as partial:
            export_peft(memory.weights, opening.basis, partial, opening.base_model)
            (partial / MEMORY_FILE).write_text(text, encoding="utf-8")
        return SavedAdapter.of(folder, memory.weights)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(folder, error) from error


def load_memory(folder: Path, opening: Opening) -> tuple[SavedMemory, str]:
    """Read what ``save_memory`` wrote; also says why its Delta is not one of ``opening``, "" if it is.

    A memory of other weights, or of another basis, comes with its flashcards and with Delta = 0: they must be
    written anew. Raises AssistantError for a folder that is no memory, or is damaged.
    """
    content = read_content(folder)
    if content is not None and (foreign := _foreign(content, opening)):
        zero = FastWeights(opening.basis.id, 0, {})
        return _memory(content, zero, None), foreign
    if content is not None and (fault := _fault(content, opening)):
        raise AssistantError(f"{folder / MEMORY_FILE}: damaged: {fault}; {_CURE}")
    try:
        weights = from_peft(folder, opening.basis)
    except BasisError as error:
        raise AssistantError(str(error)) from error
    if content is None:
        return SavedMemory(weights, opening.system_prompt, (), (), None), ""
    if content.revision != weights.revision:
        raise AssistantError(
            f"{folder}: {MEMORY_FILE} is of revision {content.revision}, "
            f"the adapter of {weights.revision}; {_CURE}"
        )
    return _memory(content, weights, content.probe[0] if content.probe else None), ""


def read_content(folder: Path) -> MemoryContent | None:
    """What memory.json holds, None for a folder without one. Raises AssistantError, also without a folder."""
    if not folder.is_dir():
        raise AssistantError(f"{folder}: no such folder; {_CURE}")
    try:
        return read_json(folder / MEMORY_FILE, MemoryContent)
    except FileNotFoundError:
        return None
    except FileError as error:
        raise AssistantError(f"{error}; {_CURE}") from error


def _model_name(opening: Opening) -> str:
    """The model so that it is found again from any folder."""
    path = Path(opening.title).expanduser()
    return str(path.absolute()) if path.is_dir() else opening.title


def _memory(content: MemoryContent, weights: FastWeights, probe: Probe | None) -> SavedMemory:
    return SavedMemory(
        weights,
        content.system_prompt,
        content.context_ids,
        content.writes,
        probe,
        content.context,
        content.wordings,
    )


def _cannot_write(folder: Path, error: Exception) -> AssistantError:
    reason = getattr(error, "strerror", None) or error
    return AssistantError(f"{folder}: cannot be written ({reason}); name another place")


def _as_saved(record: WriteRecord) -> _Write:
    return _Write(*(getattr(record, field.name) for field in fields(WriteRecord)))


def _foreign(content: MemoryContent, opening: Opening) -> str:
    """Why Delta does not fit ``opening``, "" if it does. A run's checkpoints share the basis alone."""
    if content.fingerprint != opening.model.fingerprint:
        return (
            f"it is a memory of the model {content.model!r}, whose weights are not those of {opening.title!r}"
        )
    if content.basis_id != opening.basis.id:
        return f"it is on the basis {content.basis_id!r}, here it is {opening.basis.id!r}"
    return ""


def _fault(content: MemoryContent, opening: Opening) -> str:
    """What is wrong with values of the right type, "" if nothing: the engine would refuse them much later."""
    window, most = opening.config.engine.max_model_tokens, opening.model.vocab_size - 1

    def are_token_ids(ids: Sequence[int]) -> bool:
        return all(0 <= token_id <= most for token_id in ids)

    if len(content.context_ids) >= window:
        tokens = len(content.context_ids)
        return f"context_ids: {tokens} tokens do not fit into engine.max_model_tokens={window}"
    if not are_token_ids(content.context_ids):
        return f"context_ids: expected token ids, 0 to {most}"
    for probe in content.probe:
        if not are_token_ids(probe.token_ids):
            return f"probe.token_ids: expected token ids, 0 to {most}"
        finite = all(math.isfinite(value) for value in (*probe.before, *probe.after))
        if not (finite and 0 < len(probe.after) == len(probe.before) < len(probe.token_ids) < window):
            return "probe: expected a finite log-prob before and after for each of its last tokens"
    return ""
