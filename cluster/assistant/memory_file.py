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
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from actors.fast_weights import BasisError
from actors.peft_format import export_peft, from_peft
from actors.types import Flashcard, Probe, WriteOutcome, WriteRecord
from cluster.assistant.values import MEMORY_FILE, AssistantError, Opening, SavedMemory

_FORMAT = "engram-memory-1"
_MAX_BYTES = 64 * 2**20


def save_memory(memory: SavedMemory, opening: Opening, folder: Path, replace: bool) -> None:
    """Raises AssistantError where the folder holds something (without ``replace``) or cannot be written."""
    content = {
        "format": _FORMAT,
        "model": {"name": opening.title, "fingerprint": opening.model.fingerprint},
        "basis_id": opening.basis.id,
        "revision": memory.weights.revision,
        "system_prompt": memory.system_prompt,
        "context_ids": list(memory.context_ids),
        "writes": [_record_to_json(record) for record in memory.writes],
        "probe": None if memory.probe is None else asdict(memory.probe),
    }
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if folder.exists() and not replace and (not folder.is_dir() or any(folder.iterdir())):
            raise AssistantError(f"{folder}: already holds something; name a new folder")
        shutil.rmtree(partial, ignore_errors=True)
        export_peft(memory.weights, opening.basis, partial, opening.base_model)
        (partial / MEMORY_FILE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise AssistantError(f"{folder}: cannot be written ({error.strerror or error}); name another place") from error


def load_memory(folder: Path, opening: Opening) -> SavedMemory:
    """Raises AssistantError: no memory, a damaged one, another model's, or on another basis."""
    if not folder.is_dir():
        raise AssistantError(f"{folder}: no such folder; give one that /save, serve or export wrote")
    content = _read(folder / MEMORY_FILE)
    if content is not None:
        _check_owner(folder, content, opening)
    try:
        weights = from_peft(folder, opening.basis)
    except BasisError as error:
        raise AssistantError(str(error)) from error
    if content is None:
        return SavedMemory(weights, opening.system_prompt, (), (), None)
    try:
        saved = SavedMemory(
            weights,
            _text(content, "system_prompt"),
            _ids(content, "context_ids", opening),
            tuple(_record_from_json(item) for item in _list(content, "writes")),
            _probe(content.get("probe"), opening),
        )
        if content.get("revision") != weights.revision:
            raise ValueError(f"revision is {content.get('revision')!r}, the adapter beside it has {weights.revision}")
    except (KeyError, TypeError, ValueError) as error:
        raise AssistantError(f"{folder / MEMORY_FILE}: damaged: {' '.join(str(error).split())[:200]}; restore the file") from error
    return saved


def _read(path: Path) -> dict[str, Any] | None:
    """None where there is no such file."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise AssistantError(f"{path}: has {path.stat().st_size} bytes, at most {_MAX_BYTES} are read")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise AssistantError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); restore the file") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise AssistantError(f"{path}: is no record of format {_FORMAT}; give a folder that /save, serve or export wrote")
    return content


def _check_owner(folder: Path, content: dict[str, Any], opening: Opening) -> None:
    """The same theta and the same basis: a checkpoint of a run shares its basis with the model that the run began with, but not its weights."""
    model = content.get("model")
    if not isinstance(model, dict) or model.get("fingerprint") != opening.model.fingerprint:
        name = model.get("name") if isinstance(model, dict) else None
        raise AssistantError(f"{folder}: is a memory of the model {name!r}, whose weights are not those of {opening.title!r}: load it there")
    if content.get("basis_id") != opening.basis.id:
        raise AssistantError(
            f"{folder}: is on the basis {content.get('basis_id')!r}, here it is {opening.basis.id!r}: load it with its own fast_weights.*"
        )


def _record_to_json(record: WriteRecord) -> dict[str, Any]:
    content = asdict(record)
    del content["examples"]
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in content.items()}


def _record_from_json(item: Any) -> WriteRecord:
    if not isinstance(item, dict):
        raise ValueError("an item of writes is no object")
    outcomes: tuple[WriteOutcome, ...] = get_args(WriteOutcome)
    found = [outcome for outcome in outcomes if outcome == item["outcome"]]
    if not found:
        raise ValueError(f"outcome {item['outcome']!r} must be one of {', '.join(outcomes)}")
    return WriteRecord(
        revision=_count(item, "revision"),
        examples=(),
        flashcards=tuple(Flashcard(_text(card, "question"), _text(card, "answer")) for card in _list(item, "flashcards")),
        extraction=_text(item, "extraction"),
        rejected_flashcards=_count(item, "rejected_flashcards"),
        prompt_tokens=_count(item, "prompt_tokens"),
        answer_tokens=_count(item, "answer_tokens"),
        loss_before=_number(item, "loss_before"),
        loss_after=_number(item, "loss_after"),
        steps=_count(item, "steps"),
        seconds=_number(item, "seconds"),
        outcome=found[0],
        reason=_text(item, "reason"),
    )


def _probe(content: Any, opening: Opening) -> Probe | None:
    if content is None:
        return None
    before, after = (tuple(_finite(value) for value in _list(content, side)) for side in ("before", "after"))
    ids = _ids(content, "token_ids", opening)
    if not 0 < len(after) < len(ids) or len(before) != len(after):
        raise ValueError(f"probe has {len(ids)} tokens with {len(before)} and {len(after)} log-probs")
    return Probe(ids, before, after)


def _ids(content: dict[str, Any], key: str, opening: Opening) -> tuple[int, ...]:
    ids, most = _list(content, key), opening.model.vocab_size
    if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < most for one in ids):
        raise ValueError(f"{key} must be token ids, 0 to {most - 1}")
    if len(ids) >= (window := opening.config.engine.max_model_tokens):
        raise ValueError(f"{key} has {len(ids)} tokens, more than engine.max_model_tokens={window} takes")
    return tuple(ids)


def _text(content: dict[str, Any], key: str) -> str:
    if not isinstance(value := content[key], str):
        raise ValueError(f"{key} must be a text")
    return value


def _list(content: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(value := content[key], list):
        raise ValueError(f"{key} must be a list")
    return value


def _count(content: dict[str, Any], key: str) -> int:
    value = content[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key} must be a whole number, 0 or more")
    return value


def _number(content: dict[str, Any], key: str) -> float:
    return math.nan if content[key] is None else _finite(content[key])


def _finite(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{value!r} must be a finite number")
    return float(value)
