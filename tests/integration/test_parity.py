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
from actors.environments.base import Environment, Observation, Split
from actors.environments.build import build_environment
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis, DeltaInjector, stack, zero
from actors.memory.build import surroundings
from actors.protocols import FastWeightWriter
from actors.text.chat_template import ChatFormat
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
from configs.schema import (
    EmbedderConfig,
    EngineConfig,
    EnvironmentConfig,
    FastWeightsConfig,
    HarnessConfig,
    LearnerConfig,
    MemoryConfig,
    ModelConfig,
    RolloutConfig,
    WriteConfig,
)
from learner.batch import pad
from learner.model import PolicyModel, load_model
from learner.types import Row

pytestmark = pytest.mark.engine_in_process
ROOT = Path(__file__).parents[2]
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


class _Told:
    """The talk of the README's harness as a session of an ordinary environment."""

    def __init__(self, task: Task) -> None:
        days = [Observation(f"{day} Note it.", True, max_tokens=8) for day in task.payload["days"]]
        asked = Observation(f"{task.payload['question']} Answer with a number.", True, stop=("\n",))
        self.question, self._turns = task.payload["question"], iter([*days, asked])

    def observe(self) -> Observation | None:
        return next(self._turns, None)

    def act(self, text: str) -> None:
        self._last = text

    def outcome(self) -> Outcome:
        return Outcome(0.0, {}, ())


class _Shop:
    name, system_prompt = "harness", "You keep the books of a shop."

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        return iter(())

    def start(self, task: Task) -> _Told:
        return _Told(task)


def test_a_harness_is_sampled_and_scored_like_the_same_talk_in_an_ordinary_environment(
    seam: Seam, chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = (ROOT / "actors/README.md").read_text("utf-8").split("\n## An agent harness of your own\n")[1]
    (tmp_path / "my_agent.py").write_text(section.split("```python\n")[1].split("```")[0], "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = HarnessConfig(function="my_agent:clerk", tasks="my_agent:tasks")
    harness = build_environment(EnvironmentConfig(name="harness", harness=config), EmbedderConfig())
    task = next(harness.tasks("train", 0, 0))
    memory = MemoryConfig(policy="raw", max_context_tokens=50)  # the tiny model writes no flashcards
    around = surroundings(256, 16, EmbedderConfig())

    async def played(environment: Environment) -> Trajectory:
        rollout = Rollout(
            seam.policy, seam.writer, environment, chat, WriteConfig(), RolloutConfig(), 4, around,
            seam.basis.id, "worker-0",
        )  # fmt: skip
        group = await rollout.group(
            RolloutRequest(task, environment.system_prompt or "h", 1, memory, 1.0, 16, 1)
        )
        assert group.failed == ()
        return group.trajectories[0]

    mine, theirs = (asyncio.run(asyncio.wait_for(played(each), 120)) for each in (harness, _Shop()))
    assert len(mine.revisions) == len(theirs.revisions) >= 2
    assert len(mine.segments) == len(theirs.segments) >= 3
    for one, other in zip(mine.segments, theirs.segments, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)
        assert (one.spans, one.revision) == (other.spans, other.revision)
        assert np.abs(one.logprobs - other.logprobs).max() <= EXACT
    assert _largest_gap(seam, mine) <= EXACT
    assert mine.outcome.answers[0].gold == (task.payload["answer"],)


def test_the_learner_scores_what_the_engine_sampled_and_a_broadcast_keeps_it_so(seam: Seam) -> None:
    passed = seam.policy.stats().receipts_passed

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
        assert seam.policy.stats().receipts_passed == passed + 6

    asyncio.run(asyncio.wait_for(story(), timeout=240))
