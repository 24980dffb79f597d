"""Adds Engram's part to vLLM's worker, and puts the stand-ins in place.

With lora.py, tensors.py, transfer.py and kernels.py this is all that reaches into vLLM's internals. Checked
on vLLM 0.32 (CPU build). Each reach has a test in tests/integration (test_engine*.py) that fails when
vLLM changes underneath; test_vllm_still_has_what_the_stand_ins_replace checks all signatures.

1. ``AdapterStore.load`` replaces the worker's adapter loader.
   Why: a revision is installed many times a second from memory; vLLM reads adapters from files only. vLLM
   also calls the loader after an eviction or a refresh of the weights, so revisions survive both.
   Test: test_more_episodes_than_slots_queue_and_finish.
2. ``StepAdapters`` replaces what the worker does with a step's adapters, and its list of the registered ones.
   Why: vLLM copies the list of all registered adapters for each active one, in each step: tens of
   milliseconds with 256 active of 512.
   Test: test_the_adapters_of_a_step_get_slots_and_stay_while_they_are_used.
3. ``SharedBasisDelta`` replaces the CPU's LoRA matmul and the slots of each adapted module. Where a write
   moves A (fast_weights.train_a) it is ``OwnBasisDelta``. ``StepRoutes`` follows vLLM's reading of the batch.
   Why: vLLM's matmul gathers a copy of A and B for every token, so prefill is many times slower. It reads
   index -1 ("no adapter") as the last slot, so a base request in a mixed batch would act under another
   episode's Delta. And it cannot know that A is the same in all slots.
   Test: test_engine_lora.py; test_episodes_in_one_batch_never_see_each_others_delta.
4. ``count_at_least`` replaces the sampler's rank of the sampled token.
   Why: vLLM compiles that one function at the first request, which takes twenty seconds and a C++ compiler on
   CPU, for a rank that nobody here reads.
   Test: test_the_count_is_vllms_own.

transfer.py, which takes the weights of a refresh, is imported here because vLLM imports this module before
the model loads. 1, 2 and 3 (CPU only) are set on this worker's own objects, 4 (CPU only) in vLLM's sampler
module. vLLM's classes stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.sample import sampler

from actors.engine.vllm_internals import transfer
from actors.engine.vllm_internals.lora import AdapterStore, StepAdapters, replace_matmuls
from actors.protocols import EngineError

CHECKED_VLLM = "0.32"

transfer.register()


def count_at_least(x: Tensor, values: Tensor) -> Tensor:
    """Entries of each row of x [rows, n] that are at least ``values`` [rows, 1]: int64 [rows].

    Stands in for vLLM's batched_count_greater_than.
    """
    # Floats, because their sum is vectorised: several times as quick as that of booleans, exact to n = 2^24.
    reached = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return torch.ge(x, values, out=reached).sum(-1).long()


class EngramWorker:
    """The methods that vLLM adds to its worker (``worker_extension_cls``), called by collective_rpc."""

    model_runner: Any

    def engram_setup(self, a: Mapping[str, Tensor], train_a: bool) -> None:
        """Give the worker the basis and put the stand-ins in place. ``train_a``: revisions bring their own A.

        Raises EngineError for another vLLM than the one checked, and for a model without the adapted modules.
        """
        if not vllm.__version__.startswith(f"{CHECKED_VLLM}."):
            raise EngineError(
                f"vLLM {vllm.__version__} is not supported: actors/engine/vllm_internals was checked on "
                f"{CHECKED_VLLM}; install that"
            )
        manager = self.model_runner.lora_manager
        adapters = manager._adapter_manager
        adapted = {
            part for module in adapters.modules for part in adapters.packed_modules.get(module, [module])
        }
        missing = sorted(set(a) - adapted)
        if missing:
            raise EngineError(
                f"vLLM's {type(adapters.model).__name__} has no adapted module {missing[0]}: "
                "supported are models with gate_proj, up_proj and down_proj under model.layers.N.mlp "
                "(Llama, Mistral, Qwen2, Qwen3)"
            )
        self._engram_store = AdapterStore(a, manager.lora_config.lora_dtype)
        manager._load_adapter = self._engram_store.load
        step = StepAdapters(manager)
        manager._apply_adapters, manager.list_adapters = step.apply, step.list
        if current_platform.is_cpu():
            sampler.batched_count_greater_than = count_at_least
            replace_matmuls(adapters, self._engram_store, train_a)

    def engram_put(self, path: str, b: Mapping[str, Tensor], a: Mapping[str, Tensor]) -> None:
        """Store a revision; ``a`` is empty where A is the basis.

        vLLM loads it into a slot when the first request names it.
        """
        self._engram_store.put(path, b, a)

    def engram_drop(self, path: str) -> None:
        self._engram_store.drop(path)

    def engram_clear(self) -> None:
        self._engram_store.clear()

    def engram_model(self) -> Any:
        return self.model_runner.get_model()
