"""Texts are found again by meaning and by words; a changed text is found by what it says now."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

from actors.protocols import TaskError
from actors.text.retrieval import Embedder, Hit, VectorIndex, WordIndex, load_embedder
from configs.schema import EmbedderConfig

TEXTS = (
    "The kitten sleeps on the sofa.",
    "Share prices fell sharply in London.",
    "Nora bakes bread every Sunday.",
)


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return load_embedder(EmbedderConfig())


def test_the_packaged_embedder_gives_unit_vectors_in_the_order_of_the_texts(embedder: Embedder) -> None:
    vectors = embedder.embed(TEXTS)
    assert vectors.dtype == np.float32 and vectors.shape == (3, embedder.dimensions)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(embedder.embed(TEXTS[1:2])[0], vectors[1], atol=1e-5)


def test_what_means_the_same_is_nearest(embedder: Embedder) -> None:
    index = VectorIndex(embedder)
    assert index.search("anything", 3) == []
    index.add(TEXTS[:2])
    index.add(TEXTS[2:])
    assert index.search("A cat naps on a couch", 3)[0].place == 0
    assert [hit.place for hit in index.search("the stock market", 1)] == [1]
    scores = [hit.score for hit in index.search("a loaf", 10)]
    assert len(scores) == len(index) == 3 and scores == sorted(scores, reverse=True)


def test_a_replaced_text_is_found_by_what_it_says_now(embedder: Embedder) -> None:
    index = VectorIndex(embedder)
    index.add(TEXTS)
    index.replace(0, "A volcano erupted in Iceland.")
    assert index.search("lava and ash", 1)[0].place == 0
    assert index.search("A cat naps on a couch", 1)[0].score < 0.5
    with pytest.raises(IndexError, match="place 3 of 3"):
        index.replace(3, "no such text")


def test_words_find_the_texts_that_hold_them() -> None:
    index = WordIndex(TEXTS)
    assert [hit.place for hit in index.search("Who bakes bread?", 3)] == [2]
    assert index.search("zebra", 3) == [] and index.search("the", 3) == []


@pytest.mark.parametrize("texts", [(), ("",), ("the a an",)])
def test_nothing_to_index_finds_nothing(texts: tuple[str, ...]) -> None:
    found: list[Hit] = WordIndex(texts).search("bread", 2)
    assert found == []


def test_an_embedder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"embedder.name=.*cannot be loaded.*give minilm") as failure:
        load_embedder(EmbedderConfig(name=str(tmp_path / "nothing")))
    assert "\n" not in str(failure.value)


def test_an_embedder_of_a_hub_that_does_not_answer_is_one_line(
    embedder: Embedder, silent_hub: socket.socket, capfd: pytest.CaptureFixture[str]
) -> None:
    """``embedder`` has imported the library. Alone it asks for three files, six times each: 70 s."""
    with pytest.raises(TaskError, match=r"cannot be loaded \(not in the local cache, and the hub: no answer"):
        load_embedder(EmbedderConfig(name="org/embedder"))
    assert "Retrying" not in capfd.readouterr().err
