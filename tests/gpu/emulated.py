"""Shows that the emulation is on. Run by tests/integration/test_gpu_emulated.py, with the plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors.engine.policy import VLLMPolicy
from actors.fast_weights.basis import compute_basis_from_checkpoint
from configs.schema import EngineConfig, FastWeightsConfig, ModelConfig
from tests.gpu.emulation import STEP_TOKENS


def test_the_engine_takes_the_paths_of_a_gpu(tiny_model_path: Path) -> None:
    basis = compute_basis_from_checkpoint(tiny_model_path, FastWeightsConfig(), seed=0)
    config = EngineConfig(slots=4, max_model_tokens=512, kv_cache_gib=0.25)
    policy = VLLMPolicy(tiny_model_path, ModelConfig(), config, basis, (2,), version=0, threads=1, seed=0)

    def look(engine: Any) -> tuple[object, ...]:
        core = engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        adapters = runner.lora_manager._adapter_manager
        settings = engine.vllm_config.scheduler_config
        (wrapper,) = adapters.punica_wrapper_mapping.values()
        slots = next(iter(adapters.modules.values())).lora_b_stacked
        return (
            type(core.scheduler).__name__,
            core.batch_queue_size,
            (settings.enable_chunked_prefill, settings.max_num_batched_tokens),
            (hasattr(wrapper, "meta"), len(slots[0])),
            tuple(runner.get_model().model.layers[0].mlp.down_proj.weight.shape),
        )

    try:
        scheduler, at_once, prefill, routing, shape = policy._loop.call(look, "other").result(30)
    finally:
        policy.close()
    assert scheduler == "AsyncScheduler" and at_once == 2
    assert prefill == (True, STEP_TOKENS)
    assert routing == (True, 4), "vLLM's own slots"
    assert shape == (128, 256), "a CPU packs it away"
