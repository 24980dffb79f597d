"""The real vLLM engine on SmolLM2-135M: log-probs against transformers, and receipts from a real forward.

The last test kills the step thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.engine.policy import VLLMPolicy
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis
from actors.protocols import EngineError, ReceiptError
from actors.types import AdapterKey, Probe, Sampling
from configs.schema import EngineConfig, FastWeightsConfig, ModelConfig
from tests.integration.engine_reference import Reference, distance, prompt, written

pytestmark = pytest.mark.engine_in_process
SIZE = 4e-3  # of B: what a few Adam steps leave on this model


@pytest.fixture(scope="module")
def basis(model_path: Path) -> Basis:
    return compute_basis_from_checkpoint(model_path, FastWeightsConfig(), seed=0)


@pytest.fixture(scope="module")
def reference(model_path: Path, basis: Basis) -> Reference:
    return Reference(model_path, basis)


@pytest.fixture(scope="module")
def policy(model_path: Path, basis: Basis) -> Iterator[VLLMPolicy]:
    config = EngineConfig(slots=4, max_model_tokens=512, kv_cache_gib=0.25)
    policy = VLLMPolicy(model_path, ModelConfig(), config, basis, (2,), version=5, threads=1, seed=0)
    yield policy
    policy.close()


def test_episodes_with_receipts_act_as_in_transformers(
    policy: VLLMPolicy, reference: Reference, basis: Basis
) -> None:
    ids = prompt(1, 60)
    probe_ids = tuple(prompt(2, 40))
    written_by = {f"e{seed}": written(basis, 1, seed, SIZE) for seed in range(2)}
    before = tuple(reference.logprobs(probe_ids, None)[-20:])

    async def story() -> None:
        for episode, weights in written_by.items():
            probe = Probe(probe_ids, before, tuple(reference.logprobs(probe_ids, weights)[-20:]))
            await policy.install(AdapterKey(5, episode, 1), weights, probe)
            swapped = AdapterKey(5, f"{episode}-swapped", 1)
            with pytest.raises(ReceiptError):
                await policy.install(swapped, written(basis, 1, 99, SIZE), probe)
        keys = [AdapterKey(5, "e0", 1), AdapterKey(5, "none", 0), AdapterKey(5, "e1", 1)]
        generations = await asyncio.gather(
            *(policy.generate(ids, Sampling(1.0, 12, seed, kind="act"), key) for seed, key in enumerate(keys))
        )
        for key, generation in zip(keys, generations, strict=True):
            right = reference.of_generated(ids, generation.token_ids, written_by.get(key.episode_id))
            assert distance(generation.logprobs, right) < 1e-3
        first = generations[0]
        assert distance(first.logprobs, reference.of_generated(ids, first.token_ids, None)) > 0.05

    asyncio.run(story())
    stats = policy.stats()
    assert stats.installs == 4
    assert (stats.receipts_passed, stats.receipts_failed, stats.receipts_unseen) == (2, 2, 0)


def test_refreshed_weights_act_as_in_transformers_and_the_way_back_is_a_fresh_engine_to_the_bit(
    policy: VLLMPolicy, reference: Reference, model_path: Path
) -> None:
    """All weights, then those of the last layers alone, then the start checkpoint's."""
    start = load_file(model_path / "model.safetensors")
    draw = torch.Generator().manual_seed(7)
    moved = {
        name: tensor + 0.02 * tensor.std() * torch.randn(tensor.shape, generator=draw)
        for name, tensor in start.items()
    }
    last = {name: start[name] for name in start if name.startswith(("model.layers.28.", "model.layers.29."))}
    ids = prompt(4, 80)

    async def scores() -> list[float]:
        return await policy.score(ids, AdapterKey(policy.version, "any", 0))

    async def story() -> None:
        fresh = await scores()
        for version, sent, whole in ((6, moved, moved), (7, last, {**moved, **last})):
            await policy.refresh(version, sent, complete=sent is whole)
            reference.model.load_state_dict(whole, strict=False)
            assert distance(await scores(), reference.logprobs(ids, None)) < 1e-3
            assert distance(await scores(), fresh) > 0.05
        await policy.refresh(8, start, complete=True)
        assert await scores() == fresh

    asyncio.run(story())


def test_the_death_of_the_step_thread_reaches_every_caller(policy: VLLMPolicy) -> None:
    """The last of the module: the engine does not come back."""
    key = AdapterKey(policy.version, "any", 0)

    def fault(engine: Any) -> None:
        def step() -> None:
            raise RuntimeError("the device is gone")

        engine.step = step

    async def story() -> None:
        running = [
            asyncio.create_task(policy.generate(prompt(3, 30), Sampling(1.0, 400, seed, kind="act"), key))
            for seed in range(6)
        ]
        await asyncio.sleep(0.3)
        policy._loop.post(fault, "other")
        for error in await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), timeout=60):
            assert isinstance(error, EngineError) and "the device is gone" in str(error)
        for later in (
            policy.generate([5, 6], Sampling(0.0, 2, 0, kind="act"), key),
            policy.release([key]),
            policy.refresh(9, {}, complete=True),
        ):
            with pytest.raises(EngineError, match="is dead: RuntimeError: the device is gone"):
                await later

    asyncio.run(story())
