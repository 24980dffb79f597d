"""Every ZeRO stage of real DeepSpeed: equal to plain torch, resumed to the bit, and guarded against NaN."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.fast_weights.delta import Basis
from actors.types import TrajectoryGroup
from configs.schema import LearnerConfig, ObjectiveConfig
from learner.batch import split
from learner.types import LearnerError, ScoredTrajectory
from tests.unit.learner_cases import assert_equal_updates, free, group, learner, reference_steps


def start_weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.fixture(scope="module")
def groups(llama_basis: Basis) -> list[TrajectoryGroup]:
    return [group(llama_basis, (1.0, 0.0, 0.25))]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.filterwarnings("ignore")
def test_every_zero_stage_equals_plain_adamw(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], zero_stage: int
) -> None:
    config = LearnerConfig(
        learning_rate=1e-3, weight_decay=0.01, max_grad_norm=0.5, zero_stage=zero_stage, microbatch_tokens=50
    )
    expected = reference_steps(llama, llama_basis, groups, config, steps=2)
    made = learner(llama, llama_basis, config)
    reports = [made.step(groups) for _ in range(2)]
    found = made.weights(trainable_only=False)
    start = start_weights(llama)
    assert found.keys() == expected.keys()
    assert all(found[name].is_contiguous() and found[name].dtype == torch.float32 for name in found)
    assert_equal_updates(found, expected, start, 1e-5)
    assert reports[0].grad_norm > 0.5 and reports[0].microbatches > 1  # clipping and accumulation both acted
    assert [report.version for report in reports] == [1, 2] == [1, made.version]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_learner_goes_on_to_the_bit(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path, zero_stage: int
) -> None:
    config = free(zero_stage=zero_stage, warmup_steps=4, microbatch_tokens=300)
    objective = ObjectiveConfig(minibatches=2)
    made = learner(llama, llama_basis, config, objective)
    for _ in range(2):
        made.step(groups)
    made.save(tmp_path / "c")
    draws = (np.random.rand(), torch.rand(1).item())
    expected = [made.step(groups) for _ in range(2)]
    other = learner(llama, llama_basis, config, objective)
    other.load(tmp_path / "c")
    assert (np.random.rand(), torch.rand(1).item()) == draws
    resumed = [other.step(groups) for _ in range(2)]
    assert [replace(report, seconds=0) for report in resumed] == [
        replace(report, seconds=0) for report in expected
    ]
    one, two = made.weights(trainable_only=False), other.weights(trainable_only=False)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_one_stage_resumes_in_another_and_loads_in_transformers(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    made = learner(llama, llama_basis, free(zero_stage=1))
    made.step(groups)
    made.save(tmp_path / "c")
    made.save(tmp_path / "c")  # replaces, leaves nothing behind
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert not any(path.suffix in (".pt", ".pkl", ".bin") for path in (tmp_path / "c").rglob("*"))
    theta = made.weights(trainable_only=False)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "c" / "model").named_parameters())
    assert all(torch.equal(loaded[name], theta[name]) for name in theta)
    other = learner(llama, llama_basis, free(zero_stage=3))
    other.load(tmp_path / "c")
    expected, found = made.step(groups), other.step(groups)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    one, two = made.weights(trainable_only=False), other.weights(trainable_only=False)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.filterwarnings("ignore")
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], zero_stage: int
) -> None:
    poisoned = list(groups[0].trajectories)
    first = poisoned[0].segments[0]
    broken = np.where(first.action_mask, np.nan, 0).astype(np.float32)
    poisoned[0] = replace(poisoned[0], segments=(replace(first, logprobs=broken), *poisoned[0].segments[1:]))
    made = learner(llama, llama_basis, free(zero_stage=zero_stage), ObjectiveConfig(importance="truncated"))
    start = made.weights(trainable_only=False)
    with pytest.raises(LearnerError, match="not finite"):
        made.step([replace(groups[0], trajectories=tuple(poisoned))])
    after = made.weights(trainable_only=False)
    assert made.version == 0 and all(torch.equal(start[name], after[name]) for name in start)
    made.step(groups)  # and it goes on
    moved = made.weights(trainable_only=False)
    assert all(torch.isfinite(value).all() for value in moved.values())
    assert any(not torch.equal(moved[name], start[name]) for name in start)


@pytest.mark.filterwarnings("ignore")
def test_a_bad_later_minibatch_says_what_is_applied(llama: Path, llama_basis: Basis) -> None:
    """Good optimizer steps before a bad one stay: the message says so, and the version does not move."""
    siblings = group(llama_basis, (1.0, 0.0, 0.25, 0.5))
    order = split([ScoredTrajectory(one, 1.0) for one in siblings.trajectories], 2, (0, 0))
    last = order[1][0].trajectory
    broken = tuple(
        replace(part, logprobs=np.where(part.action_mask, np.nan, 0).astype(np.float32))
        for part in last.segments
    )
    poisoned = tuple(replace(one, segments=broken) if one is last else one for one in siblings.trajectories)
    made = learner(llama, llama_basis, free(zero_stage=1), ObjectiveConfig(minibatches=2))
    start = made.weights(trainable_only=False)
    said = r"minibatch 2: .*But 1 of the 2 minibatches .* version is still 0: resume from the last"
    with pytest.raises(LearnerError, match=said):
        made.step([replace(siblings, trajectories=poisoned)])
    after = made.weights(trainable_only=False)
    assert made.version == 0 and any(not torch.equal(start[name], after[name]) for name in start)
    assert all(bool(torch.isfinite(value).all()) for value in after.values())


def test_skipping_trajectories_without_advantage_changes_nothing(llama: Path, llama_basis: Basis) -> None:
    made = learner(llama, llama_basis, free())
    mixed = [group(llama_basis, (1.0, 0.0, 0.5))]  # the third has advantage 0
    report = made.step(mixed)
    assert report.trajectories_skipped == 1
    expected = reference_steps(llama, llama_basis, mixed, free(), steps=1)
    found = made.weights(trainable_only=False)
    assert_equal_updates(found, expected, start_weights(llama), 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_bfloat16_keeps_float32_masters(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    made = learner(llama, llama_basis, free(learning_rate=1e-5, dtype="bfloat16", zero_stage=1))
    made.step(groups)
    made.save(tmp_path / "c")
    expected = made.step(groups).loss
    assert all(value.dtype == torch.bfloat16 for value in made.weights(trainable_only=False).values())
    other = learner(llama, llama_basis, free(learning_rate=1e-5, dtype="bfloat16", zero_stage=1))
    other.load(tmp_path / "c")
    assert other.step(groups).loss == expected
