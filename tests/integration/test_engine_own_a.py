"""fast_weights.train_a on a real engine: writes that move A are installed and pass their receipts.

They act as in transformers.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from actors.engine.policy import VLLMPolicy
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import zero
from actors.protocols import EngineError, ReceiptError
from actors.types import AdapterKey, FastWeights, Sampling, WriteExample, WriteRequest, WriteResult
from configs.schema import EngineConfig, FastWeightsConfig, ModelConfig, WriteConfig
from tests.integration.engine_reference import Reference, distance, prompt

pytestmark = pytest.mark.engine_in_process
EXACT = 1e-3  # nats, float32: what engine and transformers may differ by
WRITE = WriteConfig(optimizer="adam", learning_rate=1e-2, epochs=4)


def test_revisions_with_an_a_of_their_own_act_side_by_side(tiny_model_path: Path) -> None:
    basis = compute_basis_from_checkpoint(
        tiny_model_path, FastWeightsConfig(last_layers=2, train_a=True), seed=0
    )
    reference = Reference(tiny_model_path, basis)
    engine = EngineConfig(slots=3, max_model_tokens=256, kv_cache_gib=0.25)
    policy = VLLMPolicy(tiny_model_path, ModelConfig(), engine, basis, (2,), version=0, threads=1, seed=0)
    try:
        asked = [
            WriteRequest(
                name,
                zero(basis),
                tuple(
                    WriteExample(tuple(prompt(place, 9)), tuple(prompt(place + 40, 5)))
                    for place in (seed, seed + 1)
                ),
            )
            for seed, name in ((1, "a"), (5, "b"))
        ]
        results = policy.writer(WRITE).write(asked)
        assert [result.outcome for result in results] == ["accepted", "accepted"], [
            result.reason for result in results
        ]
        asyncio.run(asyncio.wait_for(_story(policy, reference, results), timeout=120))
        assert policy.stats().receipts_passed == 2 and policy.stats().receipts_unseen == 0
    finally:
        policy.close()


async def _story(policy: VLLMPolicy, reference: Reference, results: list[WriteResult]) -> None:
    weights: list[FastWeights | None] = [results[0].weights, None, results[1].weights]
    keys = [AdapterKey(0, "a", 1), AdapterKey(0, "any", 0), AdapterKey(0, "b", 1)]
    for place in (0, 2):
        await policy.install(keys[place], results[place // 2].weights, results[place // 2].probe)
    ids = prompt(20, 120)
    scored = await asyncio.gather(*(policy.score(ids, key) for key in keys))
    # Decode together, the base model among them.
    sampled = await asyncio.gather(*(policy.generate(ids, Sampling(0.0, 8, 0, "act"), key) for key in keys))
    for scores, generation, one in zip(scored, sampled, weights, strict=True):
        assert distance(scores, reference.logprobs(ids, one)) < EXACT
        assert distance(generation.logprobs, reference.of_generated(ids, generation.token_ids, one)) < EXACT
    a_of_the_basis = {name: a.numpy() for name, a in reference.basis.a.items()}
    basis_a = FastWeights(reference.basis.id, 1, results[0].weights.b, a_of_the_basis)
    assert distance(scored[0], reference.logprobs(ids, basis_a)) > 10 * EXACT, (
        "A moved too little for this test to mean anything"
    )
    # The written B on the basis' A is not what the writer computed.
    with pytest.raises(ReceiptError, match="a@2"):
        await policy.install(AdapterKey(0, "a", 2), replace(basis_a, revision=2), results[0].probe)
    with pytest.raises(EngineError, match="have no A of its own"):
        await policy.install(AdapterKey(0, "c", 1), FastWeights(basis_a.basis_id, 1, basis_a.b), None)
