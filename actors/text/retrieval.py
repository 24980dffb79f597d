"""Finding texts again: the sentence embedder's boundary, a growing index over its vectors (faiss), and an index over words (BM25, bm25s)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Embedder(Protocol):
    """Texts to vectors of unit length, so that a dot product is a cosine. Safe to share between threads."""

    @property
    def dimensions(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """float32 [len(texts), dimensions]."""
        ...


@dataclass(frozen=True, slots=True)
class Hit:
    """A text found again: its place in the order in which texts were added, and how near it is (more is nearer)."""

    place: int
    score: float


class VectorIndex:
    """Texts by the cosine of their embeddings, exact. Grows, and a text may change."""

    def __init__(self, embedder: Embedder) -> None:
        import faiss

        self._embedder = embedder
        self._index = faiss.IndexIDMap2(faiss.IndexFlatIP(embedder.dimensions))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, texts: Sequence[str]) -> None:
        if texts:
            places = np.arange(self._count, self._count + len(texts), dtype=np.int64)
            self._index.add_with_ids(self._embedder.embed(texts), places)
            self._count += len(texts)

    def replace(self, place: int, text: str) -> None:
        """The text at ``place`` is now another one."""
        if not 0 <= place < self._count:
            raise IndexError(f"place {place} of {self._count} texts")
        ids: Any = np.asarray([place], dtype=np.int64)  # faiss's stubs know only its own selectors
        self._index.remove_ids(ids)
        self._index.add_with_ids(self._embedder.embed([text]), ids)

    def search(self, query: str, count: int) -> list[Hit]:
        """The ``count`` nearest texts, nearest first; fewer when there are fewer."""
        if self._count == 0:
            return []
        scores, places = self._index.search(self._embedder.embed([query]), min(count, self._count))
        return [Hit(int(place), float(score)) for place, score in zip(places[0], scores[0], strict=True)]


class WordIndex:
    """Texts by BM25 over their words. Fixed: built anew when texts come in."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        self._tokenize = bm25s.tokenize
        self._index = bm25s.BM25()
        words = self._tokenize(list(texts), stopwords="en", show_progress=False)
        self._count = len(texts) if words.vocab else 0  # nothing but stop words cannot be indexed
        if self._count:
            self._index.index(words, show_progress=False)

    def search(self, query: str, count: int) -> list[Hit]:
        """The best ``count`` texts that share a word with ``query``, best first."""
        words = self._tokenize(query, stopwords="en", show_progress=False)
        if self._count == 0 or not words.vocab:
            return []
        places, scores = self._index.retrieve(words, k=min(count, self._count), show_progress=False)
        return [
            Hit(int(place), float(score))
            for place, score in zip(places[0], scores[0], strict=True)
            if score > 0
        ]
