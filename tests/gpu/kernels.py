"""Compares vLLM's LoRA kernels with plain torch, on the layers and the slots that Engram's engine fills.

    AdapterStore --load--> layer.set_lora --slots--> PunicaWrapperGPU (shrink, expand) --> y += x A^T B^T
         adapters A, B ------------------------------ a loop over tokens, float32 ------> y += x A^T B^T

The layers are vLLM's own, with their slots as ``from_layer`` makes them: q, k and v (slices of two widths),
gate and up (of one), down (a single one). The batches have several adapters, and tokens of the base model
between. ``python -m tests.gpu.interpreted`` runs it in Triton's interpreter, the stage "kernels" on a GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.bench.harness import timed

RANK, WIDTH = 6, 8  # of Engram's adapters, and of vLLM's slots
ADAPTERS = (31, 12, 23)  # their numbers; adapters are found by slot, not by number
SLOTS: tuple[int | None, ...] = (12, None, 31, 23)  # which adapter each slot holds
# A few tokens take other sizes of blocks than a hundred and more: vLLM's choice goes by them.
BATCHES: Mapping[str, tuple[int, ...]] = {
    "decode": (23, 0, 12, 31, 0, 23),
    "prefill": (*(12,) * 40, *(0,) * 20, *(31,) * 33, 23, *(12,) * 9, *(0,) * 30),
    "base requests": (0,) * 5,
}
ROUNDINGS = 4
"""Errors of so many roundings of y's largest entry pass. A wrong slot or slice is off by about that entry."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the layers: the hidden size, heads of ``head`` numbers each, the MLP between gate_up and down."""

    hidden: int
    head: int
    heads: int
    kv_heads: int
    mlp: int


SMALL = Sizes(hidden=64, head=16, heads=6, kv_heads=2, mlp=96)
QWEN3_4B = Sizes(hidden=2560, head=128, heads=32, kv_heads=8, mlp=9728)


class WrongDelta(Exception):
    """The kernels do not give what plain torch gives."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapted:
    """A layer of vLLM with filled slots. ``a``, ``b``: adapter -> the matrix of each slice, as Engram's."""

    layer: Any
    a: Mapping[int, Sequence[Tensor]]
    b: Mapping[int, Sequence[Tensor]]

    @property
    def d_in(self) -> int:
        return self.a[ADAPTERS[0]][0].shape[1]

    @property
    def d_out(self) -> int:
        return sum(self.layer.output_slices)


def check(wrapper: type, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> dict[str, float]:
    """The largest error of each layer under each batch, relative to the largest entry of y.

    wrapper: vLLM's PunicaWrapperGPU, or what stands in for it. Raises WrongDelta where an error is too large,
    or a token of the base model was changed by one bit.
    """
    draw = torch.Generator().manual_seed(0)
    errors: dict[str, float] = {}
    with _vllm_is_set_up():
        routes = _routes(wrapper, device, dtype)
        for name, adapted in _layers(sizes, device, dtype, draw).items():
            for batch, tokens in BATCHES.items():
                errors[f"{name}, {batch}"] = _error(routes, adapted, tokens, dtype, draw, f"{name}, {batch}")
    return errors


def microseconds(wrapper: type, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> dict[str, float]:
    """Of gate_up's adapters, and of the layer's own matmul beside it."""
    draw = torch.Generator().manual_seed(0)
    found: dict[str, float] = {}
    with _vllm_is_set_up():
        routes, adapted = _routes(wrapper, device, dtype), _layers(sizes, device, dtype, draw)["gate_up"]
        matrix = torch.randn(adapted.d_out, adapted.d_in, generator=draw).to(device, dtype)
        for batch in ("decode", "prefill"):
            _route(routes, BATCHES[batch])
            x = torch.randn(len(BATCHES[batch]), adapted.d_in, generator=draw).to(device, dtype)
            y = x @ matrix.T
            found[f"adapters, {batch}: us"] = _clock(partial(_apply, routes, adapted, x, y))
            found[f"matmul, {batch}: us"] = _clock(partial(torch.matmul, x, matrix.T))
    return found


def _clock(work: Callable[[], object], times: int = 50) -> float:
    """Microseconds of one call of ``work``, without its first ones: those compile."""

    def repeat() -> None:
        for _ in range(times):
            work()

    repeat()
    return timed(repeat).wall_s / times * 1e6


def _error(
    routes: Any,
    adapted: Adapted,
    tokens: tuple[int, ...],
    dtype: torch.dtype,
    draw: torch.Generator,
    what: str,
) -> float:
    device = adapted.layer.lora_a_stacked[0].device
    x = torch.randn(len(tokens), adapted.d_in, generator=draw).to(dtype)
    before = torch.randn(len(tokens), adapted.d_out, generator=draw).to(dtype)
    y = before.to(device, copy=True)
    _route(routes, tokens)
    _apply(routes, adapted, x.to(device), y)
    got, want = y.cpu(), _by_hand(adapted, tokens, x, before)
    base = torch.tensor([adapter == 0 for adapter in tokens])
    if not torch.equal(got[base], before[base]):
        raise WrongDelta(f"{what}: tokens without an adapter were changed")
    error = float((got.float() - want).abs().max() / want.abs().max())
    most = max(ROUNDINGS * torch.finfo(dtype).eps, 1e-5)
    if not error <= most:  # a NaN, too
        raise WrongDelta(f"{what}: an error of {error:.4f} of the largest entry, more than {most:.4f}")
    return error


def _by_hand(adapted: Adapted, tokens: tuple[int, ...], x: Tensor, y: Tensor) -> Tensor:
    """[tokens, d_out] in float32, a token after the other."""
    want = y.float()
    for place, adapter in enumerate(tokens):
        if adapter:
            pairs = zip(adapted.a[adapter], adapted.b[adapter], strict=True)
            want[place] += torch.cat([b.float() @ (a.float() @ x[place].float()) for a, b in pairs])
    return want


def _routes(wrapper: type, device: torch.device, dtype: torch.dtype) -> Any:
    return wrapper(256, max_batches=64, device=device, lora_config=_lora_config(dtype))


def _route(routes: Any, tokens: tuple[int, ...]) -> None:
    from vllm.lora.layers import LoRAMapping

    mapping = LoRAMapping(tokens, tokens[:64], is_prefill=True)
    routes.update_metadata(mapping, list(SLOTS), len(SLOTS) + 1, 1000)


def _apply(routes: Any, adapted: Adapted, x: Tensor, y: Tensor) -> None:
    """As vLLM's layers do after their own matmul."""
    layer = adapted.layer
    routes.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices)


def _layers(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, draw: torch.Generator
) -> dict[str, Adapted]:
    from vllm.model_executor.layers.linear import (
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )

    with torch.device(device):
        qkv = QKVParallelLinear(
            sizes.hidden, sizes.head, sizes.heads, sizes.kv_heads, bias=False, params_dtype=dtype
        )
        gate_up = MergedColumnParallelLinear(sizes.hidden, [sizes.mlp] * 2, bias=False, params_dtype=dtype)
        down = RowParallelLinear(sizes.mlp, sizes.hidden, bias=False, params_dtype=dtype)
    kv = sizes.head * sizes.kv_heads
    return {
        "qkv": _adapted(qkv, sizes.hidden, (sizes.head * sizes.heads, kv, kv), dtype, draw),
        "gate_up": _adapted(gate_up, sizes.hidden, (sizes.mlp, sizes.mlp), dtype, draw),
        "down": _adapted(down, sizes.mlp, (sizes.hidden,), dtype, draw),
    }


def _adapted(
    plain: Any, d_in: int, widths: tuple[int, ...], dtype: torch.dtype, draw: torch.Generator
) -> Adapted:
    """``plain`` with vLLM's slots, filled from Engram's store. The last adapter has an A of its own."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.utils import from_layer

    from actors.engine.vllm_internals.lora import AdapterStore

    names = [f"slice{number}" for number in range(len(widths))]
    layer: Any = from_layer(plain, len(SLOTS), _lora_config(dtype), names)

    def draw_a() -> dict[str, Tensor]:
        return {name: torch.randn(RANK, d_in, generator=draw) / d_in**0.5 for name in names}

    store = AdapterStore(draw_a(), dtype)
    a: dict[int, list[Tensor]] = {}
    b: dict[int, list[Tensor]] = {}
    for adapter in ADAPTERS:
        # as the engine hands it over: d_out innermost in memory
        own = draw_a() if adapter == ADAPTERS[-1] else {}
        written = {n: torch.randn(RANK, w, generator=draw).T for n, w in zip(names, widths, strict=True)}
        store.put(str(adapter), written, own)
        loaded = store.load(LoRARequest(str(adapter), adapter, str(adapter))).loras
        a[adapter], b[adapter] = [loaded[n].lora_a for n in names], [loaded[n].lora_b for n in names]
    single = len(names) == 1
    for slot, filled in enumerate(SLOTS):
        for adapter in (ADAPTERS[0], filled):  # a slot holds nothing of the adapter that it had before
            if adapter is not None:
                layer.set_lora(slot, *((m[adapter][0] if single else m[adapter]) for m in (a, b)))
    return Adapted(layer, a, b)


def _lora_config(dtype: torch.dtype) -> Any:
    from vllm.config.lora import LoRAConfig

    made = LoRAConfig(max_lora_rank=WIDTH, max_loras=len(SLOTS), max_cpu_loras=2 * len(SLOTS))
    made.lora_dtype = dtype
    return made


@contextmanager
def _vllm_is_set_up() -> Iterator[None]:
    """What vLLM's layers need around them: a configuration, and groups of one process."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        if torch.distributed.is_initialized():
            yield
            return
        parallel_state.init_distributed_environment(1, 0, f"file://{Path(folder) / 'store'}", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
