"""Where a checkpoint's tensors live in vLLM's model, and how new values get there without loading it anew.

    tensors by Hugging Face name --check--> Places --load--> vLLM's modules
      q_proj, k_proj, v_proj     qkv_proj      CPU: vLLM packs the matrix for its matmul and drops it:
      gate_proj, up_proj         gate_up_proj  the parts are joined, and packed again
                                               GPU, or not packed: rows are overwritten
      embed_tokens, norms,       the same      overwritten; a head that shares the embedding is packed again
      biases

Values are overwritten in place wherever they are whole, so every holder of such a tensor sees the new ones. A
packed matrix goes through vLLM's own packing, with the same values as at a start: the engine then equals a
fresh one to the bit.

Why: vLLM's own loader cannot write into a running CPU engine, as the matrices that it would fill are packed
away. Checked on vLLM 0.32, tensor parallelism 1.
Test: test_engine_refresh.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from actors.policy_lora import FormedWeights
from actors.protocols import EngineError


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One parameter of vLLM's model.

    owners: the modules that hold it, one or more; two where the head is tied to the embedding.
    parts: Hugging Face name -> shape of the tensors that make it up, below each other in this order. There is
    a single part, except in packed modules.
    alias: a name under which a checkpoint may hold the same values once more (a tied head's), or "".
    """

    owners: tuple[Any, ...]
    leaf: str
    parts: Mapping[str, tuple[int, ...]]
    alias: str


def find_places(model: nn.Module) -> tuple[Place, ...]:
    """All parameters of vLLM's ``model``.

    Raises EngineError for a model whose tensors have no name and shape of their own (quantized, or sharded).
    """
    owned: dict[int, list[tuple[str, Any, str]]] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            owned.setdefault(id(parameter), []).append((path.replace(".base_layer", ""), module, leaf))
    return tuple(_place(model, holders) for holders in owned.values())


def check(places: Sequence[Place], tensors: Mapping[str, Tensor], complete: bool) -> None:
    """Raise EngineError unless every tensor has a place and its shape, and all parts of a place are there.

    With ``complete``, every place must get its tensors.
    """
    shapes = {name: shape for place in places for name, shape in place.parts.items()}
    aliases = {place.alias for place in places}
    found = _shapes_of(tensors)
    wanted = {
        name
        for place in places
        if complete or any(part in tensors for part in place.parts)
        for name in place.parts
    }
    missing = sorted(wanted - set(tensors))
    unknown = sorted(set(tensors) - set(shapes) - aliases)
    misshapen = sorted(name for name in shapes if name in found and found[name] != shapes[name])
    faults = [
        f"{len(names)} {word}, first {names[0]}"
        for word, names in (("missing", missing), ("unknown", unknown))
        if names
    ]
    if misshapen:
        first = misshapen[0]
        faults.append(
            f"{len(misshapen)} of another shape, first {first} "
            f"{list(found[first])} in place of {list(shapes[first])}"
        )
    if faults:
        cure = (
            "hand over the whole model"
            if complete
            else "hand over all parts of each packed matrix (q, k and v; gate and up)"
        )
        raise EngineError(f"of {len(tensors)} tensors {'; '.join(faults)}; {cure}")


def _shapes_of(tensors: Mapping[str, Tensor]) -> Mapping[str, tuple[int, ...]]:
    """Shapes by name. Of matrices that are formed when they are asked for, without forming them."""
    if isinstance(tensors, FormedWeights):
        return tensors.shapes
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def load(model: nn.Module, places: Sequence[Place], tensors: Mapping[str, Tensor]) -> None:
    """Put checked ``tensors`` (any device and dtype) in their places. Other places keep their values."""
    with torch.inference_mode():
        for place in places:
            if all(name in tensors for name in place.parts):
                _fill(place, [tensors[name] for name in place.parts], head=getattr(model, "lm_head", None))


def _fill(place: Place, values: Sequence[Tensor], head: Any) -> None:
    module = place.owners[0]
    whole = getattr(module, place.leaf)
    if whole.numel() == 0:
        module.cpu_linear = None  # first free the old packed matrix: the new one then takes its memory
        module.weight = nn.Parameter(_joined(values, module.params_dtype), requires_grad=False)
        module.quant_method.process_weights_after_loading(module)
        return
    start = 0
    for value in values:
        whole.data[start : start + len(value)].copy_(value)
        start += len(value)
    for owner in place.owners:
        # vLLM may keep a packed copy beside the whole matrix. An embedding's copy is read only as the head.
        if place.leaf == "weight" and getattr(owner, "cpu_linear", linear) is not linear:
            owner.cpu_linear = linear
            if owner is head or not isinstance(owner, VocabParallelEmbedding):
                owner.quant_method.process_weights_after_loading(owner)
                owner.weight = whole


def _joined(values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A new matrix: vLLM may keep what it is given to pack, so it must not be the sender's memory."""
    return torch.cat([value.to("cpu", dtype) for value in values])


def _place(model: nn.Module, holders: Sequence[tuple[str, Any, str]]) -> Place:
    path, module, leaf = holders[0]
    parent, _, last = path.rpartition(".")
    prefix = f"{parent}." if parent else ""
    packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    names = [f"{prefix}{part}.{leaf}" for part in packed.get(last, [last])]
    shapes = _shapes(path, module, leaf, getattr(module, leaf))
    if len(names) != len(shapes):
        raise EngineError(
            f"cannot refresh {path}: it is made of {len(shapes)} matrices, its names are {', '.join(names)}"
        )
    tied = isinstance(module, VocabParallelEmbedding) and bool(
        getattr(model.config, "tie_word_embeddings", False)
    )
    owners = tuple(owner for _, owner, _ in holders)
    return Place(owners, leaf, dict(zip(names, shapes, strict=True)), "lm_head.weight" if tied else "")


def _shapes(path: str, module: Any, leaf: str, parameter: Tensor) -> list[tuple[int, ...]]:
    """Shapes of the checkpoint's tensors behind ``parameter``, which is empty where vLLM has packed it."""
    method = getattr(module, "quant_method", None)
    if method is not None and not isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod):
        raise EngineError(
            f"cannot refresh {path}: {type(method).__name__} is not supported, only plain matrices are"
        )
    if getattr(module, "tp_size", 1) != 1:
        raise EngineError(f"cannot refresh {path}: it is split over {module.tp_size} devices")
    if isinstance(module, VocabParallelEmbedding):
        return [(module.org_vocab_size, *parameter.shape[1:])]  # vLLM pads the rows
    if isinstance(module, LinearBase):
        columns = (module.input_size,) if leaf == "weight" else ()
        return [(rows, *columns) for rows in module.output_partition_sizes]
    return [tuple(parameter.shape)]
