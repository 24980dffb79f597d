"""Makes the engine on a CPU take the paths that it takes on a GPU: a pytest plugin.

    python -m pytest -p tests.gpu.emulation tests/integration/test_engine.py ...

What stands in for what. Everything above the kernels is vLLM's own code:

    plain weights        each matrix stays [out, in] in its module, where a CPU packs it away
    adapter slots        vLLM's own slots and PunicaWrapperGPU's routing, with shrink and expand in torch
    asynchronous         vLLM's AsyncScheduler, its default on CUDA; CUDA's events and streams are empty
    chunked prefill      in steps of ``STEP_TOKENS``, so that nearly every prompt is cut

Tests marked ``cpu_paths`` are about what only a CPU does; they are left out. Not emulated: the kernels
themselves, CUDA graphs, bfloat16, memory. ``make gpu-smoke`` is for those.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

STEP_TOKENS = 64
"""Tokens of one engine step: small, so that prompts come in several parts."""


def pytest_configure(config: pytest.Config) -> None:
    keep_plain_weights()
    take_vllms_slots()
    schedule_asynchronously()
    cut_prefills()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if item.get_closest_marker("cpu_paths")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def keep_plain_weights() -> None:
    """Leave every matrix where a GPU leaves it."""
    from vllm.model_executor.layers import utils

    def plain(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]

    utils.dispatch_cpu_unquantized_gemm = plain


def take_vllms_slots() -> None:
    """Keep Engram's CPU stand-ins out, and give vLLM the GPU's wrapper instead of the CPU's."""
    from vllm.lora.punica_wrapper import punica_cpu
    from vllm.v1.sample import sampler

    from actors.engine.vllm_internals import worker_extension

    worker_extension.current_platform = SimpleNamespace(is_cpu=lambda: False)
    sampler.batched_count_greater_than = worker_extension.count_at_least  # vLLM's takes 20 s to compile
    punica_cpu.PunicaWrapperCPU = gpu_wrapper()


def gpu_wrapper() -> type:
    """vLLM's PunicaWrapperGPU, whose kernels are loops in torch over the same metadata."""
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

    class Wrapper(PunicaWrapperBase):
        def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **settings: Any):
            super().__init__(max_num_batched_tokens, max_batches, device)
            slots = settings["lora_config"].max_loras
            self.meta = LoRAKernelMeta.make(slots, max_num_batched_tokens, device=device)

        def update_metadata(
            self, mapping: Any, lora_index_to_id: Any, max_loras: int, vocab_size: int, **_: Any
        ) -> None:
            self.is_prefill = mapping.is_prefill
            self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
            self.meta.prepare_tensors(self.token_lora_indices)

        def add_lora_linear(
            self, y: Any, x: Any, a: Any, b: Any, scale: float, output_slices: Any, **_: Any
        ) -> None:
            _add_by_metadata(self.meta, y, x, a, b, scale, output_slices)

        def _not_taken(self, *_: Any, **__: Any) -> None:
            raise NotImplementedError("Engram adapts linear layers only")

        add_shrink = add_expand = add_lora_embedding = add_lora_logits = apply_lora_full_linear = _not_taken

    return Wrapper


def _add_by_metadata(meta: Any, y: Any, x: Any, a: Any, b: Any, scale: float, output_slices: Any) -> None:
    """y[t] += x[t] A^T B^T, as the kernels read LoRAKernelMeta: sorted tokens, a start and count an adapter.

    y [tokens, d_out] is changed in place; x [tokens, d_in]; a, b: a slice's slots [slots, 1, ...].
    """
    if meta.no_lora_flag_cpu.item():
        return
    starts, counts = meta.lora_token_start_loc.tolist(), meta.num_tokens_per_lora.tolist()
    for place, slot in enumerate(meta.active_lora_ids.tolist()):
        if slot < 0 or not counts[place]:
            continue
        rows = meta.token_indices_sorted_by_lora_ids[starts[place] : starts[place] + counts[place]].long()
        left = 0
        for slot_a, slot_b, width in zip(a, b, output_slices, strict=True):
            shrunk = x[rows].float() @ slot_a[slot, 0].float().T * scale
            y[rows, left : left + width] += (shrunk @ slot_b[slot, 0].float().T).to(y.dtype)
            left += width


class _Stream:
    """A CUDA stream, or an event in it, where all work is done once it is asked for."""

    device = torch.device("cpu")

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def nothing(self, *_: Any) -> None: ...

    record = synchronize = wait = wait_stream = wait_event = nothing


def schedule_asynchronously() -> None:
    """Let vLLM plan a step before the last one has ended, as it does on CUDA."""
    from vllm.platforms.cpu import CpuPlatform

    settle = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def settle_asynchronous(cls: type, vllm_config: Any) -> None:
        settle(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(settle_asynchronous)  # type: ignore[assignment]
    torch.cuda.Event = torch.cuda.Stream = _Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = _Stream  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: nullcontext()  # type: ignore[assignment,misc]


class _Rewound(torch.Generator):
    """A generator that vLLM may rewind after a partial prefill, which a CPU's own cannot.

    Until its prompt is whole a request has drawn nothing that counts, so back is the beginning. A request
    that is prefilled again in its middle, for new weights, begins its draws again.
    """

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        self.manual_seed(self.initial_seed())


class _TorchThatRewinds:
    Generator = _Rewound

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def cut_prefills() -> None:
    """Turn chunked prefill on, in small steps."""
    from vllm.v1.worker import gpu_model_runner

    from actors.engine import start

    of_cpu = start.engine_arguments

    def arguments(*given: Any) -> Any:
        made = of_cpu(*given)
        made.enable_chunked_prefill = True
        made.max_num_batched_tokens = max(STEP_TOKENS, made.max_num_seqs)
        return made

    start.engine_arguments = arguments
    gpu_model_runner.torch = _TorchThatRewinds()
