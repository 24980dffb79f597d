"""The cost benchmark on the tiny model: real engines and writes, and histories of exact length."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench.cost import QUICK, model_with_window, run
from cluster.bench.cost_episode import history
from cluster.bench.values import Context

pytestmark = pytest.mark.slow


def test_memory_off_needs_a_cache_that_grows_and_tmem_one_that_does_not(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    outcome = run(Context(tiny_model_path, repeats=1, threads=1, quick=True, folder=tmp_path))
    (table,) = outcome.tables
    off, tmem = ([int(row[column]) for row in table.rows] for column in (2, 5))
    writes = [int(row[7]) for row in table.rows]
    assert [int(row[0]) for row in table.rows] == list(QUICK.lengths)
    assert off[1] >= 2 * off[0] and tmem[1] == tmem[0], table
    assert writes[0] >= 1 and writes[1] >= 3 * writes[0], "each full context is a write"
    assert [plot.name for plot in outcome.plots] == ["cost.png"] and outcome.plots[0].stat().st_size > 10_000
    assert [case.goal is None for case in outcome.cases] == [False, True, True]
    assert all(value > 0 for value in outcome.figures.values())


def test_a_history_has_exactly_its_tokens(tiny_model_path: Path) -> None:
    from transformers import AutoTokenizer

    from actors.text.chat_template import ChatFormat

    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_model_path))
    texts = history(chat, 1024, 128, seed=3)
    assert [len(chat.user(text)) for text in texts] == [128] * 8
    assert len(set(texts)) == 8, "equal turns would meet in the prefix cache"


def test_a_longer_window_changes_nothing_else(tiny_model_path: Path) -> None:
    from transformers import AutoConfig

    with model_with_window(tiny_model_path, 20_000) as folder:
        theirs, ours = (AutoConfig.from_pretrained(path).to_dict() for path in (tiny_model_path, folder))
        assert {file.name for file in folder.iterdir()} == {file.name for file in tiny_model_path.iterdir()}
    assert ours.pop("max_position_embeddings") == 20_000 and theirs.pop("max_position_embeddings") == 8192
    ours.pop("_name_or_path", None), theirs.pop("_name_or_path", None)
    assert ours == theirs and not folder.exists()
    with model_with_window(tiny_model_path, 8000) as folder:
        assert folder == tiny_model_path
