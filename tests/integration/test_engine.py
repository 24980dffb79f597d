"""The real engine on the tiny model against transformers: the invariants of the Policy protocol.

The second half tests what actors/engine/vllm_internals assumes of vLLM.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actors.engine.policy import VLLMPolicy
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis
from actors.protocols import EngineError, ReceiptError
from actors.types import AdapterKey, FastWeights, Generation, Probe, Sampling
from actors.weight_transfer import Receiver, Sender
from configs.schema import EngineConfig, FastWeightsConfig, ModelConfig
from configs.tolerances import RECEIPT
from tests.integration.engine_reference import Reference, distance, prompt, written

pytestmark = pytest.mark.engine_in_process
T = TypeVar("T")
SLOTS = 4
LIMIT = 512
STOP = 2
ROUNDING = 1e-5  # nats, float32: what the same weights may differ by in a batch of another size
EXACT = 1e-3  # nats, float32: what engine and transformers may differ by
SIZE = 0.02  # of B: moves the tiny model's log-probs by tenths of a nat


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, timeout=120))


@pytest.fixture(scope="module")
def basis(tiny_model_path: Path) -> Basis:
    return compute_basis_from_checkpoint(tiny_model_path, FastWeightsConfig(), seed=0)


@pytest.fixture(scope="module")
def reference(tiny_model_path: Path, basis: Basis) -> Reference:
    return Reference(tiny_model_path, basis)


@pytest.fixture(scope="module")
def policy(tiny_model_path: Path, basis: Basis) -> Iterator[VLLMPolicy]:
    config = EngineConfig(slots=SLOTS, max_model_tokens=LIMIT, kv_cache_gib=0.25)
    policy = VLLMPolicy(tiny_model_path, ModelConfig(), config, basis, (STOP,), version=0, threads=1, seed=0)
    yield policy
    policy.close()


@pytest.fixture(scope="module", autouse=True)
def fresh_scores(policy: VLLMPolicy) -> list[float]:
    """What the engine says of ``prompt(15, 120)`` with the weights that vLLM itself loaded at its start."""
    return run(policy.score(prompt(15, 120), base(policy)))


def greedy(tokens: int) -> Sampling:
    return Sampling(temperature=0.0, max_tokens=tokens, seed=0, kind="act")


def base(policy: VLLMPolicy) -> AdapterKey:
    return AdapterKey(policy.version, "any", 0)


def key(policy: VLLMPolicy, episode: str, revision: int = 1) -> AdapterKey:
    return AdapterKey(policy.version, episode, revision)


async def installed(policy: VLLMPolicy, episode: str, weights: FastWeights) -> AdapterKey:
    name = key(policy, episode, weights.revision)
    await policy.install(name, weights, None)
    return name


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


def test_refresh_serves_the_new_weights_and_forgets_the_old_adapters(
    policy: VLLMPolicy, reference: Reference, basis: Basis
) -> None:
    """From here on the engine is at other versions, and the reference follows it."""
    ids, weights = prompt(13, 300), written(basis, 1, 80, SIZE)
    draw = torch.Generator().manual_seed(5)
    old = {name: tensor.clone() for name, tensor in reference.model.state_dict().items()}
    new = {
        name: tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=draw)
        for name, tensor in old.items()
        if name != "lm_head.weight"
    }
    tied = {**new, "lm_head.weight": new["model.embed_tokens.weight"]}

    async def story() -> None:
        survivor = await installed(policy, "survivor", weights)
        before = await policy.generate(ids, greedy(4), base(policy))
        up = "model.layers.2.mlp.up_proj.weight"
        lacking = {name: tensor for name, tensor in new.items() if name != up}
        with pytest.raises(EngineError, match=r"1 missing, first model\.layers\.2\.mlp\.up_proj\.weight"):
            await policy.refresh(1, lacking, complete=True)
        with pytest.raises(EngineError, match="1 unknown, first extra"):
            await policy.refresh(1, {**new, "extra": new["model.norm.weight"]}, complete=True)
        down = "model.layers.5.mlp.down_proj.weight"
        misshapen = rf"1 of another shape, first {re.escape(down)} \[256, 128\] in place of \[128, 256\]"
        with pytest.raises(EngineError, match=misshapen):
            await policy.refresh(1, {**new, down: new[down].T}, complete=True)
        query = "model.layers.3.self_attn.q_proj.weight"
        torn = (
            r"2 missing, first model\.layers\.3\.self_attn\.k_proj\.weight.*all parts of each packed matrix"
        )
        with pytest.raises(EngineError, match=torn):
            await policy.refresh(1, {query: new[query]}, complete=False)
        running = asyncio.create_task(
            policy.generate(prompt(14, 20), Sampling(1.0, 400, 1, kind="act"), base(policy))
        )
        await asyncio.sleep(0.1)
        with pytest.raises(EngineError, match="drain the worker"):
            await policy.refresh(1, new, complete=True)
        running.cancel()
        # The cancelled request may still be in the batch, and a batch of two rounds otherwise than one alone.
        after = await policy.generate(ids, greedy(4), base(policy))
        assert policy.version == 0 and after.token_ids == before.token_ids
        assert distance(after.logprobs, before.logprobs) < ROUNDING

        # Version 2 is left out: a worker may miss a publication.
        for version, tensors in ((1, new), (3, tied)):
            await policy.refresh(version, tensors, complete=True)
            assert policy.version == version
            reference.model.load_state_dict(tied)
            assert distance(await policy.score(ids, base(policy)), reference.logprobs(ids, None)) < 1e-4
            # A stale prefix cache would show here.
            generation = await policy.generate(ids, greedy(4), base(policy))
            expected = reference.of_generated(ids, generation.token_ids, None)
            assert distance(generation.logprobs, expected) < 1e-4
            with pytest.raises(EngineError, match="belongs to policy version 0"):
                await policy.generate(ids, greedy(4), survivor)
            again = await installed(policy, "survivor", weights)
            assert distance(await policy.score(ids, again), reference.logprobs(ids, weights)) < EXACT
        with pytest.raises(EngineError, match="the engine is at 3"):
            await policy.refresh(2, new, complete=True)

    run(story())


def test_a_refreshed_engine_is_a_fresh_one_to_the_bit(
    policy: VLLMPolicy, tiny_model_path: Path, fresh_scores: list[float]
) -> None:
    """Other weights come between. vLLM's own loader put the first weights in place, ours the last."""
    start = load_file(tiny_model_path / "model.safetensors")
    other = {name: 1.01 * tensor for name, tensor in start.items()}

    async def story() -> None:
        for version, tensors in ((11, other), (12, start)):
            await policy.refresh(version, tensors, complete=True)
        assert await policy.score(prompt(15, 120), base(policy)) == fresh_scores

    run(story())


def test_weights_that_were_broadcast_serve_as_those_of_the_object_store_to_the_bit(
    policy: VLLMPolicy, tiny_model_path: Path
) -> None:
    start = load_file(tiny_model_path / "model.safetensors")
    sent = {name: 1.01 * tensor for name, tensor in start.items()}
    root, receiver = Sender("127.0.0.1", 2, "gloo"), Receiver()
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(receiver.receive, root.meeting, 1, "1.1", 60)
        manifest = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sent.items()]
        assert root.send("1.1", manifest, sent.items(), 60) == ""
        receiving.result(60)
    received = receiver.take("1.1")
    assert received is not None
    version = policy.version

    async def story() -> None:
        scores = []
        for later, tensors in enumerate((sent, start, received), 1):
            await policy.refresh(version + later, tensors, complete=True)
            scores.append(await policy.score(prompt(15, 120), base(policy)))
        assert scores[0] == scores[2] != scores[1]
        await policy.refresh(version + 4, start, complete=True)

    run(story())


@pytest.mark.parametrize("head_too", [False, True])
def test_changed_tensors_alone_are_the_whole_refresh_to_the_bit(
    policy: VLLMPolicy,
    reference: Reference,
    basis: Basis,
    tiny_model_path: Path,
    fresh_scores: list[float],
    head_too: bool,
) -> None:
    """As with learner.trainable=last_layers; and with the tied embedding: its copy must follow."""
    start = load_file(tiny_model_path / "model.safetensors")
    draw = torch.Generator().manual_seed(6)
    wanted = (
        "model.layers.4.",
        "model.layers.5.",
        "model.norm.",
        *(("model.embed_tokens.",) if head_too else ()),
    )
    moved = {
        name: tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=draw)
        for name, tensor in start.items()
        if name.startswith(wanted)
    }
    ids, weights, version = prompt(15, 120), written(basis, 1, 90, SIZE), policy.version

    async def story() -> None:
        await policy.refresh(version + 1, start, complete=True)
        await installed(policy, "of-the-old-version", weights)
        await policy.refresh(version + 2, moved, complete=False)
        changed = await policy.score(ids, base(policy))
        await policy.refresh(version + 3, {**start, **moved}, complete=True)
        assert changed == await policy.score(ids, base(policy))
        assert distance(changed, fresh_scores) > 100 * EXACT
        reference.model.load_state_dict({**start, **moved}, strict=False)
        assert distance(changed, reference.logprobs(ids, None)) < 1e-4
        under_delta = await policy.score(ids, await installed(policy, "new", weights))
        assert distance(under_delta, reference.logprobs(ids, weights)) < EXACT

    run(story())


def test_a_refresh_takes_other_number_formats_and_keeps_nothing_of_the_senders_memory(
    policy: VLLMPolicy, tiny_model_path: Path
) -> None:
    """A bfloat16 learner; and one that overwrites what it sent."""
    start = load_file(tiny_model_path / "model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in start.items()}
    ids, version = prompt(16, 90), policy.version

    async def story() -> None:
        as_floats = {name: tensor.float() for name, tensor in halves.items()}
        await policy.refresh(version + 1, as_floats, complete=True)
        expected = await policy.score(ids, base(policy))
        await policy.refresh(version + 2, start, complete=True)
        assert await policy.score(ids, base(policy)) != expected
        await policy.refresh(version + 3, halves, complete=True)
        assert await policy.score(ids, base(policy)) == expected
        sent = {name: tensor.clone() for name, tensor in start.items()}
        await policy.refresh(version + 4, sent, complete=True)
        expected = await policy.score(ids, base(policy))
        for tensor in sent.values():
            tensor.zero_()
        assert await policy.score(ids, base(policy)) == expected

    run(story())


# --- what actors/engine/vllm_internals assumes of vLLM 0.32 -------------------------------------------------


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


@pytest.mark.cpu_paths
def test_every_tensor_of_the_checkpoint_has_a_place_in_vllms_model(
    policy: VLLMPolicy, tiny_model_path: Path
) -> None:
    """By name and shape; and vLLM still packs the matrices that tensors.py says it packs."""
    from actors.engine.vllm_internals.tensors import find_places

    def look(engine: Any) -> tuple[dict[str, tuple[int, ...]], int, bool]:
        model = engine.model_executor.driver_worker.worker.model_runner.get_model()
        places = find_places(model)
        packed = sum(getattr(place.owners[0], place.leaf).numel() == 0 for place in places)
        shapes = {name: shape for place in places for name, shape in place.parts.items()}
        return shapes, packed, model.lm_head.cpu_linear is not torch.nn.functional.linear

    shapes, packed, head_packed = policy._loop.call(look, "other").result(timeout=30)
    assert shapes == {
        name: tuple(tensor.shape) for name, tensor in load_file(tiny_model_path / "model.safetensors").items()
    }
    assert packed == 6 * 4  # qkv, out, gate_up and down of each layer
    assert head_packed, "a refresh has left the tied head unpacked: as right, and slower"


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
