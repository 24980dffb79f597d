"""Saves a conversation's memory as a folder: a plain PEFT adapter, and what the conversation needs to go on.

    DIR/adapter_config.json, adapter_model.safetensors   what stock PEFT and stock vLLM load
    DIR/memory.json                                      model, flashcards, losses, context, last probe

The folder appears whole or not at all, and an earlier one stays until then. An adapter folder without
memory.json loads too if it is on the same
basis. Nothing is ever unpickled. A folder that cannot be used is one line: AssistantError.
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
from actors.types import FastWeights, Flashcard, Probe, WriteRecord
from cluster.assistant.opening import AssistantError, Opening
from configs.files import FileError, Measured, dump_json, new_folder, read_json

MEMORY_FILE = "memory.json"
_CURE = "give a folder that /save, serve or export wrote"


@dataclass(frozen=True, slots=True, eq=False)
class SavedMemory:
    """A conversation's state. ``context_ids`` are the tokens that are not yet written.

    ``writes`` have no examples: Delta itself is kept. ``probe`` is what the last write's receipt checked, so
    that a loaded Delta can be checked the same way; None if no write was accepted.
    """

    weights: FastWeights
    system_prompt: str
    context_ids: tuple[int, ...]
    writes: tuple[WriteRecord, ...]
    probe: Probe | None

    @property
    def cards(self) -> tuple[Flashcard, ...]:
        accepted = (record for record in self.writes if record.outcome == "accepted")
        return tuple(card for record in accepted for card in record.flashcards)


@dataclass(frozen=True, slots=True)
class _Write(WriteRecord):
    """A write record whose losses may be null in the file: an empty write has none."""

    loss_before: Measured
    loss_after: Measured


@dataclass(frozen=True, slots=True)
class _Content:
    """The fields of memory.json. ``model`` is a name for people; ``fingerprint`` identifies its weights."""

    format: Literal["engram-memory-1"]
    model: str
    fingerprint: str
    basis_id: str
    revision: int
    system_prompt: str
    context_ids: tuple[int, ...]
    writes: tuple[_Write, ...]
    probe: Annotated[tuple[Probe, ...], Field(max_length=1)]


def save_memory(memory: SavedMemory, opening: Opening, folder: Path, overwrite: bool) -> None:
    """Write ``memory`` to ``folder``. Raises AssistantError if that cannot be written.

    Without ``overwrite`` the folder must be new or empty.
    """
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise AssistantError(f"{folder}: already holds something; name a new folder")
    content = _Content(
        format="engram-memory-1",
        model=opening.title,
        fingerprint=opening.model.fingerprint,
        basis_id=opening.basis.id,
        revision=memory.weights.revision,
        system_prompt=memory.system_prompt,
        context_ids=memory.context_ids,
        writes=tuple(map(_as_saved, memory.writes)),
        probe=() if memory.probe is None else (memory.probe,),
    )
    try:
        with new_folder(folder, replace=overwrite) as partial:
            export_peft(memory.weights, opening.basis, partial, opening.base_model)
            (partial / MEMORY_FILE).write_text(dump_json(content, indent=None) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AssistantError(f"{folder}: cannot be written ({reason}); name another place") from error


def load_memory(folder: Path, opening: Opening) -> SavedMemory:
    """Read what ``save_memory`` wrote.

    Raises AssistantError for a folder that is no memory, is damaged, or belongs to another model or basis.
    """
    if not folder.is_dir():
        raise AssistantError(f"{folder}: no such folder; {_CURE}")
    content = _read(folder / MEMORY_FILE, opening)
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
    probe = content.probe[0] if content.probe else None
    return SavedMemory(weights, content.system_prompt, content.context_ids, content.writes, probe)


def _as_saved(record: WriteRecord) -> _Write:
    return _Write(*(getattr(record, field.name) for field in fields(WriteRecord)))


def _read(path: Path, opening: Opening) -> _Content | None:
    """The checked content of memory.json, None without such a file."""
    try:
        content = read_json(path, _Content)
    except FileNotFoundError:
        return None
    except FileError as error:
        raise AssistantError(f"{error}; {_CURE}") from error
    if fault := _fault(content, opening):
        raise AssistantError(f"{path}: damaged: {fault}; {_CURE}")
    _check_owner(path.parent, content, opening)
    return content


def _check_owner(folder: Path, content: _Content, opening: Opening) -> None:
    """Refuse a memory of other weights or of another basis. A run's checkpoints share the basis alone."""
    if content.fingerprint != opening.model.fingerprint:
        raise AssistantError(
            f"{folder}: is a memory of the model {content.model!r}, "
            f"whose weights are not those of {opening.title!r}: load it there"
        )
    if content.basis_id != opening.basis.id:
        raise AssistantError(
            f"{folder}: is on the basis {content.basis_id!r}, here it is {opening.basis.id!r}: "
            "load it under the fast_weights.* that it was made with"
        )


def _fault(content: _Content, opening: Opening) -> str:
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
