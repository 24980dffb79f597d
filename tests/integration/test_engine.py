"""The real engine on the tiny model against transformers: the invariants of the Policy protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine.policy import VLLMPolicy
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis
from actors.protocols import EngineError, ReceiptError
from actors.types import AdapterKey, FastWeights, Generation, Probe, Sampling
from configs.schema import FastWeightsConfig
from configs.tolerances import RECEIPT
from tests.integration.engine_cases import (
    EXACT,
    LIMIT,
    SIZE,
    SLOTS,
    base,
    engine,
    greedy,
    installed,
    key,
    run,
)
from tests.integration.engine_reference import Reference, distance, prompt, written

pytestmark = pytest.mark.engine_in_process


@pytest.fixture(scope="module")
def basis(tiny_model_path: Path) -> Basis:
    return compute_basis_from_checkpoint(tiny_model_path, FastWeightsConfig(), seed=0)


@pytest.fixture(scope="module")
def reference(tiny_model_path: Path, basis: Basis) -> Reference:
    return Reference(tiny_model_path, basis)


@pytest.fixture(scope="module")
def policy(tiny_model_path: Path, basis: Basis) -> Iterator[VLLMPolicy]:
    policy = engine(tiny_model_path, basis)
    yield policy
    policy.close()


def test_the_base_model_is_transformers(policy: VLLMPolicy, reference: Reference) -> None:
    ids = prompt(0, 200)
    assert distance(run(policy.score(ids, base(policy))), reference.logprobs(ids, None)) < 1e-4
    generation = run(policy.generate(ids, greedy(12), base(policy)))
    assert distance(generation.logprobs, reference.of_generated(ids, generation.token_ids, None)) < 1e-4
    table = reference.table([*ids, *generation.token_ids], None)
    assert table[len(ids) - 1 : -1].argmax(-1).tolist() == list(generation.token_ids)


def test_more_prompt_tokens_than_one_step_takes_with_seeded_sampling(policy: VLLMPolicy) -> None:
    """Several prompts do not fit into one step together.

    A partial prefill of a seeded request would kill vLLM's engine on CPU.
    """
    prompts = [prompt(30 + place, LIMIT - 20) for place in range(SLOTS)]

    async def sample() -> list[tuple[int, ...]]:
        sampled = [
            policy.generate(ids, Sampling(1.0, 4, seed=place, kind="act"), base(policy))
            for place, ids in enumerate(prompts)
        ]
        return [generation.token_ids for generation in await asyncio.gather(*sampled)]

    async def one_by_one() -> list[tuple[int, ...]]:
        return [
            (await policy.generate(ids, Sampling(1.0, 4, seed=place, kind="act"), base(policy))).token_ids
            for place, ids in enumerate(prompts)
        ]

    assert run(sample()) == run(one_by_one())  # and a request's seed alone decides what it samples


def test_zero_delta_and_reset_are_the_base_model_to_the_bit(policy: VLLMPolicy, basis: Basis) -> None:
    ids = prompt(1, 90)

    async def story() -> None:
        before = await policy.generate(ids, greedy(16), base(policy))
        before_scores = await policy.score(ids, base(policy))
        b = {name: np.zeros((rows, basis.rank), np.float32) for name, rows in basis.d_out.items()}
        zeros = FastWeights(basis.id, 1, b)
        under_zero = await installed(policy, "zero", zeros)
        assert await policy.generate(ids, greedy(16), under_zero) == before
        assert await policy.score(ids, under_zero) == before_scores
        under_delta = await installed(policy, "zero", written(basis, 2, 1, SIZE))
        assert await policy.score(ids, under_delta) != before_scores
        await policy.release([under_zero, under_delta])
        assert await policy.generate(ids, greedy(16), base(policy)) == before
        assert await policy.score(ids, base(policy)) == before_scores

    run(story())


def test_a_written_delta_acts_as_in_transformers_and_in_peft(
    policy: VLLMPolicy, reference: Reference, basis: Basis, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from actors.fast_weights.peft_format import export_peft

    ids, weights = prompt(2, 150), written(basis, 1, 2, SIZE)
    scored = run(_score_under(policy, "peft", weights, ids))
    expected = reference.logprobs(ids, weights)
    assert distance(scored, expected) < EXACT
    assert distance(expected, reference.logprobs(ids, None)) > 100 * EXACT, (
        "the Delta is too small for this test to mean anything"
    )
    export_peft(weights, basis, tmp_path / "adapter", str(reference.model.name_or_path))
    stock = AutoModelForCausalLM.from_pretrained(reference.model.name_or_path, dtype=torch.float32)
    peft = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    with torch.no_grad():
        table = peft(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert distance(scored, table[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()) < EXACT


async def _score_under(policy: VLLMPolicy, episode: str, weights: FastWeights, ids: list[int]) -> list[float]:
    return await policy.score(ids, await installed(policy, episode, weights))


def test_episodes_in_one_batch_never_see_each_others_delta(
    policy: VLLMPolicy, reference: Reference, basis: Basis
) -> None:
    """Two Deltas and two revision-0 requests decode together, with prompts of different lengths."""
    weights = {"left": written(basis, 1, 3, SIZE), "right": written(basis, 1, 4, SIZE)}
    asked = [
        (prompt(3, 140), "left"),
        (prompt(4, 60), None),
        (prompt(3, 140), "right"),
        (prompt(5, 33), None),
    ]

    async def story() -> None:
        names = {episode: await installed(policy, episode, delta) for episode, delta in weights.items()}
        keys = [base(policy) if episode is None else names[episode] for _, episode in asked]
        together = await asyncio.gather(
            *(policy.generate(ids, greedy(24), name) for (ids, _), name in zip(asked, keys, strict=True))
        )
        for (ids, episode), name, generation in zip(asked, keys, together, strict=True):
            right = reference.of_generated(
                ids, generation.token_ids, None if episode is None else weights[episode]
            )
            assert distance(generation.logprobs, right) < EXACT
            alone = await policy.generate(ids, greedy(24), name)
            assert distance(generation.logprobs, alone.logprobs) < EXACT
            foreign = weights["left"] if episode != "left" else weights["right"]
            other = reference.of_generated(ids, generation.token_ids, foreign)
            assert distance(generation.logprobs, other) > 20 * EXACT, (
                "another episode's Delta would pass this test"
            )

    run(story())


def test_a_second_write_does_not_meet_the_first_ones_prefix_cache(
    policy: VLLMPolicy, reference: Reference, basis: Basis
) -> None:
    ids = prompt(6, 400)  # more than three blocks of the prefix cache

    async def story() -> None:
        for revision in (1, 2):
            weights = written(basis, revision, 5 + revision, SIZE)
            name = await installed(policy, "rewrite", weights)
            for _ in range(2):  # the second time the prompt comes from the cache
                generation = await policy.generate(ids, greedy(8), name)
                expected = reference.of_generated(ids, generation.token_ids, weights)
                assert distance(generation.logprobs, expected) < EXACT

    run(story())


def test_sampling_returns_the_log_probs_of_the_tempered_distribution(
    policy: VLLMPolicy, reference: Reference, basis: Basis
) -> None:
    ids, weights = prompt(7, 50), written(basis, 1, 9, SIZE)

    def expected(generation: Generation, temperature: float = 1.0) -> list[float]:
        return reference.of_generated(ids, generation.token_ids, weights, temperature)

    async def story() -> None:
        name = await installed(policy, "tempered", weights)
        first = await policy.generate(ids, Sampling(0.7, 20, seed=11, kind="act"), name)
        assert distance(first.logprobs, expected(first, temperature=0.7)) < EXACT
        assert distance(first.logprobs, expected(first)) > 20 * EXACT
        assert await policy.generate(ids, Sampling(0.7, 20, seed=11, kind="act"), name) == first
        other_seed = await policy.generate(ids, Sampling(0.7, 20, seed=12, kind="act"), name)
        assert other_seed.token_ids != first.token_ids
        plain, greedy_too = await asyncio.gather(
            policy.generate(ids, Sampling(1.0, 20, 13, kind="act"), name),
            policy.generate(ids, greedy(20), name),
        )
        assert distance(plain.logprobs, expected(plain)) < EXACT
        assert distance(greedy_too.logprobs, expected(greedy_too)) < EXACT

    run(story())


def test_more_episodes_than_slots_queue_and_finish(
    policy: VLLMPolicy, reference: Reference, basis: Basis
) -> None:
    # More than vLLM keeps registered (2 x slots), too: evicted adapters are read again from the store.
    count = 3 * SLOTS
    prompts = [prompt(30 + index, 20 + index) for index in range(count)]

    async def story() -> None:
        weights = [written(basis, 1, 20 + index, SIZE) for index in range(count)]
        names = [await installed(policy, f"many-{index}", delta) for index, delta in enumerate(weights)]
        for _ in range(2):
            asked = zip(prompts, names, strict=True)
            generations = await asyncio.gather(
                *(policy.generate(ids, greedy(6), name) for ids, name in asked)
            )
            for ids, generation, delta in zip(prompts, generations, weights, strict=True):
                expected = reference.of_generated(ids, generation.token_ids, delta)
                assert distance(generation.logprobs, expected) < EXACT
        await policy.release(names)

    run(story())


def test_a_receipt_passes_for_the_right_weights_and_fails_for_others(
    policy: VLLMPolicy, reference: Reference, basis: Basis
) -> None:
    ids = tuple(prompt(8, 40))
    right, wrong = written(basis, 1, 50, SIZE), written(basis, 1, 51, SIZE)
    old, new = (tuple(reference.logprobs(ids, delta)[-12:]) for delta in (None, right))
    probe = Probe(ids, old, new)
    before = policy.stats()

    async def story() -> None:
        await policy.install(key(policy, "receipt"), right, probe)
        with pytest.raises(
            ReceiptError, match=r"v0/swapped@1.*largest difference \d.*receipt_tolerance=0.02"
        ):
            await policy.install(key(policy, "swapped"), wrong, probe)
        with pytest.raises(EngineError, match="was released"):
            await policy.generate(ids, greedy(2), key(policy, "swapped"))
        dead = FastWeights(basis.id, 1, {name: np.zeros_like(matrix) for name, matrix in right.b.items()})
        with pytest.raises(ReceiptError):
            await policy.install(key(policy, "dead"), dead, probe)

    run(story())
    after = policy.stats()
    assert after.receipts_passed - before.receipts_passed == 1
    assert after.receipts_failed - before.receipts_failed == 2
    assert after.installs - before.installs == 3 and after.steps > before.steps
    assert after.seconds["receipt"] > before.seconds["receipt"]


@pytest.mark.parametrize(("share", "passes"), [(0.9, True), (1.5, False)])
def test_the_tolerance_of_a_receipt_is_the_configurations(
    policy: VLLMPolicy, reference: Reference, basis: Basis, share: float, passes: bool
) -> None:
    """A writer that is off by 0.9 tolerances on one token passes; off by 1.5 it is refused."""
    ids, weights = tuple(prompt(8, 40)), written(basis, 1, 52, SIZE)
    old, new = (reference.logprobs(ids, delta)[-12:] for delta in (None, weights))
    new[5] += share * RECEIPT["float32"]
    name, probe = key(policy, f"off-by-{share}"), Probe(ids, tuple(old), tuple(new))
    if passes:
        run(policy.install(name, weights, probe))
    else:
        with pytest.raises(ReceiptError, match=r"largest difference 0\.03.*receipt_tolerance=0\.02"):
            run(policy.install(name, weights, probe))


def test_bad_requests_are_one_line_and_harm_nobody(policy: VLLMPolicy, basis: Basis) -> None:
    good = written(basis, 1, 60, SIZE)

    async def refused(work: Coroutine[Any, Any, Any], *words: str) -> None:
        with pytest.raises(EngineError) as caught:
            await work
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message

    async def story() -> None:
        await policy.install(key(policy, "good"), good, None)
        await refused(
            policy.generate(prompt(9, LIMIT), greedy(4), base(policy)),
            f"{LIMIT} tokens",
            f"engine.max_model_tokens={LIMIT}",
        )
        await refused(policy.generate([], greedy(4), base(policy)), "0 tokens")
        await refused(policy.generate([5, 49152], greedy(4), base(policy)), "49152", "tokenizer")
        await refused(policy.generate([5], greedy(0), base(policy)), "max_tokens")
        await refused(policy.generate([5], greedy(4), key(policy, "ghost")), "v0/ghost@1", "never installed")
        await refused(policy.generate([5], greedy(4), AdapterKey(7, "good", 0)), "version 7", "at 0")
        await refused(policy.install(key(policy, "good"), good, None), "v0/good@1", "never reused")
        await refused(policy.install(key(policy, "good", 2), good, None), "revision 1", "v0/good@2")
        await refused(
            policy.install(key(policy, "alien"), FastWeights("other", 1, good.b), None),
            "v0/alien@1",
            "basis other",
        )
        await policy.release([key(policy, "ghost"), base(policy)])
        await policy.release([key(policy, "good")])
        await refused(policy.generate([5], greedy(4), key(policy, "good")), "was released")
        assert len((await policy.generate([5, 6], greedy(4), base(policy))).token_ids) > 0

    run(story())


def test_a_prompt_near_the_limit_is_cut_and_says_so(policy: VLLMPolicy) -> None:
    generation = run(policy.generate(prompt(10, LIMIT - 3), Sampling(1.0, 50, 3, kind="act"), base(policy)))
    assert generation.finish_reason == "length" and len(generation.token_ids) <= 3


def test_a_stop_token_ends_the_generation_and_is_kept(policy: VLLMPolicy, reference: Reference) -> None:
    """The most likely next token is made the stop token, so a greedy generation ends at once."""
    ids = prompt(11, 30)
    first = run(policy.generate(ids, greedy(1), base(policy))).token_ids[0]
    stop, policy._stop = policy._stop, (first,)
    try:
        generation = run(policy.generate(ids, greedy(8), base(policy)))
    finally:
        policy._stop = stop
    assert generation.token_ids == (first,) and generation.finish_reason == "stop"
    assert distance(generation.logprobs, reference.of_generated(ids, [first], None)) < EXACT


def test_cancelling_aborts_the_request_and_release_while_running_is_safe(
    policy: VLLMPolicy, basis: Basis
) -> None:
    async def story() -> None:
        name = await installed(policy, "cancelled", written(basis, 1, 70, SIZE))
        task = asyncio.create_task(policy.generate(prompt(12, 20), Sampling(1.0, 450, 1, kind="act"), name))
        await asyncio.sleep(0.2)
        await policy.release([name])  # still running under it
        await asyncio.sleep(0.1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(task, timeout=0.05)
        unfinished = policy._loop.call(lambda engine: engine.get_num_unfinished_requests(), "other")
        assert await asyncio.wrap_future(unfinished) == 0
        assert (await policy.generate([5, 6], greedy(2), base(policy))).token_ids

    run(story())
