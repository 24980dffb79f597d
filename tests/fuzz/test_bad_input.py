"""Damaged files of every kind that comes from outside: each is read, or refused in one line that names it.

A valid file is damaged at random: it is cut, bytes are flipped, JSON values are replaced, removed or of
another type. ENGRAM_FUZZ sets how many files of each kind (`make fuzz`: 10,000 in all). The seed of a case is
its number, so that a failure names what to run again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.environments.conversation_files import read_locomo, read_longmemeval
from actors.environments.rubric import read_rubric_items
from actors.environments.search import read_corpus, read_questions
from actors.fast_weights.basis import load_basis, make_basis, save_basis, with_sensitivity
from actors.fast_weights.delta import BasisError
from actors.fast_weights.peft_format import export_peft, from_peft
from actors.fast_weights.sensitivity import Sensitivity
from actors.protocols import TaskError
from actors.text.flashcards import parse_flashcards, render_flashcards
from actors.types import FastWeights, Flashcard
from cluster.common.errors import CheckpointError
from cluster.probe.cards import read_cards
from cluster.probe.values import ProbeError
from cluster.runs.checkpoint import load_checkpoint
from configs.load import ConfigError, load_config
from configs.shipped import shipped

CASES = int(os.environ.get("ENGRAM_FUZZ", "150"))
DATA = Path(__file__).parents[1] / "data"
_JUNK_TEXTS = ("", " ", "\x00", "a" * 5000, "\ud800", "<|im_end|>", "nan", "../../etc")
_JUNK: tuple[Any, ...] = (None, True, -1, 0, 3.5, 1e309, 10**400, [], {}, [[]], {"a": {}}, *_JUNK_TEXTS)
_MARKS = ('"', "\\", "[", "]", "{", "}", ",", "\x00", "\ud800", "[" * 500, "null", "\n")
MODULE = "model.layers.3.mlp.down_proj"


@dataclass(frozen=True)
class Kind:
    """How to make a valid file or folder at a path, how to read it, and what refusing it may raise."""

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    refuses: tuple[type[Exception], ...]


def _copy(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return Path(shutil.copy(DATA / name, folder / name))

    return make


def _config(folder: Path) -> Path:
    return Path(shutil.copy(shipped()["quickstart"], folder / "quickstart.yaml"))


def _basis(folder: Path) -> Path:
    save_basis(_BASIS, folder / "basis.safetensors")
    return folder / "basis.safetensors"


def _adapter(folder: Path) -> Path:
    weights = FastWeights(_BASIS.id, 1, {MODULE: np.ones((8, 2), dtype=np.float32)})
    export_peft(weights, _BASIS, folder / "adapter", "some/model")
    return folder / "adapter"


def _checkpoint(folder: Path) -> Path:
    state = {
        "step": 5,
        "warm_steps": 0,
        "version": 5,
        "tracking_run_id": "r",
        "rewards": [0.5],
        "ledger": {"next_position": 9, "pending": [7], "settled": {}},
    }
    (folder / "step-000005").mkdir()
    (folder / "step-000005" / "state.json").write_text(json.dumps({"format": "engram-run-1", **state}))
    (folder / "step-000005" / "config.yaml").write_text("name: x\n")
    return folder / "step-000005"


_GUARD = Sensitivity(torch.eye(8)[:, :3].contiguous(), torch.ones(4), torch.eye(2))
_BASIS = with_sensitivity(
    make_basis("svd", {MODULE: torch.ones(2, 4)}, {MODULE: 8}, train_a=False), {MODULE: _GUARD}
)
KINDS = {
    "configuration": Kind(_config, lambda path: load_config(path, []), (ConfigError,)),
    "LoCoMo": Kind(_copy("locomo_sample.json"), lambda path: read_locomo(str(path)), (TaskError,)),
    "LongMemEval": Kind(
        _copy("longmemeval_sample.json"), lambda path: read_longmemeval(str(path)), (TaskError,)
    ),
    "search questions": Kind(
        _copy("search_questions.json"), lambda path: read_questions(str(path)), (TaskError,)
    ),
    "search corpus": Kind(_copy("search_corpus.json"), lambda path: read_corpus(str(path)), (TaskError,)),
    "rubrics": Kind(_copy("rubric_sample.jsonl"), lambda path: read_rubric_items(str(path)), (TaskError,)),
    "probe cards": Kind(_copy("probe_cards.jsonl"), read_cards, (ProbeError,)),
    "basis": Kind(_basis, load_basis, (BasisError,)),
    "adapter": Kind(_adapter, lambda path: from_peft(path, _BASIS), (BasisError,)),
    "checkpoint": Kind(_checkpoint, load_checkpoint, (CheckpointError,)),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_file_is_read(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    kind.read(kind.make(tmp_path))


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    kind, refused = KINDS[name], 0
    whole = tmp_path / "whole"
    whole.mkdir()
    original = kind.make(whole)
    for case in range(CASES):
        place = tmp_path / f"{case}" / original.name
        place.parent.mkdir()
        (shutil.copytree if original.is_dir() else shutil.copy)(original, place)  # type: ignore[operator]
        files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
        damaged = random.Random(case).choice(files)
        damage(damaged, random.Random(case))
        try:
            kind.read(place)
        except kind.refuses as error:
            refused += 1
            message = str(error)
            assert message and "\n" not in message and len(message) < 2000, (
                f"{name}, case {case}: {message[:300]!r}"
            )
            assert place.name in message or damaged.name in message, (
                f"{name}, case {case} does not name the file: {message[:300]}"
            )
        except Exception as error:
            raise AssertionError(f"{name}, case {case}: {type(error).__name__}: {error}") from error
        shutil.rmtree(place.parent)
    # Where nearly all damaged files were read, the damage is too gentle to test anything.
    assert refused > CASES // 10, f"{name}: only {refused} of {CASES} damaged files were refused"


def test_whatever_a_model_writes_the_flashcard_parser_answers() -> None:
    whole = render_flashcards(
        [
            Flashcard("Where does Nora live?", "in Lisbon"),
            Flashcard("What did she say?", 'a "word" [sic] {x}'),
        ]
    )
    for case in range(10 * CASES):
        rng = random.Random(case)
        text = _damaged_text(whole, rng)
        parsed = parse_flashcards(text, 8)
        assert len(parsed.cards) <= 8 and parsed.rejected >= 0
        assert parsed.cards or parsed.problem, (
            f"case {case}: nothing was read and nothing said of {text[:200]!r}"
        )


def damage(path: Path, rng: random.Random) -> None:
    """One to three random damages in place."""
    content = path.read_bytes()
    structured = path.suffix in (".json", ".jsonl")
    for _ in range(rng.randint(1, 3)):
        as_json = structured and rng.random() < 0.6
        content = (
            _damaged_json(content, path.suffix == ".jsonl", rng) if as_json else _damaged_bytes(content, rng)
        )
    path.write_bytes(content)


def _damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    if not content:
        return b"\x00"
    where = rng.randrange(len(content))
    match rng.randrange(6):
        case 5:
            return content[:where] + b"7" * 5000 + content[where:]  # more digits than Python reads
        case 0:
            return content[:where]
        case 1:
            return content[:where] + bytes([rng.randrange(256)]) + content[where + 1 :]
        case 2:
            return content[:where] + rng.randbytes(rng.randint(1, 20)) + content[where:]
        case 3:
            return content[:where] + content[where + rng.randint(1, 200) :]
        case _:
            head = min(8, len(content))  # safetensors' header length, a YAML file's first key
            return rng.randbytes(head) + content[head:]


def _damaged_json(content: bytes, lines: bool, rng: random.Random) -> bytes:
    try:
        if lines:
            rows = content.decode("utf-8").splitlines()
            place = rng.randrange(len(rows))
            rows[place] = json.dumps(_replaced(json.loads(rows[place]), rng))
            return "\n".join(rows).encode("utf-8", "surrogatepass")
        return json.dumps(_replaced(json.loads(content), rng)).encode("utf-8", "surrogatepass")
    except (ValueError, IndexError):  # an earlier damage left no JSON
        return _damaged_bytes(content, rng)


def _replaced(value: Any, rng: random.Random) -> Any:
    """``value`` with one random part of it replaced by junk, or gone."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        if rng.random() < 0.25:
            return {other: part for other, part in value.items() if other != key}
        return {**value, key: _replaced(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], _replaced(value[place], rng), *value[place + 1 :]]
    return rng.choice(_JUNK)


def _damaged_text(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(text) + 1)
        match rng.randrange(4):
            case 0:
                text = text[:place]
            case 1:
                text = text[:place] + rng.choice(_MARKS) + text[place:]
            case 2:
                text = text[:place] + text[place + rng.randint(1, 12) :]
            case _:
                text = text[place:] + text[:place]
    return text
