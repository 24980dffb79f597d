"""Writer, engine and learner agree, without Ray: all three compute one function of theta and Delta.

The learner is its model alone here: DeepSpeed and vLLM each want a process's torch.distributed for
themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.engine.policy import VLLMPolicy
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis, DeltaInjector, stack, zero
from actors.protocols import FastWeightWriter
from actors.text.context import Context
from actors.types import (
    AdapterKey,
    FastWeights,
    Outcome,
    Sampling,
    Segment,
    Task,
    Timings,
    Trajectory,
    WriteExample,
    WriteRequest,
)
from configs.schema import EngineConfig, FastWeightsConfig, LearnerConfig, ModelConfig, WriteConfig
from learner.batch import pad
from learner.model import PolicyModel, load_model
from learner.types import Row

pytestmark = pytest.mark.engine_in_process
STOP = 2
EXACT = 1e-3  # nats, float32
SAMPLING = Sampling(temperature=1.0, max_tokens=24, seed=3, kind="act")


@dataclass(frozen=True)
class Seam:
    basis: Basis
    policy: VLLMPolicy
    writer: FastWeightWriter
    learner: PolicyModel
    injector: DeltaInjector


@pytest.fixture(scope="module")
def seam(tiny_model_path: Path) -> Iterator[Seam]:
    basis = compute_basis_from_checkpoint(tiny_model_path, FastWeightsConfig(), seed=0)
    engine = EngineConfig(slots=4, max_model_tokens=256, kv_cache_gib=0.25)
    policy = VLLMPolicy(tiny_model_path, ModelConfig(), engine, basis, (STOP,), version=0, threads=1, seed=0)
    writer = policy.writer(WriteConfig(optimizer="adam", learning_rate=1e-2, epochs=6))
    learner = load_model(str(tiny_model_path), LearnerConfig())
    yield Seam(basis, policy, writer, learner, DeltaInjector(learner.base, basis))
    policy.close()


async def _sample(seam: Seam, episode: str, revision: int, seed: int) -> Segment:
    prompt = tuple(np.random.default_rng(seed).integers(100, 40000, 40).tolist())
    generation = await seam.policy.generate(
        prompt, replace(SAMPLING, seed=seed), AdapterKey(seam.policy.version, episode, revision)
    )
    context = Context(prompt)
    context.act(generation, "extract" if revision < 2 else "act")
    return context.close(seam.policy.version, revision)


async def _episode(seam: Seam, episode: str, seed: int) -> Trajectory:
    """Three segments and, between them, two writes that the engine takes with a receipt."""
    rng = np.random.default_rng(seed)
    weights: FastWeights = zero(seam.basis)
    segments, revisions = [await _sample(seam, episode, 0, seed)], []
    for revision in (1, 2):
        ids = rng.integers(100, 40000, (3, 16)).tolist()
        examples = tuple(WriteExample(tuple(row[:12]), tuple(row[12:])) for row in ids)
        (result,) = seam.writer.write([WriteRequest(episode, weights, examples)])
        assert result.outcome == "accepted" and result.probe is not None, result.reason
        await seam.policy.install(
            AdapterKey(seam.policy.version, episode, revision), result.weights, result.probe
        )
        weights = result.weights
        revisions.append(weights)
        segments.append(await _sample(seam, episode, revision, seed + 10 * revision))
    await seam.policy.release([AdapterKey(seam.policy.version, episode, revision) for revision in (1, 2)])
    return Trajectory(
        task=Task("parity", "recall", {}, 0),
        episode_id=episode,
        policy_version=seam.policy.version,
        segments=tuple(segments),
        revisions=tuple(revisions),
        writes=(),
        memory_events={},
        outcome=Outcome(float(seed % 2), {}, ()),
        stop_reason="done",
        timings=Timings(0, 0, 0, 0, 0, 0),
    )


def _largest_gap(seam: Seam, trajectory: Trajectory) -> float:
    """Over all sampled tokens of all segments, in one padded batch, as the learner does it."""
    rows = [Row(segment, trajectory.weights_of(segment), 0.0, 0.0) for segment in trajectory.segments]
    batch = pad(rows, SAMPLING.temperature)
    with torch.no_grad(), seam.injector.use(stack(batch.weights, seam.basis)):
        scored, _ = seam.learner(
            torch.from_numpy(batch.token_ids), torch.from_numpy(batch.loss_mask), batch.temperature
        )
    return float(np.abs(scored.numpy() - batch.engine_logprobs[batch.loss_mask]).max())


def test_the_learner_scores_what_the_engine_sampled_and_a_broadcast_keeps_it_so(seam: Seam) -> None:
    async def story() -> None:
        first, second = await asyncio.gather(_episode(seam, "a", 4), _episode(seam, "b", 5))
        assert max(_largest_gap(seam, first), _largest_gap(seam, second)) <= EXACT
        earlier = [replace(segment, revision=max(0, segment.revision - 1)) for segment in first.segments]
        off_by_one = replace(first, segments=tuple(earlier))
        assert _largest_gap(seam, off_by_one) > 50 * EXACT, "a segment's revision must matter here"

        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in seam.learner.base.parameters():
                parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=draw)
        assert _largest_gap(seam, first) > 50 * EXACT  # theta has moved away from what sampled them
        tensors = {name: tensor.detach().clone() for name, tensor in seam.learner.base.named_parameters()}
        await seam.policy.refresh(1, tensors, complete=True)
        assert seam.policy.version == 1
        assert _largest_gap(seam, await _episode(seam, "a", 6)) <= EXACT
        assert seam.policy.stats().receipts_passed == 6

    asyncio.run(asyncio.wait_for(story(), timeout=240))
