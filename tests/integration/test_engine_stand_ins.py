"""What actors/engine/vllm_internals assumes of vLLM 0.32, on the real engine."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.engine.policy import VLLMPolicy
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis
from actors.protocols import EngineError
from actors.types import AdapterKey, Sampling
from configs.schema import FastWeightsConfig
from tests.integration.engine_cases import (
    SIZE,
    SLOTS,
    base,
    engine,
    installed,
    run,
)
from tests.integration.engine_reference import prompt, written

pytestmark = pytest.mark.engine_in_process


@pytest.fixture(scope="module")
def basis(tiny_model_path: Path) -> Basis:
    return compute_basis_from_checkpoint(tiny_model_path, FastWeightsConfig(), seed=0)


@pytest.fixture(scope="module")
def policy(tiny_model_path: Path, basis: Basis) -> Iterator[VLLMPolicy]:
    policy = engine(tiny_model_path, basis)
    yield policy
    policy.close()


@pytest.mark.cpu_paths
def test_vllm_still_has_what_the_stand_ins_replace() -> None:
    import vllm
    from vllm.lora.layers import base_linear
    from vllm.lora.model_manager import LRUCacheLoRAModelManager
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.v1.sample import sampler
    from vllm.v1.sample.ops import logprobs

    from actors.engine.vllm_internals.lora import SharedBasisDelta
    from actors.engine.vllm_internals.worker_extension import CHECKED_VLLM

    def parameters(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert vllm.__version__.startswith(f"{CHECKED_VLLM}.")
    assert parameters(LRUCacheWorkerLoRAManager._load_adapter) == ["self", "lora_request"]
    assert parameters(LRUCacheWorkerLoRAManager._apply_adapters) == ["self", "lora_requests"]
    assert parameters(LRUCacheWorkerLoRAManager.list_adapters) == ["self"]
    assert "in self.list_adapters()" in inspect.getsource(LRUCacheWorkerLoRAManager.add_adapter)
    assert "_active_adapters" in inspect.getsource(LRUCacheLoRAModelManager.activate_adapter)
    assert parameters(PunicaWrapperBase.update_metadata)[:5] == [
        "self",
        "mapping",
        "lora_index_to_id",
        "max_loras",
        "vocab_size",
    ]
    linear = base_linear.BaseLinearLayerWithLoRA
    assert parameters(linear.set_lora) == ["self", "index", "lora_a", "lora_b"]
    assert parameters(linear.reset_lora) == ["self", "index"]
    called = " ".join(inspect.getsource(linear._apply_lora_to_output).split())
    arguments = "output, x, self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices"
    assert f"punica_wrapper.add_lora_linear( {arguments} )" in called
    assert len(parameters(SharedBasisDelta.add_lora_linear)) == 7
    assert parameters(PunicaWrapperCPU.add_lora_linear)[7:] == ["buffer", "kwargs"]
    assert "batched_count_greater_than(" in inspect.getsource(sampler.Sampler)
    assert parameters(logprobs.batched_count_greater_than) == ["x", "values"]


@pytest.mark.cpu_paths
def test_the_workers_own_objects_carry_the_stand_ins(policy: VLLMPolicy) -> None:
    from actors.engine.vllm_internals.lora import AdapterStore, SharedBasisDelta, StepAdapters, StepRoutes
    from actors.engine.vllm_internals.worker_extension import EngramWorker

    def look(engine: Any) -> None:
        manager = _adapter_manager(engine)
        adapters = manager._adapter_manager
        (punica,) = adapters.punica_wrapper_mapping.values()
        assert isinstance(engine.model_executor.driver_worker.worker, EngramWorker)
        assert manager._load_adapter.__func__ is AdapterStore.load
        assert manager._apply_adapters.__func__ is StepAdapters.apply
        assert manager.list_adapters.__func__ is StepAdapters.list
        assert punica.update_metadata.__func__ is StepRoutes.update_metadata
        assert sorted(adapters.modules) == sorted(
            f"model.layers.{layer}.mlp.{name}"
            for layer in (2, 3, 4, 5)
            for name in ("gate_up_proj", "down_proj")
        )
        for module in adapters.modules.values():
            assert isinstance(module.punica_wrapper, SharedBasisDelta)
            assert module.set_lora.__self__ is module.reset_lora.__self__ is module.punica_wrapper

    policy._loop.call(look, "other").result(timeout=30)


def _adapter_manager(engine: Any) -> Any:
    return engine.model_executor.driver_worker.worker.model_runner.lora_manager


def test_the_adapters_of_a_step_get_slots_and_stay_while_they_are_used(
    policy: VLLMPolicy, basis: Basis
) -> None:
    """On vLLM's own manager, with twice as many known adapters as slots.

    It shows what is evicted, what is loaded again, and what is refused.
    """
    from vllm.lora.request import LoRARequest

    known = 2 * SLOTS

    async def names() -> list[AdapterKey]:
        return [
            await installed(policy, f"step-{index}", written(basis, 1, 200 + index, SIZE))
            for index in range(known + 1)
        ]

    keys = run(names())

    def story(engine: Any) -> None:
        manager = _adapter_manager(engine)
        adapters = manager._adapter_manager
        manager.remove_all_adapters()
        requests = [policy._table.find(name) for name in keys]
        numbers = [request.lora_int_id for request in requests if request is not None]
        loaded: list[str] = []
        load = manager._load_adapter
        manager._load_adapter = lambda request: (loaded.append(request.lora_int_id), load(request))[1]

        def apply(*places: int) -> list[int]:
            loaded.clear()
            manager._apply_adapters([requests[place] for place in places])  # vLLM gives a set, in any order
            assert all(numbers[place] in adapters.lora_index_to_id for place in places), (
                "an adapter of the step has no slot"
            )
            assert len(set(adapters.lora_index_to_id)) == len(adapters.lora_index_to_id), (
                "an adapter has two slots"
            )
            return sorted(numbers.index(number) for number in loaded)

        assert apply(0, 1, 2, 3) == [0, 1, 2, 3] and apply(3, 1) == []
        slots = list(adapters.lora_index_to_id)
        assert apply(0, 1, 2, 3) == [] and adapters.lora_index_to_id == slots
        assert apply(4, 5, 6, 7) == [4, 5, 6, 7] and set(manager.list_adapters()) == set(numbers[:known])
        assert apply(0, 4) == []  # 0 had lost its slot, not its place among the known
        assert apply(8, 1) == [8]  # 1, the least recently used, is of this step: another goes
        (evicted,) = set(numbers[:known]) - set(manager.list_adapters())
        assert evicted in numbers[2:4] and len(manager.list_adapters()) == known, (
            "one of the least recently used goes, and no other"
        )
        with pytest.raises(EngineError, match="5 adapters, the engine has 4 slots"):
            apply(0, 1, 2, 3, 4)
        with pytest.raises(EngineError, match=r"mem://ghost is not in the store"):
            manager._apply_adapters({LoRARequest("ghost", 10**6, "mem://ghost")})
        manager._load_adapter = load

    policy._loop.call(story, "other").result(timeout=60)
    run(policy.release(keys))


def test_installs_that_wait_are_all_done_between_two_steps(policy: VLLMPolicy, basis: Basis) -> None:
    """32 installs are asked for while requests run and the step thread is busy (here: it is held)."""
    entered, release, count = threading.Event(), threading.Event(), 32
    weights = [written(basis, 1, 300 + index, SIZE) for index in range(count)]
    put, steps = policy._table.put, []

    def noting(*arguments: Any) -> None:
        steps.append(policy._loop.times.steps)
        put(*arguments)

    def hold(engine: Any) -> bool:
        entered.set()
        return release.wait(30)

    async def story() -> None:
        running = [
            asyncio.create_task(
                policy.generate(prompt(40 + i, 20), Sampling(1.0, 200, i, kind="act"), base(policy))
            )
            for i in range(2)
        ]
        await asyncio.sleep(0.1)
        holding = policy._loop.call(hold, "other")
        while not entered.is_set():
            await asyncio.sleep(0.01)
        installs = [
            asyncio.create_task(installed(policy, f"waiting-{index}", one))
            for index, one in enumerate(weights)
        ]
        while len(policy._loop._work) < count:
            await asyncio.sleep(0.01)
        release.set()
        names = await asyncio.gather(*installs)
        await asyncio.gather(*running)
        assert holding.result(timeout=1) and len(steps) == count and len(set(steps)) == 1, steps
        assert policy._loop.times.steps > steps[-1], (
            "no step came after: the requests had ended, and the test shows nothing"
        )
        await policy.release(names)

    policy._table.put = noting  # type: ignore[method-assign]
    try:
        run(story())
    finally:
        policy._table.put = put  # type: ignore[method-assign]


def test_the_count_is_vllms_own() -> None:
    from vllm.v1.sample.ops.logprobs import batched_count_greater_than

    from actors.engine.vllm_internals.worker_extension import count_at_least

    x = torch.tensor([[1.0, 2.0, 3.0], [3.0, 3.0, 1.0]])
    original = batched_count_greater_than._torchdynamo_orig_callable
    assert count_at_least(x, x[:, 1:2]).tolist() == original(x, x[:, 1:2]).tolist() == [2, 2]


_AFTER_ODD_MODULES = """
import sys
import bm25s  # imports numba
import flask
from pathlib import Path
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.engine.policy import VLLMPolicy
from configs.schema import EngineConfig, FastWeightsConfig, ModelConfig

model = Path(sys.argv[1])
engine = EngineConfig(slots=1, max_model_tokens=64, kv_cache_gib=0.1)
basis = compute_basis_from_checkpoint(model, FastWeightsConfig(), seed=0)
VLLMPolicy(model, ModelConfig(), engine, basis, (2,), 0, threads=1, seed=0).close()
"""


def test_the_engine_starts_after_modules_that_answer_oddly(tiny_model_path: Path) -> None:
    """In a process of its own: vLLM looks through the imported modules at its first start only."""
    ended = subprocess.run(
        [sys.executable, "-c", _AFTER_ODD_MODULES, str(tiny_model_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
