"""Reads a data set of the hub where a setting names a file: ``hub:org/name``, with the package datasets.

    hub:org/name[:CONFIG][@SPLIT]    hub:FOLDER[@SPLIT], as datasets or save_to_disk wrote it
        --> datasets (its own cache) --> JSON lines or a JSON list in Engram's cache, once for each content

So every reader works as with a file of its own: line 3 is the third row. A field that is null counts as
absent, since Arrow gives each row all fields. Sound and pictures are left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from actors.protocols import TaskError
from configs.embedded import cache_folder
from configs.hub import hub_or_cache

_log = logging.getLogger(__name__)

MARK = "hub:"
_FORM = "hub:org/name, hub:org/name:CONFIG@SPLIT, or hub:FOLDER"


def is_hub(path: str) -> bool:
    """Whether a setting names a data set instead of a file."""
    return path.startswith(MARK)


@lru_cache(maxsize=16)
def local_copy(path: str, as_list: bool) -> Path:
    """The rows of the data set ``path`` as a file of JSON lines, or of a JSON list. Raises TaskError."""
    name, _, split = path.removeprefix(MARK).partition("@")
    if not name:
        raise TaskError(f"{path}: names no data set: write {_FORM}")
    rows = _readable(path, _rows(path, name, split))
    identity = f"{rows._fingerprint}/{as_list}"  # datasets' own: it changes with the content
    folder = cache_folder() / "datasets"
    target = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.json{'' if as_list else 'l'}"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=folder, prefix=".")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.writelines(_written(path, rows, as_list))
            Path(aside).replace(target)  # whole or absent: several workers may do it at once
        finally:
            Path(aside).unlink(missing_ok=True)
    except OSError as error:
        cure = "set ENGRAM_CACHE to a folder with room"
        raise TaskError(f"{path}: {folder} cannot be written ({error.strerror or error}): {cure}") from None
    return target


def _rows(path: str, name: str, split: str) -> Any:
    """The data set's rows. Raises TaskError, in one line, for all that datasets raises."""
    try:
        import datasets
    except ImportError as error:
        cure = "install the extra hub (pip install 'engram-rl[hub]'), or give a file"
        raise TaskError(
            f"{path}: needs the package datasets, which cannot be imported ({error}): {cure}"
        ) from None
    datasets.disable_progress_bars()
    with hub_or_cache(name.partition(":")[0], "dataset") as silence:
        try:
            found = _opened(datasets, name)
        except Exception as error:  # noqa: BLE001  a loader raises what it likes
            reason = f"not in the local cache, and the hub: {silence}" if silence else _reason(error)
            raise TaskError(f"{path}: datasets cannot load it ({reason}): write {_FORM}") from None
    if not isinstance(found, dict):
        if split:
            raise TaskError(f"{path}: has no splits: leave @{split} out")
        return found
    chosen = split or ("train" if "train" in found else next(iter(found)) if len(found) == 1 else "")
    if chosen not in found:
        raise TaskError(f"{path}: has no split {split or 'train'!r}: write @ and one of {', '.join(found)}")
    return found[chosen]


def _opened(datasets: Any, name: str) -> Any:
    folder = Path(name).expanduser()
    if folder.is_dir():
        saved = any((folder / file).exists() for file in ("dataset_dict.json", "state.json"))
        return datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
    repository, _, config = name.partition(":")
    return datasets.load_dataset(repository, config or None)


def _readable(path: str, rows: Any) -> Any:
    """``rows`` without the columns of sound and pictures: to decode them needs packages of their own."""
    from datasets.features.features import require_decoding

    lost = [name for name, feature in rows.features.items() if require_decoding(feature)]
    if lost:
        _log.warning("%s: columns of sound or pictures are left out: %s", path, ", ".join(lost))
    return rows.remove_columns(lost) if lost else rows


def _written(path: str, rows: Any, as_list: bool) -> Iterator[str]:
    """Raises TaskError for a row that cannot be read: its OSError is no fault of the cache."""
    between = ",\n" if as_list else "\n"
    yield "[" if as_list else ""
    done = 0
    try:
        for row in rows:
            # default: a date becomes its text; what has no text fails in the reader, which names the field
            yield (between if done else "") + json.dumps(_present(row), ensure_ascii=False, default=str)
            done += 1
    except Exception as error:  # noqa: BLE001  as in _rows
        raise TaskError(f"{path}: datasets cannot read row {done + 1} ({_reason(error)})") from None
    yield "]\n" if as_list else "\n"


def _reason(error: Exception) -> str:
    """What was raised, and why: datasets wraps what a file's own reader says."""
    told = [error, error.__cause__] if error.__cause__ else [error]
    return ": ".join(" ".join(str(each).split()) or type(each).__name__ for each in told)[:300]


def _present(value: Any) -> Any:
    """``value`` without the fields that are null."""
    if isinstance(value, dict):
        return {name: _present(inner) for name, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value
