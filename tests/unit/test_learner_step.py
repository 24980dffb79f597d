"""Whole steps of the learner on real DeepSpeed: ZeRO stages, resume, guards, the warm start, and that it learns."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.fast_weights import Basis
from actors.types import ActionSpan, Outcome, Segment, TrajectoryGroup
from configs.schema import LearnerConfig, ObjectiveConfig
from learner.advantage import grpo
from learner.learner import Learner
from learner.types import LearnerError
from tests.unit.learner_cases import fast_weights, free, group, learner, sampled_logprobs, segments_of, trajectory, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def basis(folder: Path) -> Basis:
    return write_model(folder)


@pytest.fixture(scope="module")
def groups(basis: Basis) -> list[TrajectoryGroup]:
    return [group(basis, (1.0, 0.0, 0.25))]


def reference_steps(folder: Path, basis: Basis, groups: list[TrajectoryGroup], config: LearnerConfig, steps: int) -> dict[str, torch.Tensor]:
    """The same steps in plain torch: one model, Delta added to and taken from the weights around each sequence, clipped AdamW."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay)
    advantages = grpo([one.outcome.reward for one in groups[0].trajectories], True)
    by_episode = {one.episode_id: advantage for one, advantage in zip(groups[0].trajectories, advantages, strict=True)}
    tokens = sum(int(part.action_mask.sum()) for _, part in segments_of(groups))
    for _ in range(steps):
        optimizer.zero_grad()
        for episode, part in segments_of(groups):
            weights = episode.weights_of(part)
            saved = {name: model.get_submodule(name).weight.detach().clone() for name in (weights.b if weights else {})}
            for name in saved:
                model.get_submodule(name).weight.data += torch.from_numpy(weights.b[name]) @ basis.a[name]  # type: ignore[union-attr]
            (-by_episode[episode.episode_id] * sampled_logprobs(model, part).sum() / tokens).backward()
            for name, value in saved.items():
                model.get_submodule(name).weight.data.copy_(value)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.filterwarnings("ignore")
def test_every_zero_stage_equals_plain_adamw(folder: Path, basis: Basis, groups: list[TrajectoryGroup], zero_stage: int) -> None:
    config = LearnerConfig(learning_rate=1e-3, weight_decay=0.01, max_grad_norm=0.5, zero_stage=zero_stage, microbatch_tokens=50)
    expected = reference_steps(folder, basis, groups, config, steps=2)
    made = learner(folder, basis, config)
    reports = [made.step(groups) for _ in range(2)]
    found = made.weights(trainable_only=False)
    start = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    assert found.keys() == expected.keys()
    assert all(found[name].is_contiguous() and found[name].dtype == torch.float32 for name in found)
    worst = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    moved = min(float((expected[name] - start[name]).abs().max()) for name in expected)
    assert worst < 1e-5 < 1e-3 < moved
    assert reports[0].grad_norm > 0.5 and reports[0].microbatches > 1  # clipping and accumulation both acted
    assert [report.version for report in reports] == [1, 2] == [1, made.version]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_learner_goes_on_to_the_bit(folder: Path, basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path, zero_stage: int) -> None:
    config, objective = free(zero_stage=zero_stage, warmup_steps=4), ObjectiveConfig(minibatches=2)
    made = learner(folder, basis, config, objective)
    for _ in range(2):
        made.step(groups)
    made.save(tmp_path / "c")
    draws = (np.random.rand(), torch.rand(1).item())
    expected = [made.step(groups) for _ in range(2)]
    other = learner(folder, basis, config, objective)
    other.load(tmp_path / "c")
    assert (np.random.rand(), torch.rand(1).item()) == draws
    found = [other.step(groups) for _ in range(2)]
    assert [asdict(replace(report, seconds=0)) for report in found] == [asdict(replace(report, seconds=0)) for report in expected]
    one, two = made.weights(trainable_only=False), other.weights(trainable_only=False)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_one_stage_resumes_in_another_and_loads_in_transformers(
    folder: Path, basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    made = learner(folder, basis, free(zero_stage=1))
    made.step(groups)
    made.save(tmp_path / "c")
    made.save(tmp_path / "c")  # replaces, leaves nothing behind
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert not any(path.suffix in (".pt", ".pkl", ".bin") for path in (tmp_path / "c").rglob("*"))
    theta = made.weights(trainable_only=False)
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "c" / "model").named_parameters())
    assert all(torch.equal(loaded[name], theta[name]) for name in theta)
    other = learner(folder, basis, free(zero_stage=3))
    other.load(tmp_path / "c")
    expected, found = made.step(groups), other.step(groups)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    one, two = made.weights(trainable_only=False), other.weights(trainable_only=False)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6


def test_what_is_no_checkpoint_is_refused(folder: Path, basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path) -> None:
    made = learner(folder, basis, free(trainable="last_layers", trainable_layers=1))
    with pytest.raises(LearnerError, match="not a learner checkpoint"):
        made.load(tmp_path / "nowhere")
    made.step(groups)
    made.save(tmp_path / "c")
    with pytest.raises(LearnerError, match="holds nothing for model"):
        learner(folder, basis, free()).load(tmp_path / "c")
    label = tmp_path / "c" / "learner.json"
    label.write_text(json.dumps({**json.loads(label.read_text()), "format": "other"}))
    with pytest.raises(LearnerError, match="format 'other'"):
        made.load(tmp_path / "c")


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.filterwarnings("ignore")
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(folder: Path, basis: Basis, groups: list[TrajectoryGroup], zero_stage: int) -> None:
    made, twin = (learner(folder, basis, free(zero_stage=zero_stage)) for _ in range(2))
    for one in (made, twin):
        one.step(groups)
    before = made.weights(trainable_only=False)
    poisoned = list(groups[0].trajectories)
    first = poisoned[0].segments[0]
    broken = np.where(first.action_mask, np.nan, 0).astype(np.float32)
    poisoned[0] = replace(poisoned[0], segments=(replace(first, logprobs=broken), *poisoned[0].segments[1:]))
    objective_reads_engine = learner(folder, basis, free(zero_stage=zero_stage), ObjectiveConfig(importance="truncated"))
    start = objective_reads_engine.weights(trainable_only=False)
    with pytest.raises(LearnerError, match="not finite"):
        objective_reads_engine.step([replace(groups[0], trajectories=tuple(poisoned))])
    after = objective_reads_engine.weights(trainable_only=False)
    assert objective_reads_engine.version == 0 and all(torch.equal(start[name], after[name]) for name in start)
    objective_reads_engine.step(groups)  # and it goes on
    moved = objective_reads_engine.weights(trainable_only=False)
    assert all(torch.isfinite(value).all() for value in moved.values()) and any(not torch.equal(moved[name], start[name]) for name in start)
    assert all(torch.equal(before[name], value) for name, value in twin.weights(trainable_only=False).items())


def test_equal_rewards_move_nothing_and_are_counted(folder: Path, basis: Basis) -> None:
    made = learner(folder, basis, free())
    before = made.weights(trainable_only=False)
    report = made.step([group(basis, (0.5, 0.5)), group(basis, (1.0,))])
    assert (report.groups_used, report.groups_without_signal, report.trajectories_skipped, report.action_tokens) == (0, 2, 3, 0)
    assert math.isnan(report.ratio_mean) and report.grad_norm == 0 and report.version == 1
    after = made.weights(trainable_only=False)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nothing_to_learn_from_is_an_error(folder: Path, basis: Basis) -> None:
    made = learner(folder, basis, free())
    with pytest.raises(LearnerError, match="nothing to learn from: 1 groups hold 0 finished episodes"):
        made.step([group(basis, ())])
    with pytest.raises(LearnerError, match="no target token"):
        made.warm_start_step([], 1e-3)


def test_skipping_trajectories_without_advantage_changes_nothing(folder: Path, basis: Basis) -> None:
    made = learner(folder, basis, free())
    mixed = [group(basis, (1.0, 0.0, 0.5))]  # the third has advantage 0
    report = made.step(mixed)
    assert report.trajectories_skipped == 1
    expected = reference_steps(folder, basis, mixed, free(), steps=1)
    found = made.weights(trainable_only=False)
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-5


def test_report_of_a_step(folder: Path, basis: Basis, groups: list[TrajectoryGroup]) -> None:
    made = learner(folder, basis, free(warmup_steps=4))
    parts = [part for _, part in segments_of(groups)]
    sampled = np.concatenate([values[part.action_mask] for one in groups[0].trajectories for values, part in pairs(made, one)])
    engine = np.concatenate([part.logprobs[part.action_mask] for part in parts])
    report = made.step(groups)
    assert report.tokens == sum(len(part.token_ids) for part in parts)
    assert report.action_tokens == len(engine)
    assert report.extract_tokens == sum(int(part.action_mask.sum()) for part in parts if part.spans[0].kind == "extract")
    assert report.ratio_mean == pytest.approx(np.exp(sampled - engine).mean(), rel=1e-4)
    assert report.ratio_max == pytest.approx(np.exp(sampled - engine).max(), rel=1e-4)
    assert report.engine_logprob_diff_mean == pytest.approx(np.abs(sampled - engine).mean(), rel=1e-4)
    assert 0 < report.entropy < math.log(256)
    assert report.learning_rate == pytest.approx(1e-3 / 4) and made.step(groups).learning_rate == pytest.approx(2e-3 / 4)
    assert 0 <= report.padding_fraction < 0.3


def pairs(made: Learner, one: object) -> list[tuple[np.ndarray, Segment]]:
    return list(zip(made.logprobs(one), one.segments, strict=True))  # type: ignore[arg-type, attr-defined]


def test_minibatches_use_the_old_policy_and_kl_pulls_back(folder: Path, basis: Basis, groups: list[TrajectoryGroup]) -> None:
    # A large step makes the second minibatch's ratio leave the clip range: only an old log-prob of *before* the step can see it.
    report = learner(folder, basis, free(learning_rate=3e-2), ObjectiveConfig(minibatches=3, importance="none")).step(groups)
    assert report.clip_fraction > 0
    assert learner(folder, basis, free(learning_rate=3e-2), ObjectiveConfig(importance="none")).step(groups).clip_fraction == 0
    tied = learner(folder, basis, free(learning_rate=3e-2), ObjectiveConfig(kl_coefficient=1.0, importance="none"))
    first, second = tied.step(groups), tied.step(groups)
    assert first.kl == pytest.approx(0, abs=1e-9) and second.kl > 1e-3
    assert second.loss == pytest.approx(second.policy_loss + second.kl)
    assert first.trajectories_skipped == 0


def test_warm_start_is_cross_entropy_without_delta_and_leaves_a_fresh_optimizer(folder: Path, basis: Basis, groups: list[TrajectoryGroup]) -> None:
    segments = [part for _, part in segments_of(groups)]
    made = learner(folder, basis, free())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = -float(torch.cat([sampled_logprobs(model, part) for part in segments]).mean())
    reports = [made.warm_start_step(segments, 3e-3) for _ in range(6)]
    assert reports[0].loss == pytest.approx(expected, rel=1e-5)
    assert reports[-1].loss < 0.8 * reports[0].loss
    assert made.version == 6
    before = made.weights(trainable_only=False)
    report = made.step(groups)
    after = made.weights(trainable_only=False)
    # Fresh Adam: the first step moves each number by at most the learning rate, and most by nearly all of it.
    steps = torch.cat([(after[name] - before[name]).abs().flatten() for name in before]) / report.learning_rate
    assert float(steps.max()) < 1.01 and float(steps.quantile(0.5)) > 0.9


def test_rewarding_a_token_makes_it_likelier(folder: Path, basis: Basis) -> None:
    """Policy improvement: under a written Delta, the token that earns the reward gains probability at the others' cost."""
    prompt, good, bad = [5, 9, 200, 31], 77, 78
    template = trajectory(basis, 1, 0.0, lengths=(6, 5))
    weights = fast_weights(basis, 1, 1)

    def episode(token: int, reward: float) -> object:
        mask = np.array([0, 0, 0, 0, 1], dtype=bool)
        part = Segment(np.array([*prompt, token], np.int32), mask, np.where(mask, -5.0, 0).astype(np.float32), 0, 1, (ActionSpan(4, 5, "act"),))
        return replace(template, episode_id=f"e{token}", segments=(part,), revisions=(weights,), outcome=Outcome(reward, {}, ()))

    both = TrajectoryGroup(template.task, 0, (episode(good, 1.0), episode(bad, 0.0)), (), "worker-0")  # type: ignore[arg-type]
    made = learner(folder, basis, free(learning_rate=3e-3))

    def probability() -> list[float]:
        return [float(np.exp(made.logprobs(one)[0][-1])) for one in both.trajectories]

    before = probability()
    for _ in range(5):
        made.step([both])
    after = probability()
    assert after[0] > 2 * before[0] and after[1] < before[1]


def test_settings_that_do_not_fit_are_refused(folder: Path, basis: Basis) -> None:
    with pytest.raises(LearnerError, match="the model has 4 layers"):
        learner(folder, basis, free(trainable="last_layers", trainable_layers=9))
    with pytest.raises(LearnerError, match="use zero_stage 1"):
        learner(folder, basis, free(dtype="bfloat16"))


@pytest.mark.filterwarnings("ignore")
def test_bfloat16_keeps_float32_masters(folder: Path, basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path) -> None:
    made = learner(folder, basis, free(learning_rate=1e-5, dtype="bfloat16", zero_stage=1))
    made.step(groups)
    made.save(tmp_path / "c")
    expected = made.step(groups).loss
    assert all(value.dtype == torch.bfloat16 for value in made.weights(trainable_only=False).values())
    other = learner(folder, basis, free(learning_rate=1e-5, dtype="bfloat16", zero_stage=1))
    other.load(tmp_path / "c")
    assert other.step(groups).loss == expected
