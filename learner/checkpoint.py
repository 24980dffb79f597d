"""Save and load everything of the learner. Nothing is pickled: safetensors and JSON only, so loading a foreign checkpoint runs no code.

    folder/model/              theta as a Hugging Face folder (transformers and vLLM read it)
    folder/optimizer/          master.safetensors (float32 theta), exp_avg.safetensors, exp_avg_sq.safetensors: full tensors by parameter name
    folder/rng-{rank}.json     states of python's, numpy's and torch's generators
    folder/learner.json        format, version, step counters, ranks

The state is gathered to full tensors, so a checkpoint does not depend on the ZeRO stage or the number of ranks it was written with.
Invariant: after ``load`` the weights and the next step's loss are those of an uninterrupted run, to the bit (same ranks, same threads).
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from learner.engine import TrainingEngine
from learner.model import PolicyModel
from learner.types import LearnerError
from learner.weights import full_tensors, load_tensors, named_parameters

_FORMAT = "engram-learner-1"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".safetensors.index.json", ".bin.index.json")


@dataclass(frozen=True, slots=True)
class Counters:
    """version: steps of any kind. rl_steps: optimizer steps since RL began (learning-rate warm-up). adam_steps: since the optimizer was reset."""

    version: int
    rl_steps: int
    adam_steps: int
    warm: bool


def save(
    folder: str | os.PathLike[str],
    engine: TrainingEngine,
    model: PolicyModel,
    counters: Counters,
    model_path: str,
) -> None:
    """Write the checkpoint beside ``folder`` and rename it into place, replacing an older one. Collective: every rank calls it.

    Raises LearnerError when the disk refuses; an older checkpoint in ``folder`` is then as it was.
    """
    target = Path(folder)
    try:
        _save(target, engine, model, counters, Path(model_path))
    except (OSError, safetensors.SafetensorError) as error:
        raise LearnerError(f"{target}: cannot be written ({error})") from error


def _save(
    target: Path, engine: TrainingEngine, model: PolicyModel, counters: Counters, model_path: Path
) -> None:
    partial = target.with_name(f".{target.name}.partial")
    first = engine.rank == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "model").mkdir(parents=True)
        (partial / "optimizer").mkdir()
    engine.barrier()
    _write(
        partial / "model" / "model.safetensors",
        dict(full_tensors(engine, named_parameters(model, False), copy=False)),
        first,
    )
    for key, value in (("master", None), *((moment, moment) for moment in _MOMENTS)):
        state = {name: _get(engine, param, value) for name, param in named_parameters(model, True)}
        _write(partial / "optimizer" / f"{key}.safetensors", state, first)
        del state
    (partial / f"rng-{engine.rank}.json").write_text(json.dumps(_rng_state(engine.device)))
    if first:
        model.base.config.save_pretrained(partial / "model")
        _copy_companions(model_path, partial / "model")
        (partial / "learner.json").write_text(
            json.dumps({"format": _FORMAT, "ranks": engine.world_size, **asdict(counters)}, indent=1)
        )
    engine.barrier()
    if first:
        _replace(partial, target)
    engine.barrier()


def load(folder: str | os.PathLike[str], engine: TrainingEngine, model: PolicyModel) -> Counters:
    """Put the checkpoint into ``engine`` and ``model``. Collective. Raises LearnerError, having changed nothing, when it does not fit."""
    source = Path(folder)
    counters = _read_counters(source)
    everything, trained = named_parameters(model, False), named_parameters(model, True)
    theta = _read(source / "model" / "model.safetensors", everything)
    states = {
        key: _read(source / "optimizer" / f"{key}.safetensors", trained) for key in ("master", *_MOMENTS)
    }
    load_tensors(engine, everything, theta)
    for name, param in trained:
        _set(engine, param, states["master"][name], None)
        for moment in _MOMENTS:
            _set(engine, param, states[moment][name], moment)
    for state in engine.optimizer.state.values():
        state["step"].fill_(counters.adam_steps)
    _restore_rng(source / f"rng-{engine.rank}.json", engine.device)
    engine.barrier()
    return counters


def _get(engine: TrainingEngine, param: nn.Parameter, moment: str | None) -> Tensor:
    if engine.zero_stage == 0:
        value = param.detach() if moment is None else engine.optimizer.state[param][moment]
    else:
        value = (
            safe_get_full_fp32_param(param)
            if moment is None
            else safe_get_full_optimizer_state(param, moment)
        )
    shape = getattr(param, "ds_shape", param.shape)  # ZeRO-3 empties the parameter and keeps its shape there
    return value.reshape(shape).to("cpu", torch.float32, copy=True).contiguous()


@torch.no_grad()
def _set(engine: TrainingEngine, param: nn.Parameter, value: Tensor, moment: str | None) -> None:
    value = value.to(engine.device)
    if engine.zero_stage == 0:
        (param.data if moment is None else engine.optimizer.state[param][moment]).copy_(value)
    elif moment is None:
        safe_set_full_fp32_param(param, value)
    else:
        safe_set_full_optimizer_state(param, value, moment)


def _write(path: Path, tensors: dict[str, Tensor], first: bool) -> None:
    if first:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def _read(path: Path, parameters: list[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise LearnerError(f"{path}: cannot be read ({error}); choose another checkpoint") from error
    for name, param in parameters:
        shape = tuple(getattr(param, "ds_shape", param.shape))
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise LearnerError(
                f"{path}: holds {found} for {name} of shape {shape}; it is another model's, or another learner.trainable's checkpoint"
            )
    return tensors


def _read_counters(source: Path) -> Counters:
    path = source / "learner.json"
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {_FORMAT!r}")
        return Counters(
            int(content["version"]),
            int(content["rl_steps"]),
            int(content["adam_steps"]),
            bool(content["warm"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LearnerError(
            f"{path}: not a learner checkpoint ({error}); give the folder that Learner.save wrote"
        ) from error


def _copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, chat template and generation settings: what makes the folder a model that others can load."""
    if source.is_dir():
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.endswith(_WEIGHTS) and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


def _replace(partial: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _rng_state(device: torch.device) -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state(device)) if device.type == "cuda" else "",
    }


def _restore_rng(path: Path, device: torch.device) -> None:
    """A rank that the checkpoint does not know (more ranks than before) keeps its own generators."""
    if not path.exists():
        return
    state = json.loads(path.read_text())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type == "cuda" and state["cuda"]:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
