"""Invariants of the stop-gradient update (TMEM, arXiv 2606.04536) on a small model, through the learner's public verbs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.fast_weights.basis import make_basis
from actors.fast_weights.delta import Basis
from actors.types import FastWeights, Trajectory, TrajectoryGroup
from configs.schema import ObjectiveConfig
from learner import head
from learner.advantage import grpo
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


@pytest.fixture(scope="module")
def groups(llama_basis: Basis) -> list[TrajectoryGroup]:
    return [group(llama_basis, REWARDS)]


def reference_gradient(
    folder: Path, basis: Basis, groups: list[TrajectoryGroup], temperature: float = 1.0
) -> dict[str, torch.Tensor]:
    """A loop over sequences: W + B A merged by hand into a fresh model, so that Delta is a constant of it; gradients of theta summed."""
    advantages = {
        one.episode_id: advantage
        for each in groups
        for one, advantage in zip(
            each.trajectories, grpo([t.outcome.reward for t in each.trajectories], True), strict=True
        )
    }
    tokens = sum(int(part.action_mask.sum()) for _, part in segments_of(groups))
    total: dict[str, torch.Tensor] = {}
    for episode, part in segments_of(groups):
        model = merged_model(folder, basis, episode.weights_of(part))
        (
            -advantages[episode.episode_id] * sampled_logprobs(model, part, temperature).sum() / tokens
        ).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            total[name] = total.get(name, torch.zeros_like(parameter)) + parameter.grad
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_equals_a_loop_over_merged_models(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path, temperature: float
) -> None:
    found = gradient_of_step(
        learner(llama, llama_basis, free(), temperature=temperature), groups, tmp_path / "c"
    )
    assert (
        largest_relative_difference(found, reference_gradient(llama, llama_basis, groups, temperature)) < 1e-5
    )


def test_neglecting_delta_would_not_pass_the_comparison(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    bare = [replace(groups[0], trajectories=tuple(without_delta(one) for one in groups[0].trajectories))]
    found = gradient_of_step(learner(llama, llama_basis, free()), bare, tmp_path / "c")
    assert largest_relative_difference(found, reference_gradient(llama, llama_basis, groups)) > 1e-2


def test_an_a_of_each_revisions_own_is_a_constant_of_the_gradient(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    """Where writes move A too: theta's gradient is that of models with W + B_k A_k merged by hand, and neglecting A_k would be seen."""
    moving = make_basis(llama_basis.kind, llama_basis.a, llama_basis.d_out, train_a=True)
    own = [replace(groups[0], trajectories=tuple(with_own_a(one, moving) for one in groups[0].trajectories))]
    expected = reference_gradient(llama, moving, own)
    found = gradient_of_step(learner(llama, moving, free()), own, tmp_path / "c")
    assert largest_relative_difference(found, expected) < 1e-4
    assert largest_relative_difference(expected, reference_gradient(llama, llama_basis, groups)) > 1e-2


def with_own_a(one: Trajectory, basis: Basis) -> Trajectory:
    def moved(weights: FastWeights) -> FastWeights:
        draw = np.random.default_rng(weights.revision)
        a = {
            name: matrix.numpy() + draw.normal(0, 0.3, matrix.shape).astype(np.float32)
            for name, matrix in basis.a.items()
        }
        return replace(weights, basis_id=basis.id, a=a)

    return replace(one, revisions=tuple(moved(weights) for weights in one.revisions))


def without_delta(one: Trajectory) -> Trajectory:
    return replace(one, segments=tuple(replace(part, revision=0) for part in one.segments), revisions=())


def test_no_gradient_reaches_a_or_b(llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup]) -> None:
    before = [
        {name: b.copy() for name, b in weights.b.items()}
        for one in groups[0].trajectories
        for weights in one.revisions
    ]
    a_before = {name: a.clone() for name, a in llama_basis.a.items()}
    made = learner(llama, llama_basis, free())
    made.step(groups)
    after = [weights.b for one in groups[0].trajectories for weights in one.revisions]
    assert all(
        np.array_equal(old[name], new[name]) for old, new in zip(before, after, strict=True) for name in old
    )
    assert all(
        not a.requires_grad and a.grad is None and torch.equal(a, a_before[name])
        for name, a in llama_basis.a.items()
    )
    assert set(made.weights(trainable_only=True)) == set(made.weights(trainable_only=False))
    assert not any(".a" in name or "lora" in name for name in made.weights(trainable_only=False))


def test_each_segment_is_scored_under_its_own_revision(llama: Path, llama_basis: Basis) -> None:
    episode = trajectory(llama_basis, 5, 1.0)
    made = learner(llama, llama_basis, free())
    own = made.logprobs(episode)
    for values, part in zip(own, episode.segments, strict=True):
        with torch.no_grad():
            expected = sampled_logprobs(
                merged_model(llama, llama_basis, episode.weights_of(part)), part
            ).numpy()
        assert np.abs(values[part.action_mask] - expected).max() < 2e-5
        assert not values[~part.action_mask].any()
    shifted = replace(
        episode, segments=tuple(replace(part, revision=(part.revision + 1) % 3) for part in episode.segments)
    )
    for values, wrong, part in zip(own, made.logprobs(shifted), episode.segments, strict=True):
        assert np.abs(values - wrong)[part.action_mask].max() > 1e-2  # five hundred times the tolerance above


def test_extraction_tokens_carry_the_advantage(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    def silence(one: Trajectory) -> Trajectory:
        silent = tuple(
            part
            if part.spans[0].kind == "act"
            else replace(part, action_mask=np.zeros_like(part.action_mask), spans=())
            for part in one.segments
        )
        return replace(one, segments=silent)

    acting = [replace(groups[0], trajectories=tuple(silence(one) for one in groups[0].trajectories))]
    both = gradient_of_step(learner(llama, llama_basis, free()), groups, tmp_path / "both")
    only = gradient_of_step(learner(llama, llama_basis, free()), acting, tmp_path / "only")
    tokens = [sum(int(part.action_mask.sum()) for _, part in segments_of(each)) for each in (groups, acting)]
    scaled = {name: value * tokens[1] / tokens[0] for name, value in only.items()}  # the same denominator
    assert largest_relative_difference(scaled, both) > 0.1


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_packing_does_not_change_the_gradient(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path, aggregate: str
) -> None:
    objective = ObjectiveConfig(aggregate=aggregate)  # type: ignore[arg-type]
    one = gradient_of_step(
        learner(llama, llama_basis, free(microbatch_tokens=10_000), objective), groups, tmp_path / "one"
    )
    many = gradient_of_step(
        learner(llama, llama_basis, free(microbatch_tokens=1), objective), groups, tmp_path / "many"
    )
    assert largest_relative_difference(many, one) < 1e-5


def test_chunked_head_and_checkpointing_do_not_change_the_gradient(
    llama: Path,
    llama_basis: Basis,
    groups: list[TrajectoryGroup],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = gradient_of_step(learner(llama, llama_basis, free()), groups, tmp_path / "plain")
    monkeypatch.setattr(head, "_CHUNK", 3 * VOCABULARY)
    chunked = gradient_of_step(
        learner(llama, llama_basis, free(gradient_checkpointing=True)), groups, tmp_path / "chunked"
    )
    assert largest_relative_difference(chunked, plain) < 1e-5


def test_last_layers_get_the_full_models_gradient_and_nothing_else_moves(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    full = gradient_of_step(learner(llama, llama_basis, free()), groups, tmp_path / "full")
    made = learner(llama, llama_basis, free(trainable="last_layers", trainable_layers=1))
    before = made.weights(trainable_only=False)
    last = gradient_of_step(made, groups, tmp_path / "last")
    assert set(last) == {
        name for name in full if name.startswith("model.layers.2.") or name == "model.norm.weight"
    }
    assert largest_relative_difference(last, {name: full[name] for name in last}) < 1e-5
    after = made.weights(trainable_only=False)
    assert (
        {name for name in after if not torch.equal(before[name], after[name])}
        == set(last)
        == set(made.weights(trainable_only=True))
    )


def test_a_rows_logprobs_do_not_depend_on_its_companions(llama: Path, llama_basis: Basis) -> None:
    from learner.batch import pad
    from learner.model import load_model
    from learner.types import Row

    episode = trajectory(llama_basis, 7, 1.0, lengths=(9, 30, 21))
    rows = [Row(part, None, 1.0, 1.0) for part in episode.segments]
    policy = load_model(str(llama), free())

    def logp(chosen: list[Row]) -> torch.Tensor:
        batch = pad(chosen, 1.0)
        with torch.no_grad():
            values: torch.Tensor = policy(
                torch.from_numpy(batch.token_ids), torch.from_numpy(batch.loss_mask), 1.0
            )[0]
        return values

    together = logp(rows)
    assert torch.allclose(together, torch.cat([logp([row]) for row in rows]), atol=1e-5, rtol=0)


def test_two_episodes_in_one_microbatch_do_not_see_each_others_delta(llama: Path, llama_basis: Basis) -> None:
    """Rewriting one episode's fast weights moves its own log-probs only."""
    from actors.fast_weights.delta import DeltaInjector, stack
    from learner.batch import pad
    from learner.model import load_model
    from learner.types import Row

    part = trajectory(llama_basis, 8, 1.0).segments[0]
    policy = load_model(str(llama), free())
    injector = DeltaInjector(policy.base, llama_basis)

    def logp(second: int) -> torch.Tensor:
        rows = [
            Row(part, weights, 1.0, 1.0)
            for weights in (None, fast_weights(llama_basis, 1, 1), fast_weights(llama_basis, 1, second))
        ]
        batch = pad(rows, 1.0)
        with torch.no_grad(), injector.use(stack(batch.weights, llama_basis)):
            values: torch.Tensor = policy(
                torch.from_numpy(batch.token_ids), torch.from_numpy(batch.loss_mask), 1.0
            )[0]
        return values.reshape(3, -1)

    first, again = logp(2), logp(3)
    assert torch.equal(first[:2], again[:2])
    assert (first[2] - again[2]).abs().max() > 1e-3 and (first[0] - first[1]).abs().max() > 1e-3
