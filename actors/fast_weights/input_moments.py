"""Runs the model of a folder over a text, to measure what the adapted layers read and how sensitive they are.

    input_moments     over a calibration text: second moments of the layers' inputs, for basis=data
    own_sensitivity   over the model's own text: see sensitivity.py, for write.optimizer=natural

Method of the first: EVA, arXiv 2410.07170: A spans the top right singular directions of a layer's inputs,
which are the top eigenvectors of sum x x^T. The sum is taken window by window in float64, so memory does not
grow with the text: [d_in, d_in] for each distinct input (gate_proj and up_proj read the same).
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
"""Tokens that the model reads at once, and the least that a text must have (our choices)."""
MAX_TOKENS = 16 * WINDOW
_ASSISTANT = "You are a helpful assistant."
_CHARACTERS = 16 * MAX_TOKENS  # MAX_TOKENS are fewer in any language; the rest of a large file is not read


def input_moments(model_path: Path, modules: Sequence[str], text_path: str) -> dict[str, Tensor]:
    """The sum of x x^T over the inputs x of each module: float64 [d_in, d_in].

    The model of the folder reads the first ``MAX_TOKENS`` of the text. The first token of each window is left
    out: decoders keep an attention sink there, and its norm would drown all others. Modules with one input
    share one tensor. Deterministic for one machine and number of threads.
    Raises BasisError when the text is missing, no UTF-8 or too short, and when the model cannot be used.
    """
    text = _read(text_path)
    model, tokenizer = _load(model_path, "auto", "to read fast_weights.calibration_path")
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_TOKENS]
    if len(ids) < WINDOW:
        raise BasisError(
            f"fast_weights.calibration_path={text_path} holds {len(ids)} tokens, "
            f"at least {WINDOW} are needed: give a longer text"
        )
    return moments_of(model, modules, [ids[i : i + WINDOW] for i in range(0, len(ids) - 1, WINDOW)])


def own_sensitivity(model_path: Path, basis: Basis, rank: int, seed: int) -> dict[str, Sensitivity]:
    """The sensitivity of each module of the basis, over the model's own text, in float32.

    Raises BasisError or ChatTemplateError when the model cannot be used.
    """
    model, tokenizer = _load(model_path, torch.float32, "to measure fast_weights.sensitivity_rank")
    chat = ChatFormat(tokenizer)
    free = (tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,)
    system = chat.system(_ASSISTANT)
    user_open = () if chat.opened_by(system) else chat.user_open
    try:
        texts = own_samples(model, (free, (*system, *user_open)), seed)
        return measure(model, basis.a, basis.first_layer, texts, rank, seed)
    except RuntimeError as error:  # sampling from NaN, a decomposition of NaN
        raise BasisError(
            f"{model_path}: fast_weights.sensitivity_rank cannot be measured ({str(error).splitlines()[0]}): "
            "its weights may be damaged"
        ) from error


def _load(model_path: Path, dtype: Any, purpose: str) -> tuple[Any, Any]:
    """Model and tokenizer of the folder. Raises BasisError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).eval()
        return model, AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise BasisError(
            f"{model_path}: cannot be loaded {purpose} ({str(error).splitlines()[0]})"
        ) from error


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
            f"fast_weights.calibration_path={text_path} cannot be read ({error.strerror}): "
            "give a plain text file"
        ) from error


@torch.no_grad()
def moments_of(model: Any, modules: Sequence[str], windows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """As ``input_moments``, of a Hugging Face causal LM that is loaded; each window two tokens or more."""
    layers: dict[str, nn.Module] = dict(model.named_modules())
    moments: dict[str, Tensor] = {}
    handles = []
    for name in modules:
        layer = layers.get(name)
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
        x = args[0][0, 1:].to("cpu", torch.float64)  # without the attention sink
        moments[key].addmm_(x.T, x)

    return add


def _input_of(name: str) -> str:
    """A name for the input of a module: gate_proj and up_proj of a layer have one input."""
    return name.removesuffix("gate_proj").removesuffix("up_proj")
