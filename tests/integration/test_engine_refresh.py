"""New weights in a running engine: it is to the bit what an engine is that starts with them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.engine.policy import VLLMPolicy
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis
from actors.protocols import EngineError
from actors.types import Sampling
from actors.weight_transfer import Receiver, Sender
from configs.schema import FastWeightsConfig
from tests.integration.engine_cases import (
    EXACT,
    ROUNDING,
    SIZE,
    base,
    engine,
    greedy,
    installed,
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


@pytest.fixture(scope="module", autouse=True)
def fresh_scores(policy: VLLMPolicy) -> list[float]:
    """What the engine says of ``prompt(15, 120)`` with the weights that vLLM itself loaded at its start."""
    return run(policy.score(prompt(15, 120), base(policy)))


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
