"""What the adapted layers read: second moments of their inputs over a calibration text, for the data-driven basis; and over the model's own text, how
sensitive it is to their change, for the natural write.

Method of the first: EVA, arXiv 2410.07170: A spans the top right singular directions of a layer's inputs, which are the top eigenvectors of
sum x x^T. Summed up window by window in float64, so memory does not grow with the text: [d_in, d_in] for each distinct input (gate_proj and up_proj
read the same one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.fast_weights.delta import SUPPORTED, Basis, BasisError
from actors.fast_weights.sensitivity import Sensitivity, measure, own_samples
from actors.text.chat_template import ChatFormat

WINDOW = 512
"""Tokens that the model reads at once; a text needs as many at least, for a second moment that is more than a few sentences' (our choices)."""
MAX_TOKENS = 16 * WINDOW
_ASSISTANT = "You are a helpful assistant."
_CHARACTERS = (
    16 * MAX_TOKENS
)  # more than so many tokens have in any language; the rest of a large file is not read


def input_moments(model_path: Path, modules: Sequence[str], text_path: str) -> dict[str, Tensor]:
    """By module: sum of x x^T over its inputs x, float64 [d_in, d_in], as the model of the folder reads the first ``MAX_TOKENS`` of the text.

    The first token of each window is left out: decoders keep an attention sink there, of a norm that would drown all others. Modules with one input
    share one tensor. Deterministic for one machine and number of threads. Raises BasisError: no such text, no UTF-8, too short, no usable model.
    """
    text = _read(text_path)
    model, tokenizer = _load(model_path, "auto", "to read fast_weights.calibration_path")
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_TOKENS]
    if len(ids) < WINDOW:
        raise BasisError(
            f"fast_weights.calibration_path={text_path} holds {len(ids)} tokens, at least {WINDOW} are needed: give a longer text"
        )
    return moments_of(model, modules, [ids[i : i + WINDOW] for i in range(0, len(ids) - 1, WINDOW)])


def own_sensitivity(model_path: Path, basis: Basis, rank: int, seed: int) -> dict[str, Sensitivity]:
    """By module of the basis, over the model's own text (see ``sensitivity``), in float32. Raises BasisError, ChatTemplateError: no usable model."""
    model, tokenizer = _load(model_path, torch.float32, "to measure fast_weights.sensitivity_rank")
    chat = ChatFormat(tokenizer)
    free = (tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,)
    try:
        texts = own_samples(model, (free, (*chat.system(_ASSISTANT), *chat.user_open)), seed)
        return measure(model, basis.a, basis.first_layer, texts, rank, seed)
    except RuntimeError as error:  # sampling from NaN, a decomposition of NaN
        raise BasisError(
            f"{model_path}: fast_weights.sensitivity_rank cannot be measured ({str(error).splitlines()[0]}): its weights may be damaged"
        ) from error


def _load(model_path: Path, dtype: Any, wanted: str) -> tuple[Any, Any]:
    """Model and tokenizer of the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        return AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype
        ).eval(), AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise BasisError(f"{model_path}: cannot be loaded {wanted} ({str(error).splitlines()[0]})") from error


def _read(text_path: str) -> str:
    try:
        with Path(text_path).expanduser().open(encoding="utf-8") as file:
            return file.read(_CHARACTERS)
    except UnicodeDecodeError:
        raise BasisError(
            f"fast_weights.calibration_path={text_path} is no UTF-8 text: give a plain text file"
        ) from None
    except OSError as error:
        raise BasisError(
            f"fast_weights.calibration_path={text_path} cannot be read ({error.strerror}): give a plain text file"
        ) from error


@torch.no_grad()
def moments_of(model: Any, modules: Sequence[str], windows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """See ``input_moments``; ``model`` is a Hugging Face causal LM, each window two tokens or more."""
    found: dict[str, nn.Module] = dict(model.named_modules())
    moments: dict[str, Tensor] = {}
    handles = []
    for name in modules:
        layer = found.get(name)
        if not isinstance(layer, nn.Linear):
            raise BasisError(f"{name}: no such nn.Linear in {type(model).__name__}; {SUPPORTED}")
        if _input_of(name) not in moments:
            moments[_input_of(name)] = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64)
            handles.append(layer.register_forward_pre_hook(_adding_to(moments, _input_of(name))))
    try:
        for window in windows:
            model.get_decoder()(input_ids=torch.tensor([window], device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: moments[_input_of(name)] for name in modules}


def _adding_to(moments: Mapping[str, Tensor], key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0][0, 1:].to("cpu", torch.float64)
        moments[key].addmm_(x.T, x)

    return add


def _input_of(name: str) -> str:
    """A name for what a module reads: gate_proj and up_proj of a layer read the same."""
    return name.removesuffix("gate_proj").removesuffix("up_proj")
