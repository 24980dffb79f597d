"""The shape of a model, as its config.json says it: what memory and transfers can be computed from.

config.json --> check_supported --> ModelShape        no weights are needed, and none are read
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.embedded import ModelError

# In these decoders model.layers.{i}.mlp.{gate,up,down}_proj are plain linear layers. Fast weights attach to
# them.
SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder. ``biased``: q, k and v have biases; ``normed``: q and k have norms of their own."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    biased: bool
    normed: bool

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Numbers in one decoder layer."""
        hidden, query, key = self.hidden_size, self.query_width, self.key_width
        attention = hidden * (2 * query + 2 * key)
        attention += (query + 2 * key) * self.biased + 2 * self.head_dim * self.normed
        return attention + 3 * hidden * self.intermediate_size + 2 * hidden

    @property
    def embedding_parameters(self) -> int:
        """Numbers in the embedding; an untied head has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """Numbers in the whole model; a tied head counts once."""
        embeddings = self.embedding_parameters * (1 if self.tied_embeddings else 2)
        return embeddings + self.num_layers * self.layer_parameters + self.hidden_size

    @property
    def cache_numbers(self) -> int:
        """Keys and values of one token, over all layers."""
        return 2 * self.num_layers * self.key_width


def read_shape(file: Path, name: str) -> ModelShape:
    """The shape that ``file``, a config.json, describes. Raises ModelError, with the model's ``name``."""
    hf_config = read_config(file, name)
    check_supported(hf_config, name)

    def whole(key: str, default: int | None = None) -> int:
        value = hf_config.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise ModelError(f"model {name!r}: {file} lacks the field {key!r}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"model {name!r}: {file} has {key}={value!r}, it must be a whole number above 0")
        return value

    heads, hidden = whole("num_attention_heads"), whole("hidden_size")
    tied = hf_config.get("tie_word_embeddings")
    if tied not in (None, True, False):
        raise ModelError(f"model {name!r}: {file} has tie_word_embeddings={tied!r}, it must be true or false")
    model_type = str(hf_config["model_type"])
    return ModelShape(
        model_type=model_type,
        num_layers=whole("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=whole("intermediate_size"),
        num_heads=heads,
        num_kv_heads=whole("num_key_value_heads", heads),
        head_dim=whole("head_dim", max(1, hidden // heads)),
        vocab_size=whole("vocab_size"),
        max_positions=whole("max_position_embeddings"),
        tied_embeddings=bool(tied),
        biased=model_type == "qwen2" or hf_config.get("attention_bias") is True,
        normed=model_type == "qwen3",
    )


def check_supported(hf_config: Mapping[str, Any], name: str) -> None:
    """Raise ModelError unless ``hf_config`` (the content of config.json) is a dense decoder of a known
    type."""
    model_type = hf_config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        problem = f"model {name!r} has model_type {model_type!r}, which is not supported"
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        raise ModelError(f"{problem}; supported are {supported} (dense, text only)")
    if hf_config.get("quantization_config"):
        problem = f"model {name!r} has quantised weights, which cannot be trained"
        raise ModelError(f"{problem}; name the unquantised repository of the same model")


def read_config(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in ``path``, a file of the model ``name``. Raises ModelError."""
    try:
        text = path.read_bytes()
        # transformers reads none
        if text.startswith(codecs.BOM_UTF8):
            raise ModelError(f"model {name!r}: {path} begins with a byte order mark: save it as plain UTF-8")
        content = json.loads(text)
    except FileNotFoundError:
        cure = "the folder must hold a Hugging Face checkpoint"
        raise ModelError(f"model {name!r}: {path} does not exist; {cure}") from None
    except OSError as error:
        raise ModelError(f"model {name!r}: {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise ModelError(f"model {name!r}: {path} is not JSON ({reason})") from None
    if not isinstance(content, dict):
        raise ModelError(f"model {name!r}: {path} must hold a JSON object, got {type(content).__name__}")
    return content
