"""A conversation's memory as a folder: a plain PEFT adapter, and beside it what a conversation needs to go on.

    DIR/adapter_config.json, adapter_model.safetensors     what stock PEFT and stock vLLM load
    DIR/memory.json                                        model, flashcards and losses, the running context, the probe of the last write

The folder appears whole or not at all. A plain adapter folder without memory.json can be loaded too, if it is on the same basis. Nothing here is
ever unpickled. What is wrong with a folder is one line: AssistantError.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from actors.fast_weights.delta import BasisError
from actors.fast_weights.peft_format import export_peft, from_peft
from actors.types import Probe, WriteRecord
from cluster.assistant.values import AssistantError, Opening, SavedMemory
from cluster.inspection.decode import DecodeError, decode
from cluster.inspection.record import plain

MEMORY_FILE = "memory.json"
_FORMAT = "engram-memory-1"
_MAX_BYTES = 64 * 2**20
_CURE = "give a folder that /save, serve or export wrote"


@dataclass(frozen=True, slots=True)
class _Content:
    """memory.json. ``model``: its name, for people; ``fingerprint``: of its weights. ``probe``: none or one."""

    format: str
    model: str
    fingerprint: str
    basis_id: str
    revision: int
    system_prompt: str
    context_ids: tuple[int, ...]
    writes: tuple[WriteRecord, ...]
    probe: tuple[Probe, ...]


def save_memory(memory: SavedMemory, opening: Opening, folder: Path, overwrite: bool) -> None:
    """Raises AssistantError where the folder holds something (without ``overwrite``) or cannot be written."""
    content = _Content(
        format=_FORMAT,
        model=opening.title,
        fingerprint=opening.model.fingerprint,
        basis_id=opening.basis.id,
        revision=memory.weights.revision,
        system_prompt=memory.system_prompt,
        context_ids=memory.context_ids,
        writes=memory.writes,
        probe=() if memory.probe is None else (memory.probe,),
    )
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
            raise AssistantError(f"{folder}: already holds something; name a new folder")
        shutil.rmtree(partial, ignore_errors=True)
        export_peft(memory.weights, opening.basis, partial, opening.base_model)
        (partial / MEMORY_FILE).write_text(
            json.dumps(plain(asdict(content)), allow_nan=False) + "\n", encoding="utf-8", errors="replace"
        )
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise AssistantError(
            f"{folder}: cannot be written ({error.strerror or error}); name another place"
        ) from error


def load_memory(folder: Path, opening: Opening) -> SavedMemory:
    """Raises AssistantError: no memory, a damaged one, another model's, or on another basis."""
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
            f"{folder}: {MEMORY_FILE} is of revision {content.revision}, the adapter of {weights.revision}; {_CURE}"
        )
    return SavedMemory(
        weights, content.system_prompt, content.context_ids, content.writes, *(content.probe or (None,))
    )


def _read(path: Path, opening: Opening) -> _Content | None:
    """None where there is no such file."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise AssistantError(f"{path}: has {path.stat().st_size} bytes, at most {_MAX_BYTES} are read")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise AssistantError(
            f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); {_CURE}"
        ) from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise AssistantError(f"{path}: is no record of format {_FORMAT}; {_CURE}")
    try:
        content: _Content = decode(_Content, data, "")
        _check_values(content, opening)
    except DecodeError as error:
        raise AssistantError(f"{path}: damaged: {error}; {_CURE}") from error
    _check_owner(path.parent, content, opening)
    return content


def _check_owner(folder: Path, content: _Content, opening: Opening) -> None:
    """The same theta and the same basis: a checkpoint of a run shares its basis with the model that the run began with, but not its weights."""
    if content.fingerprint != opening.model.fingerprint:
        raise AssistantError(
            f"{folder}: is a memory of the model {content.model!r}, whose weights are not those of {opening.title!r}: load it there"
        )
    if content.basis_id != opening.basis.id:
        own, here = content.basis_id, opening.basis.id
        raise AssistantError(
            f"{folder}: is on the basis {own!r}, here it is {here!r}: load it under the fast_weights.* that it was made with"
        )


def _check_values(content: _Content, opening: Opening) -> None:
    """What the types do not say, and an engine that is asked would refuse."""
    window = opening.config.engine.max_model_tokens
    if len(content.context_ids) >= window:
        raise DecodeError(
            f"context_ids: {len(content.context_ids)} tokens do not fit into engine.max_model_tokens={window}"
        )
    if len(content.probe) > 1:
        raise DecodeError(f"probe: expected one at most, got {len(content.probe)}")
    _check_ids("context_ids", content.context_ids, opening)
    for probe in content.probe:
        _check_ids("probe.token_ids", probe.token_ids, opening)
        finite = all(math.isfinite(value) for value in (*probe.before, *probe.after))
        if not (0 < len(probe.after) == len(probe.before) < len(probe.token_ids) < window and finite):
            raise DecodeError("probe: expected a finite log-prob before and after of each of its last tokens")


def _check_ids(key: str, ids: Sequence[int], opening: Opening) -> None:
    most = opening.model.vocab_size - 1
    if any(not 0 <= one <= most for one in ids):
        raise DecodeError(f"{key}: expected token ids, 0 to {most}")
