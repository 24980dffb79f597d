"""learner.trainable=lora: the learner against stock PEFT, and the weights that a worker forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from actors.fast_weights.delta import Basis
from actors.policy_lora import LoraBase
from actors.protocols import EngineError
from actors.types import Segment, TrajectoryGroup
from configs.schema import LearnerConfig, ObjectiveConfig
from learner import checkpoint
from learner.advantage import grpo
from learner.learner import Learner
from learner.types import LearnerError
from tests.unit.learner_cases import (
    free,
    group,
    largest_relative_difference,
    learner,
    merged_model,
    sampled_logprobs,
    segments_of,
    write_model,
)

Tensors = dict[str, torch.Tensor]
REWARDS = (1.0, 0.0, 0.25)
RANK, ALPHA = 4, 12.0
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MATRICES = tuple(f"{'mlp' if name in LINEAR[4:] else 'self_attn'}.{name}" for name in LINEAR)


def lora(**changes: object) -> LearnerConfig:
    """One step of 0.05 makes B so large that A has a gradient, and the factors a visible product."""
    settings = {"trainable": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, "learning_rate": 0.05, **changes}
    return free(**settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def groups(llama_basis: Basis) -> list[TrajectoryGroup]:
    return [group(llama_basis, REWARDS)]


def moments(folder: Path) -> Tensors:
    return safetensors.torch.load_file(folder / "optimizer" / "exp_avg.safetensors")


def stock_peft(base: torch.nn.Module, factors: Tensors) -> torch.nn.Module:
    """``base`` in stock PEFT with ``factors``."""
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEAR)))
    with torch.no_grad():
        for name, parameter in trained_of(model).items():
            parameter.copy_(factors[name])
    return model


def trained_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """PEFT's factors by the learner's names."""
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def test_the_gradient_is_that_of_a_plain_peft_loop(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    """Under the Deltas of the episodes, which stock PEFT finds merged into its base model."""
    made = learner(llama, llama_basis, lora())
    made.step(groups)
    factors = made.weights(trainable_only=True)
    made.save(tmp_path / "before")
    made.step(groups)
    made.save(tmp_path / "after")
    before, after = moments(tmp_path / "before"), moments(tmp_path / "after")
    found = {name: (after[name] - 0.9 * before[name]) / 0.1 for name in after}

    advantages = grpo(list(REWARDS), True)
    of = {one.episode_id: a for one, a in zip(groups[0].trajectories, advantages, strict=True)}
    tokens = sum(int(part.action_mask.sum()) for _, part in segments_of(groups))
    expected: Tensors = {}
    for episode, part in segments_of(groups):
        model = stock_peft(merged_model(llama, llama_basis, episode.weights_of(part)), factors)
        (-of[episode.episode_id] * sampled_logprobs(model, part).sum() / tokens).backward()
        for name, parameter in trained_of(model).items():
            assert parameter.grad is not None
            expected[name] = expected.get(name, torch.zeros_like(parameter)) + parameter.grad
    assert min(float(gradient.norm()) for gradient in expected.values()) > 1e-4
    assert largest_relative_difference(found, expected) < 1e-5


def test_the_supervised_loss_is_that_of_stock_peft(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup]
) -> None:
    parts: list[Segment] = [part for _, part in segments_of(groups)]
    made = learner(llama, llama_basis, lora())
    made.warm_start_step(parts, 0.05)
    model = stock_peft(merged_model(llama, llama_basis, None), made.weights(trainable_only=True))
    loss = -torch.cat([sampled_logprobs(model, part) for part in parts]).mean()
    loss.backward()
    gradients = [one.grad.flatten() for one in trained_of(model).values() if one.grad is not None]
    report = made.warm_start_step(parts, 0.05)
    assert report.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert report.grad_norm == pytest.approx(float(torch.cat(gradients).norm()), rel=1e-5)


def test_only_the_factors_have_gradients_and_optimizer_states(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    made = learner(llama, llama_basis, lora())
    start = made.weights(trainable_only=False)
    base = safetensors.torch.load_file(llama / "model.safetensors")
    assert all(torch.equal(start[name], base[name]) for name in start)  # B is 0: it begins as the base model
    made.step(groups)
    made.save(tmp_path / "c")
    wanted = {f"model.layers.{n}.{m}.lora_{x}.weight" for n in range(3) for m in MATRICES for x in "AB"}
    assert moments(tmp_path / "c").keys() == made.weights(trainable_only=True).keys() == wanted
    with_gradient = {name for name, parameter in made._model.named_parameters() if parameter.requires_grad}
    assert len(with_gradient) == len(wanted) and all("lora_" in name for name in with_gradient)
    moved = made.weights(trainable_only=False)
    assert moved.keys() == base.keys()
    changed = {name for name in base if not torch.equal(moved[name], base[name])}
    assert changed == {f"model.layers.{n}.{m}.weight" for n in range(3) for m in MATRICES}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_worker_forms_the_learners_weights_to_the_bit(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], dtype: str
) -> None:
    config = lora(dtype=dtype, zero_stage=1, lora_targets=("q_proj", "down_proj"))
    made = learner(llama, llama_basis, config)
    made.step(groups)
    factors, whole = made.weights(trainable_only=True), made.weights(trainable_only=False)
    formed = LoraBase(str(llama), config.dtype, config.lora_scale).with_factors(factors)
    # k_proj and v_proj too, as an engine takes them together with q_proj
    ends = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "down_proj.weight")
    assert set(formed) == {name for name in whole if name.endswith(ends)} and len(formed) == 12
    for name, weight in formed.items():
        assert torch.equal(weight, whole[name]) and formed.shapes[name] == tuple(weight.shape)
    assert "model.norm.weight" not in formed and "model.layers.0.mlp.up_proj.weight" not in formed


def test_a_base_that_does_not_fit_the_factors_is_refused_before_anything_loads(
    llama: Path, llama_basis: Basis, tmp_path: Path
) -> None:
    factors = learner(llama, llama_basis, lora()).weights(trainable_only=True)
    with pytest.raises(EngineError, match=r"has no model\.layers\.0.* another model's"):
        LoraBase(str(tmp_path), "float32", 1.0).with_factors(factors)
    wide = factors | {"model.layers.0.mlp.down_proj.lora_B.weight": torch.zeros(65, RANK)}
    with pytest.raises(EngineError, match=r"down_proj\.weight has shape \[64, 96\], .* for \[65, 96\]"):
        LoraBase(str(llama), "float32", 1.0).with_factors(wide)


def test_the_checkpoint_holds_the_policy_whole_and_as_a_peft_adapter(
    llama: Path,
    llama_basis: Basis,
    groups: list[TrajectoryGroup],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In several files, as large models' are, so that the sums are never all in memory."""
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 100_000)
    made = learner(llama, llama_basis, lora())
    made.step(groups)
    made.save(tmp_path / "c")
    model = tmp_path / "c" / "model"
    assert len(list(model.glob("model-*.safetensors"))) > 2
    whole = made.weights(trainable_only=False)
    loaded = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)
    adapter = tmp_path / "c" / "adapter"
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    for name, parameter in merged.named_parameters():
        assert torch.allclose(parameter, whole[name], atol=1e-6), name
    other = learner(llama, llama_basis, lora())
    other.load(tmp_path / "c")
    assert largest_relative_difference(other.weights(trainable_only=False), whole) == 0


@pytest.mark.parametrize(
    ("change", "said"), [({"lora_alpha": 6.0}, "lora_alpha"), ({"lora_rank": 2}, "lora_rank")]
)
def test_a_checkpoint_of_other_factors_is_refused(
    llama: Path,
    llama_basis: Basis,
    groups: list[TrajectoryGroup],
    tmp_path: Path,
    change: dict[str, float],
    said: str,
) -> None:
    made = learner(llama, llama_basis, lora())
    made.step(groups)
    made.save(tmp_path / "c")
    other = learner(llama, llama_basis, lora(**change))
    before = other.weights(trainable_only=True)
    with pytest.raises(LearnerError, match=f"learner.*{next(iter(change))}"):
        other.load(tmp_path / "c")
    assert largest_relative_difference(other.weights(trainable_only=True), before) == 0


def test_a_base_model_that_has_changed_is_refused(
    llama: Path, llama_basis: Basis, groups: list[TrajectoryGroup], tmp_path: Path
) -> None:
    write_model(tmp_path / "base")
    made = learner(tmp_path / "base", llama_basis, lora())
    made.step(groups)
    made.save(tmp_path / "c")
    path = tmp_path / "base" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["model.embed_tokens.weight"] *= 1.001
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(LearnerError, match=r"embed_tokens\.weight is not the sum of the base model"):
        learner(tmp_path / "base", llama_basis, lora()).load(tmp_path / "c")


@pytest.mark.parametrize(("zero_stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (3, "float32")])
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_learner_goes_on_to_the_bit_with_its_reference(
    llama: Path,
    llama_basis: Basis,
    groups: list[TrajectoryGroup],
    tmp_path: Path,
    zero_stage: int,
    dtype: str,
) -> None:
    """Behind a warm start, so that the KL term's reference is no model on disk."""

    def new() -> Learner:
        objective = ObjectiveConfig(kl_coefficient=0.5)
        return learner(llama, llama_basis, lora(zero_stage=zero_stage, dtype=dtype), objective)

    made = new()
    made.warm_start_step([part for _, part in segments_of(groups)], 0.05)
    assert made.step(groups).kl == pytest.approx(0.0, abs=1e-6)  # to the policy as RL begins
    made.save(tmp_path / "c")
    report = made.step(groups)
    assert report.kl > 1e-3
    other = new()
    other.load(tmp_path / "c")
    assert other.step(groups).kl == report.kl
    one, two = made.weights(trainable_only=False), other.weights(trainable_only=False)
    assert all(torch.equal(one[name], two[name]) and bool(one[name].isfinite().all()) for name in one)
