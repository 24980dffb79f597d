"""Save and load everything of the learner. Nothing is pickled, so loading a foreign checkpoint runs no code.

    folder/model/              theta as a Hugging Face folder (transformers and vLLM read it)
    folder/adapter/            where theta is a LoRA: its factors, as a PEFT adapter of the base model
    folder/optimizer/          full tensors by parameter name: master.safetensors (float32 theta),
                               exp_avg.safetensors, exp_avg_sq.safetensors
    folder/reference.safetensors   the KL term's reference where a warm start made it: the weights as RL began
    folder/rng-{rank}.json     states of python's, numpy's and torch's generators
    folder/learner.json        format, ranks, step counters

Where theta is a LoRA, model/ holds the sum of base and factors. It stands alone, for evaluation, chat and new
workers. A learner that goes on takes base and factors apart again, so that nothing is rounded twice.

The state is gathered to full tensors. So a checkpoint does not depend on the ZeRO stage or on the number of
ranks that wrote it. Invariant: after ``load`` the weights and the next step's loss are those of an
uninterrupted run, to the bit (same ranks, same threads).
"""

from __future__ import annotations

import base64
import math
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

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

from configs.files import FileError, dump_json, parse_json, sync, sync_tree
from learner.engine import TrainingEngine
from learner.lora import save_adapter, whole_policy
from learner.model import PolicyModel
from learner.types import LearnerError, UnreadableError

_FORMAT = "engram-learner-1"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_REFERENCE = "reference.safetensors"
_SHARD_BYTES = 2**30
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".safetensors.index.json", ".bin.index.json")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Counters:
    version: int  # steps of any kind
    rl_steps: int  # optimizer steps since RL began, for the learning rate's warm-up
    adam_steps: int  # since the optimizer was reset
    warm: bool  # the optimizer holds moments of the warm start

    @property
    def has_own_reference(self) -> bool:
        """Whether RL began from weights that a warm start had made: no model on disk has them."""
        return self.rl_steps > 0 and self.version > self.rl_steps


@dataclass(frozen=True, slots=True)
class _Label:
    """The content of learner.json: the Counters, and what wrote them."""

    format: str
    ranks: int
    version: int
    rl_steps: int
    adam_steps: int
    warm: bool


@dataclass(frozen=True, slots=True)
class _Generators:
    """The content of rng-{rank}.json. torch and cuda are base64; cuda is "" on a CPU."""

    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[str, tuple[int, ...], int, int, float]
    torch: str
    cuda: str


def save(
    folder: str | os.PathLike[str],
    engine: TrainingEngine,
    model: PolicyModel,
    reference: PolicyModel | None,
    counters: Counters,
    model_path: str,
) -> None:
    """Write the checkpoint beside ``folder`` and rename it into place, replacing an older one.

    Collective: every rank calls it. Raises LearnerError when the disk refuses; an older checkpoint in
    ``folder`` is then as it was.
    """
    target = Path(folder)
    try:
        _save(target, engine, model, reference, counters, Path(model_path))
    except (OSError, safetensors.SafetensorError) as error:
        raise LearnerError(f"{target}: cannot be written ({error})") from error


def _save(
    target: Path,
    engine: TrainingEngine,
    model: PolicyModel,
    reference: PolicyModel | None,
    counters: Counters,
    model_path: Path,
) -> None:
    partial = target.with_name(f".{target.name}.partial")
    first = engine.rank == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "model").mkdir(parents=True)
        (partial / "optimizer").mkdir()
    engine.barrier()
    # Gathering is collective: all ranks go through every tensor, and rank 0 alone copies and writes.
    _write_policy(partial, engine, model, str(model_path))
    for file, moment in (("master", None), *((moment, moment) for moment in _MOMENTS)):
        state = _gathered(engine, model.by_name(trainable_only=True), moment)
        _write(partial / "optimizer" / f"{file}.safetensors", state, first)
        del state  # one of the three at a time
    if reference is not None:
        kept = dict(reference.by_name(trainable_only=False))
        trained = {name: kept[name].cpu().contiguous() for name, _ in model.by_name(trainable_only=True)}
        _write(partial / _REFERENCE, trained, first)
    (partial / f"rng-{engine.rank}.json").write_text(dump_json(_generators(engine.device), indent=None))
    if first:
        model.base.config.save_pretrained(partial / "model")
        _copy_companions(model_path, partial / "model")
        label = _Label(_FORMAT, engine.world_size, **asdict(counters))
        (partial / "learner.json").write_text(dump_json(label))
    engine.barrier()
    if first:
        _replace(partial, target)
    engine.barrier()


def load(
    folder: str | os.PathLike[str],
    engine: TrainingEngine,
    model: PolicyModel,
    reference: PolicyModel | None,
) -> Counters:
    """Put the checkpoint into ``engine``, ``model`` and ``reference``. Collective.

    Raises LearnerError when the checkpoint does not fit, UnreadableError when a file is spoilt; nothing has
    changed then.
    """
    source = Path(folder)
    counters = _read_counters(source / "learner.json")
    acting, trained = model.by_name(trainable_only=False), model.by_name(trainable_only=True)
    # All files are read and checked before the first tensor is set.
    states = {
        key: _read(source / "optimizer" / f"{key}.safetensors", trained) for key in ("master", *_MOMENTS)
    }
    if model.lora is None:
        theta = _read(source / "model" / "model.safetensors", acting)
    else:
        acting, theta = trained, states["master"]
        _require_same_base(source / "model", engine, model, theta)
    generators = _read_generators(source / f"rng-{engine.rank}.json")
    if reference is not None and counters.has_own_reference:
        reference.set_by_name(_read_reference(source / _REFERENCE, trained))
    engine.load_tensors(acting, theta)
    for name, param in trained:
        _set(engine, param, states["master"][name], None)
        for moment in _MOMENTS:
            _set(engine, param, states[moment][name], moment)
    for state in engine.optimizer.state.values():
        state["step"].fill_(counters.adam_steps)
    if generators is not None:
        _restore(generators, engine.device)
    engine.barrier()
    return counters


# --- tensors -----------------------------------------------------------------------------------------------


def _gathered(
    engine: TrainingEngine, parameters: list[tuple[str, nn.Parameter]], moment: str | None
) -> dict[str, Tensor]:
    """Return what ``_get`` gives of all ``parameters``, {} on other ranks than 0. Collective."""
    gathered = {}
    for name, param in parameters:
        value = _get(engine, param, moment)
        if engine.rank == 0:
            gathered[name] = value.to("cpu", torch.float32, copy=True).contiguous()
    return gathered


def _get(engine: TrainingEngine, param: nn.Parameter, moment: str | None) -> Tensor:
    """Return the full float32 master of ``param``, or one of Adam's moments. Collective."""
    if engine.zero_stage == 0:
        value = param.detach() if moment is None else engine.optimizer.state[param][moment]
    elif moment is None:
        value = safe_get_full_fp32_param(param)
    else:
        value = safe_get_full_optimizer_state(param, moment)
    shape = getattr(param, "ds_shape", param.shape)  # ZeRO-3 empties the parameter and keeps its shape there
    return value.reshape(shape)


@torch.no_grad()
def _set(engine: TrainingEngine, param: nn.Parameter, value: Tensor, moment: str | None) -> None:
    value = value.to(engine.device)
    if engine.zero_stage == 0:
        (param.data if moment is None else engine.optimizer.state[param][moment]).copy_(value)
    elif moment is None:
        safe_set_full_fp32_param(param, value)
    else:
        safe_set_full_optimizer_state(param, value, moment)


def _write_policy(partial: Path, engine: TrainingEngine, model: PolicyModel, model_path: str) -> None:
    """Write model/ and adapter/. Collective.

    The sums of a LoRA are new tensors, so they go into several files: never all of them in memory.
    """
    first, folder = engine.rank == 0, partial / "model"
    limit = math.inf if model.lora is None else _SHARD_BYTES
    index: dict[str, str] = {}
    whole = whole_policy(engine, model, copy=False, wanted=first)
    for number, shard in enumerate(_shards(whole, limit), start=1):
        file = f"model-{number:05}.safetensors"
        _write(folder / file, shard, first)
        index.update(dict.fromkeys(shard, file))
    files = set(index.values())
    if first and len(files) == 1:
        (folder / files.pop()).rename(folder / "model.safetensors")
    elif first:
        (folder / "model.safetensors.index.json").write_text(dump_json({"metadata": {}, "weight_map": index}))
    if model.lora is not None:
        trained = model.by_name(trainable_only=True)
        factors = dict(engine.full_tensors(trained, copy=False, wanted=first))
        if first:
            save_adapter(partial / "adapter", model.lora, factors, model_path)


def _shards(tensors: Iterator[tuple[str, Tensor]], limit: float) -> Iterator[dict[str, Tensor]]:
    """Collect ``tensors`` into dictionaries of at most ``limit`` bytes, or of one tensor."""
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if held and sum(one.nbytes for one in held.values()) + tensor.nbytes > limit:
            yield held
            held = {}
        held[name] = tensor
    yield held


def _require_same_base(
    folder: Path, engine: TrainingEngine, model: PolicyModel, factors: Mapping[str, Tensor]
) -> None:
    """Raise LearnerError unless the base weights and ``factors`` give the saved sums. Collective."""
    saved: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        saved |= _read(path, [])
    acting = {name: factor.to(model.base.dtype) for name, factor in factors.items()}
    for name, found in whole_policy(engine, model, copy=False, factors=acting):
        expected = saved.get(name, torch.empty(0))
        same = found.shape == expected.shape and found.dtype == expected.dtype
        # other machines may round some of the sums to the neighbouring number
        if not same or float((found - expected).norm()) > torch.finfo(found.dtype).eps * float(found.norm()):
            raise LearnerError(
                f"{folder}: {name} is not the sum of the base model and the checkpoint's factors: the base "
                "model, learner.lora_alpha or learner.dtype has changed; use those that it was trained with"
            )


def _write(path: Path, tensors: dict[str, Tensor], first: bool) -> None:
    if first:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def _read(path: Path, parameters: list[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UnreadableError(f"{path}: cannot be read ({error}); choose another checkpoint") from error
    for name, param in parameters:
        shape = tuple(getattr(param, "ds_shape", param.shape))
        stored = tuple(tensors[name].shape) if name in tensors else "nothing"
        if stored != shape:
            raise LearnerError(
                f"{path}: holds {stored} for {name} of shape {shape}; "
                "it is another model's checkpoint, or that of another learner.trainable or lora_rank"
            )
    return tensors


def _read_reference(path: Path, trained: list[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    if not path.exists():
        raise LearnerError(
            f"{path}: is missing, so objective.kl_coefficient has no reference: this checkpoint was trained "
            "without a KL term after a warm start, or by an older version; set objective.kl_coefficient=0, "
            "or start anew"
        )
    return _read(path, trained)


# --- files -------------------------------------------------------------------------------------------------


def _read_counters(path: Path) -> Counters:
    label = _parse(path, _Label)
    if label.format != _FORMAT:
        raise _no_checkpoint(path, f"format {label.format!r}, expected {_FORMAT!r}")
    return Counters(label.version, label.rl_steps, label.adam_steps, label.warm)


def _read_generators(path: Path) -> _Generators | None:
    """Return None for a rank that the checkpoint does not know: more ranks now than before."""
    return _parse(path, _Generators) if path.exists() else None


def _parse(path: Path, kind: type[T]) -> T:
    try:
        return parse_json(path.read_bytes(), kind)
    except (OSError, FileError) as error:
        raise _no_checkpoint(path, str(error)) from error


def _no_checkpoint(path: Path, reason: str) -> UnreadableError:
    return UnreadableError(
        f"{path}: not a learner checkpoint ({reason}); give the folder that Learner.save wrote"
    )


def _copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation settings: with them other programs can load the folder."""
    if source.is_dir():
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.endswith(_WEIGHTS) and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


def _replace(partial: Path, target: Path) -> None:
    """Give ``partial`` the name ``target``, whole and on the disk.

    Not ``files.new_folder``: that is for one process, and here every rank writes.
    """
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    sync_tree(partial)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


# --- random generators -------------------------------------------------------------------------------------


def _generators(device: torch.device) -> _Generators:
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return _Generators(
        python=(version, internal, gauss),
        numpy=(str(kind), tuple(np.asarray(keys).tolist()), int(position), int(has_gauss), float(cached)),
        torch=_text(torch.get_rng_state()),
        cuda=_text(torch.cuda.get_rng_state(device)) if device.type == "cuda" else "",
    )


def _restore(state: _Generators, device: torch.device) -> None:
    random.setstate(state.python)
    kind, keys, position, has_gauss, cached = state.numpy
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state.torch))
    if device.type == "cuda" and state.cuda:
        torch.cuda.set_rng_state(_bytes(state.cuda), device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
