"""A refresh in the middle of running generations.

Each token's log-prob is that of the weights which the token names. Adapters stay in force.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from actors.engine.policy import VLLMPolicy
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis
from actors.protocols import EngineError
from actors.types import AdapterKey, FastWeights, Generation, Probe, Sampling
from configs.schema import EngineConfig, FastWeightsConfig, ModelConfig
from tests.integration.engine_reference import Reference, distance, prompt, written

pytestmark = pytest.mark.engine_in_process
T = TypeVar("T")
EXACT = 1e-3  # nats, float32
STEPS = 25  # of the engine before each refresh


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, timeout=120))


@pytest.fixture(scope="module")
def basis(tiny_model_path: Path) -> Basis:
    return compute_basis_from_checkpoint(tiny_model_path, FastWeightsConfig(), seed=0)


@pytest.fixture(scope="module")
def policy(tiny_model_path: Path, basis: Basis) -> Iterator[VLLMPolicy]:
    config = EngineConfig(slots=4, max_model_tokens=512, kv_cache_gib=0.25)
    policy = VLLMPolicy(tiny_model_path, ModelConfig(), config, basis, (), version=0, threads=1, seed=0)
    yield policy
    policy.close()


def moved(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    new = {
        name: tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=draw)
        for name, tensor in tensors.items()
    }
    return {**new, "lm_head.weight": new["model.embed_tokens.weight"]}


async def steps(policy: VLLMPolicy, count: int) -> None:
    wanted = policy.stats().steps + count
    while policy.stats().steps < wanted:
        await asyncio.sleep(0.001)


def test_generations_go_on_under_new_weights_and_each_token_is_of_the_weights_it_names(
    policy: VLLMPolicy, tiny_model_path: Path, basis: Basis
) -> None:
    references = [Reference(tiny_model_path, basis) for _ in range(3)]
    state = references[0].model.state_dict()
    versions = [{name: tensor.clone() for name, tensor in state.items()}]
    for number in (1, 2):
        versions.append(moved(versions[-1], number))
        references[number].model.load_state_dict(versions[-1])
    weights = written(basis, 1, 80, 0.02)
    asked: list[tuple[list[int], FastWeights | None, Sampling]] = [
        (prompt(1, 120), None, Sampling(0.0, 90, 0, kind="act")),
        # seeded, under an adapter, and with a prompt that the prefix cache holds
        (prompt(1, 120), weights, Sampling(1.0, 90, 5, kind="act")),
        (prompt(2, 300), weights, Sampling(1.0, 90, 6, kind="extract")),
    ]
    key = AdapterKey(0, "living", 1)

    async def story() -> list[Generation]:
        await policy.install(key, weights, None)
        keys = [AdapterKey(0, "any", 0) if delta is None else key for _, delta, _ in asked]
        running = [
            asyncio.create_task(policy.generate(ids, sampling, name))
            for (ids, _, sampling), name in zip(asked, keys, strict=True)
        ]
        for version in (1, 2):
            await steps(policy, STEPS)
            with pytest.raises(EngineError, match="unknown, first extra"):
                await policy.refresh(
                    version, {"extra": state["model.norm.weight"]}, complete=False, in_flight=True
                )
            await policy.refresh(version, versions[version], complete=True, in_flight=True)
        return list(await asyncio.gather(*running))

    generations = run(story())
    assert policy.version == 2
    for (ids, delta, sampling), generation in zip(asked, generations, strict=True):
        assert len(generation.token_ids) == 90 and list(generation.versions) == sorted(generation.versions)
        assert set(generation.versions) == {0, 1, 2}
        temperature = sampling.temperature or 1.0
        expected = [
            reference.of_generated(ids, generation.token_ids, delta, temperature) for reference in references
        ]
        found = [expected[version][place] for place, version in enumerate(generation.versions)]
        assert distance(generation.logprobs, found) < EXACT
        assert distance(generation.logprobs, expected[0]) > 0.05 < distance(generation.logprobs, expected[2])
        tables = [reference.table([*ids, *generation.token_ids], delta) for reference in references]
        if sampling.temperature == 0.0:
            best = [
                int(tables[version][len(ids) - 1 + place].argmax())
                for place, version in enumerate(generation.versions)
            ]
            assert best == list(generation.token_ids)

    async def afterwards() -> None:
        """Older adapters stay, their episode may write more, and names stay used, until a drained refresh."""
        ids = prompt(3, 60)
        assert distance(await policy.score(ids, key), references[2].logprobs(ids, weights)) < EXACT
        again = await policy.generate(
            ids, Sampling(0.0, 6, 0, kind="act"), key
        )  # a stale prefix cache would show here
        assert distance(
            again.logprobs, references[2].of_generated(ids, again.token_ids, weights)
        ) < EXACT and set(again.versions) == {2}
        second, next_key = written(basis, 2, 81, 0.02), AdapterKey(0, "living", 2)
        await policy.install(next_key, second, None)
        assert distance(await policy.score(ids, next_key), references[2].logprobs(ids, second)) < EXACT
        await policy.release([key])
        with pytest.raises(EngineError, match="was installed before"):
            await policy.install(key, weights, None)
        await policy.refresh(3, versions[0], complete=True)
        with pytest.raises(EngineError, match="belongs to policy version 0, the engine is at 3"):
            await policy.generate(ids, Sampling(0.0, 2, 0, kind="act"), next_key)

    run(afterwards())


def test_a_receipt_that_a_refresh_overtakes_proves_nothing(
    policy: VLLMPolicy, tiny_model_path: Path, basis: Basis
) -> None:
    """Its probe is of the weights before the refresh, so the episode must not fail."""
    state = {
        name: tensor.clone() for name, tensor in Reference(tiny_model_path, basis).model.state_dict().items()
    }

    async def story() -> None:
        version = policy.version
        wrong = Probe(tuple(prompt(4, 40)), (-1.0,) * 4, (-2.0,) * 4)
        score = policy.score

        async def late(token_ids: list[int], adapter: AdapterKey) -> list[float]:
            await policy.refresh(version + 1, moved(state, 9), complete=True, in_flight=True)
            return await score(token_ids, adapter)

        policy.score = late  # type: ignore[method-assign, assignment]
        try:
            await policy.install(AdapterKey(version, "overtaken", 1), written(basis, 1, 3, 0.02), wrong)
        finally:
            policy.score = score  # type: ignore[method-assign]
        assert policy.stats().receipts_failed == 0

    run(story())
