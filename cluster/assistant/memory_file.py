"""Saves a conversation's memory as a folder: a plain PEFT adapter, and what the conversation needs to go on.

    DIR/adapter_config.json, adapter_model.safetensors   what stock PEFT and stock vLLM load
    DIR/memory.json                                      model, flashcards, losses, context, last probe

The folder appears whole or not at all, and an earlier one stays until then. An adapter folder without
memory.json loads too if it is on the same basis. Nothing is ever unpickled. A folder that cannot be used is
one line: AssistantError. One that another model made is a ForeignMemory: only ``engram memory`` replaces it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

from pydantic import Field
from safetensors import SafetensorError

from actors.fast_weights.delta import BasisError
from actors.fast_weights.peft_format import export_peft, from_peft
from actors.memory.standing import standing_cards
from actors.types import FastWeights, Flashcard, Probe, WriteRecord
from cluster.assistant.opening import AssistantError, Opening
from configs.files import (
    FileError,
    Measured,
    dump_json,
    new_folder,
    read_json,
    recover_folder,
    require_replaceable,
    write_text,
)

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

    def memory(self, weights: FastWeights) -> SavedMemory:
        """The whole memory, with its Delta."""
        probe = self.probe[0] if self.probe else None
        return SavedMemory(
            weights, self.system_prompt, self.context_ids, self.writes, probe, self.context, self.wordings
        )


class ForeignMemory(AssistantError):
    """A folder holds a memory whose Delta is not one of the model here.

    ``content`` is what it tells, ``reason`` why. ``same_weights``: it is of this model, on another basis.
    """

    def __init__(self, folder: Path, content: MemoryContent, opening: Opening) -> None:
        self.content = content
        self.same_weights = content.fingerprint == opening.model.fingerprint
        title, settings = opening.title, ""
        if self.same_weights:
            self.reason = f"it is on the basis {content.basis_id!r}, here it is {opening.basis.id!r}"
            settings = ", with the settings that are given here,"
        elif content.model == _model_name(opening):
            self.reason = f"it is a memory of earlier weights of the model {title!r}"
        else:
            self.reason = (
                f"it is a memory of the model {content.model!r}, whose weights are not those of {title!r}"
            )
        command = f"engram memory {quote(str(folder))} --model {quote(title)}"
        super().__init__(
            f"{folder}: {self.reason}; `{command}`{settings} writes its flashcards onto this model"
        )


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
    held = _held(folder)
    if held and not overwrite:
        raise AssistantError(f"{folder}: already holds something; name a new folder")
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


def require_place(folder: Path) -> bool:
    """Whether something is in ``folder``, where a conversation is to live. Undoes a save that was cut off.

    For the one process that saves there. Raises AssistantError where nothing can be saved.
    """
    try:
        recover_folder(folder)
        require_replaceable(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return bool(_held(folder))


def _held(folder: Path) -> set[str]:
    """The files of the memory in ``folder``. Raises AssistantError for others, which are the user's own."""
    try:
        require_replaceable(folder)
        held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError as error:
        raise _cannot_write(folder, error) from error
    held.discard(f".{MEMORY_FILE}.partial")  # of a process that was killed
    if other := held - _FILES:
        raise AssistantError(
            f"{folder}: holds {min(other)!r}, which is no part of a memory; name a new folder"
        )
    return held


def load_memory(folder: Path, opening: Opening) -> SavedMemory:
    """Read what ``save_memory`` wrote.

    Raises AssistantError for a folder that is no memory, or is damaged; ForeignMemory for one whose Delta
    another model has, or another basis.
    """
    content = read_content(folder)
    if content is not None:
        _require_own(folder, content, opening)
    try:
        weights = from_peft(folder, opening.basis)
    except BasisError as error:
        raise AssistantError(str(error)) from error
    if content is None:
        return SavedMemory(weights, opening.system_prompt, (), (), None)
    if content.revision != weights.revision:
        raise AssistantError(
            f"{folder}: {MEMORY_FILE} is of revision {content.revision}, "
            f"the adapter of {weights.revision}; {_CURE}"
        )
    return content.memory(weights)


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


def _cannot_write(folder: Path, error: Exception) -> AssistantError:
    reason = getattr(error, "strerror", None) or error
    return AssistantError(f"{folder}: cannot be written ({reason}); name another place")


def _as_saved(record: WriteRecord) -> _Write:
    return _Write(*(getattr(record, field.name) for field in fields(WriteRecord)))


def _require_own(folder: Path, content: MemoryContent, opening: Opening) -> None:
    """Raise AssistantError for another model's memory, and for what the engine would refuse much later.

    A run's checkpoints share the basis alone.
    """
    same_weights = content.fingerprint == opening.model.fingerprint
    if same_weights and (fault := _fault(content, opening)):
        raise AssistantError(f"{folder / MEMORY_FILE}: damaged: {fault}; {_CURE}")
    if not same_weights or content.basis_id != opening.basis.id:
        raise ForeignMemory(folder, content, opening)
    texts = (content.context_ids, *(probe.token_ids for probe in content.probe))
    require_fits(folder, max(map(len, texts)), opening)


def require_fits(folder: Path, tokens: int, opening: Opening) -> None:
    """Raise AssistantError where the longest text of a memory does not fit into the engine's window."""
    window = opening.config.engine.max_model_tokens
    if tokens >= window:
        fits = f"does not fit into engine.max_model_tokens={window}"
        raise AssistantError(f"{folder}: has a text of {tokens} tokens, which {fits}; set a larger one")


def _fault(content: MemoryContent, opening: Opening) -> str:
    """What is wrong with values of the right type, "" if nothing."""
    most = opening.model.vocab_size - 1

    def are_token_ids(ids: Sequence[int]) -> bool:
        return all(0 <= token_id <= most for token_id in ids)

    if not are_token_ids(content.context_ids):
        return f"context_ids: expected token ids, 0 to {most}"
    for probe in content.probe:
        if not are_token_ids(probe.token_ids):
            return f"probe.token_ids: expected token ids, 0 to {most}"
        finite = all(math.isfinite(value) for value in (*probe.before, *probe.after))
        if not (finite and 0 < len(probe.after) == len(probe.before) < len(probe.token_ids)):
            return "probe: expected a finite log-prob before and after for each of its last tokens"
    return ""
