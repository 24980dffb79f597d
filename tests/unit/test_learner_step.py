"""Whole steps of the learner on real DeepSpeed: reports, refusals, the warm start, and that it learns."""

from __future__ import annotations

import errno
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.fast_weights.delta import Basis
from actors.types import ActionSpan, Answer, Outcome, Segment, Task, Trajectory, TrajectoryGroup
from learner.batch import split
from learner.learner import Learner
from learner.types import LearnerError, ScoredTrajectory
from tests.unit.learner_cases import (
    UNWEIGHTED,
    fast_weights,
    free,
    group,
    learner,
    sampled_logprobs,
    segments_of,
    trajectory,
)


@pytest.fixture(scope="module")
def groups(llama_basis: Basis) -> list[TrajectoryGroup]:
    return [group(llama_basis, (1.0, 0.0, 0.25))]


def test_what_is_no_checkpoint_is_refused(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    made = learner(llama, llama_basis, free(trainable="last_layers", trainable_layers=1))
    with pytest.raises(LearnerError, match="not a learner checkpoint"):
        made.load(tmp_path / "nowhere")
    made.step(groups)
    made.save(tmp_path / "c")
    with pytest.raises(LearnerError, match="holds nothing for model"):
        learner(llama, llama_basis, free()).load(tmp_path / "c")
    label = tmp_path / "c" / "learner.json"
    label.write_text(json.dumps({**json.loads(label.read_text()), "format": "other"}))
    with pytest.raises(LearnerError, match="format 'other'"):
        made.load(tmp_path / "c")


def test_a_disk_that_refuses_leaves_the_older_checkpoint_as_it_was(
    llama: Path, llama_basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    made = learner(llama, llama_basis, free())
    made.save(tmp_path / "c")
    before = {path: path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()}
    made.step([group(llama_basis, (1.0, 0.0))])
    with monkeypatch.context() as patch:
        patch.setattr("configs.files.os.fsync", refuse)
        with pytest.raises(LearnerError, match=r"/c: cannot be written \(.*No space left"):
            made.save(tmp_path / "c")
    assert {path: path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()} == before
    made.save(tmp_path / "c")  # over what the failure left behind
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_checkpoints_model_folder_has_the_tokenizer_and_no_other_weights(
    llama: Path, llama_basis: Basis, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(llama, start)
    for name in ("tokenizer.json", "chat_template.jinja", "old.bin", "model.safetensors.index.json"):
        (start / name).write_text(name)
    made = learner(start, llama_basis, free())
    made.save(tmp_path / "c")
    names = {path.name for path in (tmp_path / "c" / "model").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert not names & {"old.bin", "model.safetensors.index.json"}


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("learner.json", '{"format": "engram-learner-1"}', "ranks: Field required"),
        ("learner.json", "{", "Invalid JSON"),
        ("rng-0.json", '{"python": [3, [], null], "numpy": [], "torch": "", "cuda": ""}', "numpy.0: Field"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line_and_changes_nothing(
    llama: Path, llama_basis: Basis, tmp_path: Path, file: str, content: str, said: str
) -> None:
    made = learner(llama, llama_basis, free())
    made.save(tmp_path / "c")
    (tmp_path / "c" / file).write_text(content)
    made.step([group(llama_basis, (1.0, 0.0))])
    before = made.weights(trainable_only=False)
    with pytest.raises(LearnerError, match=rf"{file}: not a learner checkpoint \({said}") as error:
        made.load(tmp_path / "c")
    assert "\n" not in str(error.value)
    after = made.weights(trainable_only=False)
    assert made.version == 1 and all(torch.equal(before[name], after[name]) for name in before)


def test_equal_rewards_move_nothing_and_are_counted(llama: Path, llama_basis: Basis) -> None:
    made = learner(llama, llama_basis, free())
    before = made.weights(trainable_only=False)
    report = made.step([group(llama_basis, (0.5, 0.5)), group(llama_basis, (1.0,))])
    assert (report.groups_used, report.groups_without_signal) == (0, 2)
    assert (report.trajectories_skipped, report.action_tokens) == (3, 0)
    assert math.isnan(report.ratio_mean) and math.isnan(report.grad_norm) and report.version == 0
    assert math.isnan(report.loss) and math.isnan(report.kl)
    after = made.weights(trainable_only=False)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("kl_coefficient", [0.0, 0.5])
def test_a_step_without_signal_leaves_what_adam_has_gathered(
    llama: Path,
    llama_basis: Basis,
    groups: list[TrajectoryGroup],
    tmp_path: Path,
    kl_coefficient: float,
    minibatches: int,
) -> None:
    """Adam's momentum would move the weights without a gradient, and weight decay would shrink them.

    A KL term alone is no reason for a step: it would be that momentum's, under a new version.
    """
    objective = replace(UNWEIGHTED, kl_coefficient=kl_coefficient, minibatches=minibatches)
    made = learner(llama, llama_basis, free(weight_decay=0.1, warmup_steps=4), objective)
    assert made.step(groups).optimizer_steps == minibatches
    made.save(tmp_path / "before")
    report = made.step([group(llama_basis, (0.5, 0.5))])
    assert (report.optimizer_steps, report.version, report.learning_rate) == (0, 1, 0.0)
    assert (report.tokens, report.trajectories_skipped, report.groups_without_signal) == (0, 2, 1)
    made.save(tmp_path / "after")
    for name in ("learner.json", "model/model.safetensors", "optimizer/exp_avg.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    assert made.step(groups).learning_rate == pytest.approx(free().learning_rate * 2 / 4)


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.5])
def test_a_minibatch_without_signal_is_no_optimizer_step(
    llama: Path, llama_basis: Basis, kl_coefficient: float
) -> None:
    objective = replace(UNWEIGHTED, minibatches=2, advantage="positive", kl_coefficient=kl_coefficient)
    made = learner(llama, llama_basis, free(), objective)
    report = made.step([group(llama_basis, (1.0, 0.0))])  # only the better one has an advantage
    assert (report.optimizer_steps, report.version) == (1, 1) and report.grad_norm > 0


def test_nothing_to_learn_from_is_an_error(llama: Path, llama_basis: Basis) -> None:
    made = learner(llama, llama_basis, free())
    with pytest.raises(LearnerError, match="nothing to learn from: 1 groups hold 0 finished episodes"):
        made.step([group(llama_basis, ())])
    with pytest.raises(LearnerError, match="no target token"):
        made.warm_start_step([], 1e-3)


def test_report_of_a_step(llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup]) -> None:
    made = learner(llama, llama_basis, free())
    parts = [part for _, part in segments_of(groups)]
    sampled = np.concatenate(
        [values[part.action_mask] for one in groups[0].trajectories for values, part in pairs(made, one)]
    )
    engine = np.concatenate([part.logprobs[part.action_mask] for part in parts])
    report = made.step(groups)
    assert report.tokens == sum(len(part.token_ids) for part in parts)
    assert report.action_tokens == len(engine)
    assert report.extract_tokens == sum(
        int(part.action_mask.sum()) for part in parts if part.spans[0].kind == "extract"
    )
    assert report.ratio_mean == pytest.approx(np.exp(sampled - engine).mean(), rel=1e-4)
    assert report.ratio_max == pytest.approx(np.exp(sampled - engine).max(), rel=1e-4)
    assert report.engine_logprob_diff_mean == pytest.approx(np.abs(sampled - engine).mean(), rel=1e-4)
    assert 0 < report.entropy < math.log(256)
    assert report.ratio_min == pytest.approx(np.exp(sampled - engine).min(), rel=1e-4)
    assert 0 <= report.padding_fraction < 0.3


def pairs(made: Learner, episode: Trajectory) -> list[tuple[np.ndarray, Segment]]:
    return list(zip(made.logprobs(episode), episode.segments, strict=True))


def test_the_learning_rate_warms_up_over_rl_steps(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup]
) -> None:
    made = learner(llama, llama_basis, free(warmup_steps=2))
    made.warm_start_step([part for _, part in segments_of(groups)], 1e-3)  # does not count
    rates = [made.step(groups).learning_rate for _ in range(3)]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3])


def test_minibatches_use_the_old_policy_and_kl_pulls_back(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup]
) -> None:
    large = free(learning_rate=3e-2)
    # A large step moves the next minibatch's ratio out of the clip range: its old log-prob is of before it.
    several, single = (
        learner(llama, llama_basis, large, replace(UNWEIGHTED, minibatches=count)).step(groups)
        for count in (3, 1)
    )
    assert several.clip_fraction > 0 == single.clip_fraction
    tied = learner(llama, llama_basis, large, replace(UNWEIGHTED, kl_coefficient=1.0))
    first, second = tied.step(groups), tied.step(groups)
    assert first.kl == pytest.approx(0, abs=1e-9) and second.kl > 1e-3
    assert second.loss == pytest.approx(second.policy_loss + second.kl)
    # beside episodes with an advantage, those without pull back to the reference too
    equal = tied.step([group(llama_basis, (0.5, 0.5)), *groups])
    assert equal.trajectories_skipped == 0 and equal.tokens > second.tokens and equal.groups_used == 1


def test_each_step_shuffles_its_minibatches_anew(
    llama: Path, llama_basis: Basis, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = []

    def recorded(scored: list[ScoredTrajectory], parts: int, seed: tuple[int, ...]) -> object:
        plan = split(scored, parts, seed)
        plans.append([[episode.trajectory.episode_id for episode in part] for part in plan])
        return plan

    monkeypatch.setattr("learner.learner.split", recorded)
    made = learner(llama, llama_basis, free(), replace(UNWEIGHTED, minibatches=2))
    siblings = [group(llama_basis, (1.0, 0.0, 0.25, 0.5, 0.75, 0.3))]
    made.step(siblings)
    made.step(siblings)
    assert plans[0] != plans[1]
    assert all(
        {name for part in plan for name in part} == {f"episode-{n}" for n in range(1, 7)} for plan in plans
    )


def test_warm_start_is_cross_entropy_without_delta_and_leaves_a_fresh_optimizer(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup]
) -> None:
    segments = [part for _, part in segments_of(groups)]
    made = learner(llama, llama_basis, free())
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
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
    moves = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
    steps = moves / report.learning_rate
    assert float(steps.max()) < 1.01 and float(steps.quantile(0.5)) > 0.9


def test_the_kl_term_pulls_to_the_policy_as_rl_begins_after_a_warm_start_and_after_a_resume(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    tied, large = replace(UNWEIGHTED, kl_coefficient=1.0), free(learning_rate=3e-2)
    segments = [part for _, part in segments_of(groups)]
    made = learner(llama, llama_basis, large, tied)
    for _ in range(3):
        made.warm_start_step(segments, 3e-3)
    made.save(tmp_path / "warm")
    assert made.step(groups).kl == pytest.approx(0, abs=1e-9)
    made.save(tmp_path / "rl")
    expected = made.step(groups).kl
    assert expected > 1e-3
    again = learner(llama, llama_basis, large, tied)
    again.load(tmp_path / "rl")
    assert again.step(groups).kl == expected
    again.load(tmp_path / "warm")
    assert again.step(groups).kl == pytest.approx(0, abs=1e-9)


def test_a_kl_term_without_its_reference_is_refused_and_without_a_warm_start_it_is_the_model(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    tied, large = replace(UNWEIGHTED, kl_coefficient=1.0), free(learning_rate=3e-2)
    plain = learner(llama, llama_basis, large)
    plain.step(groups)
    plain.save(tmp_path / "cold")
    made = learner(llama, llama_basis, large, tied)
    made.load(tmp_path / "cold")
    assert made.step(groups).kl > 1e-3
    warm = learner(llama, llama_basis, large)
    warm.warm_start_step([part for _, part in segments_of(groups)], 3e-3)
    warm.step(groups)
    warm.save(tmp_path / "warm")
    assert not (tmp_path / "warm" / "reference.safetensors").exists()
    with pytest.raises(LearnerError, match=r"reference\.safetensors: is missing.*kl_coefficient=0"):
        made.load(tmp_path / "warm")


def test_credit_by_question_learns_where_the_rewards_are_equal(
    llama: Path, llama_basis: Basis, tmp_path: Path
) -> None:
    """Each sibling answered one of two questions: the gradient is that of the answers alone, each its own."""

    def episode(seed: int, right: int) -> Trajectory:
        one = trajectory(llama_basis, seed, 0.5, lengths=(12, 9, 11))
        answers = tuple(Answer("q", ("a",), "", "c", {"f1": float(n == right)}) for n in (0, 1))
        served: tuple[tuple[int, ...] | None, ...] = (None, (0,), (1,))  # the first stands for the episode
        parts = tuple(
            replace(part, spans=tuple(replace(span, serves=serves) for span in part.spans))
            for part, serves in zip(one.segments, served, strict=True)
        )
        return replace(one, segments=parts, outcome=Outcome(0.5, {}, answers))

    both = TrajectoryGroup(Task("t", "recall", {}, 0), 0, (episode(1, 0), episode(2, 1)), (), "worker-0")
    by_question = replace(UNWEIGHTED, credit="question")
    assert learner(llama, llama_basis, free()).step([both]).optimizer_steps == 0
    made = learner(llama, llama_basis, free(), by_question)
    before = [logprob for one in both.trajectories for logprob in made.logprobs(one)]
    report = made.step([both])
    assert (report.optimizer_steps, report.groups_used, report.mean_advantage_abs) == (1, 1, 1.0)
    assert report.tokens == sum(part.token_ids.size for one in both.trajectories for part in one.segments[1:])
    after = [logprob for one in both.trajectories for logprob in made.logprobs(one)]
    moved = [float((new - old).sum()) for new, old in zip(after, before, strict=True)]
    assert moved[1] > 0 > moved[2] and moved[4] < 0 < moved[5]


def test_rewarding_a_token_makes_it_likelier(llama: Path, llama_basis: Basis) -> None:
    """Policy improvement under a written Delta: the rewarded token gains probability, the other one loses."""
    prompt, good, bad = [5, 9, 200, 31], 77, 78
    template = trajectory(llama_basis, 1, 0.0, lengths=(6, 5))
    weights = fast_weights(llama_basis, 1, 1)

    def episode(token: int, reward: float) -> Trajectory:
        ids, mask = np.array([*prompt, token], np.int32), np.array([0, 0, 0, 0, 1], dtype=bool)
        logprobs = np.where(mask, -5.0, 0).astype(np.float32)
        part = Segment(ids, mask, logprobs, 0, 1, (ActionSpan(4, 5, "act"),))
        outcome = Outcome(reward, {}, ())
        return replace(
            template, episode_id=f"e{token}", segments=(part,), revisions=(weights,), outcome=outcome
        )

    both = TrajectoryGroup(template.task, 0, (episode(good, 1.0), episode(bad, 0.0)), (), "worker-0")
    made = learner(llama, llama_basis, free(learning_rate=3e-3))

    def probability() -> list[float]:
        return [float(np.exp(made.logprobs(episode)[0][-1])) for episode in both.trajectories]

    before = probability()
    for _ in range(5):
        made.step([both])
    after = probability()
    assert after[0] > 2 * before[0] and after[1] < before[1]


def test_settings_that_do_not_fit_are_refused(llama: Path, llama_basis: Basis) -> None:
    with pytest.raises(LearnerError, match="the model has 3 layers"):
        learner(llama, llama_basis, free(trainable="last_layers", trainable_layers=9))
    with pytest.raises(LearnerError, match="use zero_stage 1"):
        learner(llama, llama_basis, free(dtype="bfloat16"))
