"""Invariants of the stop-gradient update (TMEM, arXiv 2606.04536) on a small model, through public verbs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.fast_weights.basis import make_basis
from actors.fast_weights.delta import Basis, DeltaInjector, stack
from actors.types import FastWeights, Segment, Trajectory, TrajectoryGroup
from configs.schema import ObjectiveConfig
from learner import head
from learner.advantage import grpo
from learner.batch import pad
from learner.model import PolicyModel, load_model
from learner.types import Microbatch, Row
from tests.unit.learner_cases import (
    VOCABULARY,
    fast_weights,
    free,
    gradient_of_step,
    group,
    largest_relative_difference,
    learner,
    merged_model,
    sampled_logprobs,
    segments_of,
    trajectory,
)

REWARDS = (1.0, 0.0, 0.25, 0.5)
Gradient = dict[str, torch.Tensor]  # by parameter name


@pytest.fixture(scope="module")
def groups(llama_basis: Basis) -> list[TrajectoryGroup]:
    return [group(llama_basis, REWARDS)]


@pytest.fixture(scope="module")
def gradient(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path_factory: pytest.TempPathFactory
) -> Gradient:
    """The learner's gradient at temperature 1."""
    folder = tmp_path_factory.mktemp("gradient") / "c"
    return gradient_of_step(learner(llama, llama_basis, free()), groups, folder)


@pytest.fixture(scope="module")
def reference(llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup]) -> Gradient:
    return reference_gradient(llama, llama_basis, groups)


def reference_gradient(
    folder: Path, basis: Basis, groups: list[TrajectoryGroup], temperature: float = 1.0
) -> Gradient:
    """Sum the gradients of theta in a loop over sequences.

    Each has a fresh model with W + B A merged by hand, so that Delta is a constant of it.
    """
    advantages: dict[str, float] = {}
    for siblings in groups:
        rewards = [episode.outcome.reward for episode in siblings.trajectories]
        for episode, advantage in zip(siblings.trajectories, grpo(rewards, True), strict=True):
            advantages[episode.episode_id] = advantage
    tokens = sum(int(part.action_mask.sum()) for _, part in segments_of(groups))
    total: Gradient = {}
    for episode, part in segments_of(groups):
        model = merged_model(folder, basis, episode.weights_of(part))
        logp = sampled_logprobs(model, part, temperature).sum()
        (-advantages[episode.episode_id] * logp / tokens).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            total[name] = total.get(name, torch.zeros_like(parameter)) + parameter.grad
    return total


def test_the_gradient_equals_a_loop_over_merged_models(gradient: Gradient, reference: Gradient) -> None:
    assert largest_relative_difference(gradient, reference) < 1e-5


def test_the_gradient_is_that_of_the_sampling_temperature(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path, reference: Gradient
) -> None:
    cold = gradient_of_step(learner(llama, llama_basis, free(), temperature=0.7), groups, tmp_path / "c")
    assert largest_relative_difference(cold, reference_gradient(llama, llama_basis, groups, 0.7)) < 1e-5
    assert largest_relative_difference(cold, reference) > 1e-2


def test_neglecting_delta_would_not_pass_the_comparison(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path, reference: Gradient
) -> None:
    bare = gradient_of_step(learner(llama, llama_basis, free()), each(groups, without_delta), tmp_path / "c")
    assert largest_relative_difference(bare, reference) > 1e-2


def test_an_a_of_each_revisions_own_is_a_constant_of_the_gradient(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path, reference: Gradient
) -> None:
    """Where writes move A too, theta's gradient is that of models with W + B_k A_k merged by hand."""
    moving = make_basis(llama_basis.kind, llama_basis.a, llama_basis.d_out, train_a=True)
    own = each(groups, lambda episode: with_own_a(episode, moving))
    expected = reference_gradient(llama, moving, own)
    learnt = gradient_of_step(learner(llama, moving, free()), own, tmp_path / "c")
    assert largest_relative_difference(learnt, expected) < 1e-4
    assert largest_relative_difference(expected, reference) > 1e-2  # neglecting A_k would be seen


def each(groups: list[TrajectoryGroup], change: Callable[[Trajectory], Trajectory]) -> list[TrajectoryGroup]:
    """Return the groups with ``change`` done to each episode."""
    return [replace(group, trajectories=tuple(map(change, group.trajectories))) for group in groups]


def with_own_a(episode: Trajectory, basis: Basis) -> Trajectory:
    def moved(weights: FastWeights) -> FastWeights:
        draw = np.random.default_rng(weights.revision)
        a = {
            name: matrix.numpy() + draw.normal(0, 0.3, matrix.shape).astype(np.float32)
            for name, matrix in basis.a.items()
        }
        return replace(weights, basis_id=basis.id, a=a)

    return replace(episode, revisions=tuple(moved(weights) for weights in episode.revisions))


def without_delta(episode: Trajectory) -> Trajectory:
    segments = tuple(replace(part, revision=0) for part in episode.segments)
    return replace(episode, segments=segments, revisions=())


def test_no_gradient_reaches_a_or_b(llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup]) -> None:
    revisions = [weights for episode in groups[0].trajectories for weights in episode.revisions]
    b_before = [{name: b.copy() for name, b in weights.b.items()} for weights in revisions]
    a_before = {name: a.clone() for name, a in llama_basis.a.items()}
    made = learner(llama, llama_basis, free())
    made.step(groups)
    for before, weights in zip(b_before, revisions, strict=True):
        assert all(np.array_equal(before[name], b) for name, b in weights.b.items())
    for name, a in llama_basis.a.items():
        assert not a.requires_grad and a.grad is None and torch.equal(a, a_before[name])
    assert set(made.weights(trainable_only=True)) == set(made.weights(trainable_only=False))
    assert not any(".a" in name or "lora" in name for name in made.weights(trainable_only=False))


def test_each_segment_is_scored_under_its_own_revision(llama: Path, llama_basis: Basis) -> None:
    episode = trajectory(llama_basis, 5, 1.0)
    made = learner(llama, llama_basis, free())
    own = made.logprobs(episode)
    for values, part in zip(own, episode.segments, strict=True):
        merged = merged_model(llama, llama_basis, episode.weights_of(part))
        with torch.no_grad():
            expected = sampled_logprobs(merged, part).numpy()
        assert np.abs(values[part.action_mask] - expected).max() < 2e-5
        assert not values[~part.action_mask].any()
    segments = tuple(replace(part, revision=(part.revision + 1) % 3) for part in episode.segments)
    shifted = replace(episode, segments=segments)
    for values, wrong, part in zip(own, made.logprobs(shifted), episode.segments, strict=True):
        assert np.abs(values - wrong)[part.action_mask].max() > 1e-2  # five hundred times the tolerance above


def test_extraction_tokens_carry_the_advantage(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path, gradient: Gradient
) -> None:
    def silenced(part: Segment) -> Segment:
        """Without its extraction."""
        silent = replace(part, action_mask=np.zeros_like(part.action_mask), spans=())
        return part if part.spans[0].kind == "act" else silent

    acting = each(groups, lambda one: replace(one, segments=tuple(map(silenced, one.segments))))
    actions = gradient_of_step(learner(llama, llama_basis, free()), acting, tmp_path / "c")
    tokens = [sum(int(part.action_mask.sum()) for _, part in segments_of(g)) for g in (groups, acting)]
    scaled = {name: value * tokens[1] / tokens[0] for name, value in actions.items()}  # the same denominator
    assert largest_relative_difference(scaled, gradient) > 0.1


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_packing_does_not_change_the_gradient(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path, aggregate: str
) -> None:
    objective = ObjectiveConfig(aggregate=aggregate)  # type: ignore[arg-type]
    together, alone = (
        gradient_of_step(
            learner(llama, llama_basis, free(microbatch_tokens=tokens), objective), groups, tmp_path / name
        )
        for tokens, name in ((10_000, "together"), (1, "alone"))
    )
    assert largest_relative_difference(alone, together) < 1e-5


def test_chunked_head_and_checkpointing_do_not_change_the_gradient(
    llama: Path,
    llama_basis: Basis,
    groups: list[TrajectoryGroup],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gradient: Gradient,
) -> None:
    monkeypatch.setattr(head, "_CHUNK", 3 * VOCABULARY)
    made = learner(llama, llama_basis, free(gradient_checkpointing=True))
    assert largest_relative_difference(gradient_of_step(made, groups, tmp_path / "c"), gradient) < 1e-5


def test_last_layers_get_the_full_models_gradient_and_nothing_else_moves(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path, gradient: Gradient
) -> None:
    made = learner(llama, llama_basis, free(trainable="last_layers", trainable_layers=1))
    before = made.weights(trainable_only=False)
    last = gradient_of_step(made, groups, tmp_path / "last")
    trained = {name for name in gradient if name.startswith("model.layers.2.") or name == "model.norm.weight"}
    assert set(last) == trained
    assert largest_relative_difference(last, {name: gradient[name] for name in last}) < 1e-5
    after = made.weights(trainable_only=False)
    assert {name for name in after if not torch.equal(before[name], after[name])} == trained
    assert set(made.weights(trainable_only=True)) == trained


def logprobs_of(policy: PolicyModel, batch: Microbatch) -> torch.Tensor:
    """Log-probs of the sampled tokens, [K]."""
    with torch.no_grad():
        logp, _ = policy(torch.from_numpy(batch.token_ids), torch.from_numpy(batch.loss_mask), 1.0)
    return logp


def test_a_rows_logprobs_do_not_depend_on_its_companions(llama: Path, llama_basis: Basis) -> None:
    episode = trajectory(llama_basis, 7, 1.0, lengths=(9, 30, 21))
    rows = [Row(part, None, 1.0, 1.0) for part in episode.segments]
    policy = load_model(str(llama), free())
    together = logprobs_of(policy, pad(rows, 1.0))
    alone = torch.cat([logprobs_of(policy, pad([row], 1.0)) for row in rows])
    assert torch.allclose(together, alone, atol=1e-5, rtol=0)


def test_two_episodes_in_one_microbatch_do_not_see_each_others_delta(llama: Path, llama_basis: Basis) -> None:
    """Rewriting one episode's fast weights moves its own log-probs only."""
    part = trajectory(llama_basis, 8, 1.0).segments[0]
    policy = load_model(str(llama), free())
    injector = DeltaInjector(policy.base, llama_basis)

    def logp(seed: int) -> torch.Tensor:
        """Of one segment under no Delta, under one, and under another that ``seed`` draws."""
        deltas = (None, fast_weights(llama_basis, 1, 1), fast_weights(llama_basis, 1, seed))
        batch = pad([Row(part, weights, 1.0, 1.0) for weights in deltas], 1.0)
        with injector.use(stack(batch.weights, llama_basis)):
            return logprobs_of(policy, batch).reshape(3, -1)

    before, after = logp(2), logp(3)
    assert torch.equal(before[:2], after[:2])
    assert (before[2] - after[2]).abs().max() > 1e-3 and (before[0] - before[1]).abs().max() > 1e-3
