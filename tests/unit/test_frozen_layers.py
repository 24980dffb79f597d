"""The layers that a step does not change run once a microbatch, and the step is the same to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.fast_weights.delta import Basis
from configs.schema import LearnerConfig
from learner.frozen_layers import frozen_layers
from learner.learner import Learner
from learner.types import StepReport
from tests.unit.learner_cases import UNWEIGHTED, free, group, learner


def _step(made: Learner, basis: Basis) -> tuple[StepReport, dict[str, torch.Tensor], int]:
    """The second of two steps, the weights behind it, and how often the first layer ran in it."""
    groups = [group(basis, (1.0, 0.0, 0.25, 0.5)), group(basis, (0.0, 1.0, 0.5, 0.75), 11)]
    made.step(groups)
    runs: list[int] = []
    policies = [made._model, *([made._reference.model] if made._reference else [])]
    hooks = [
        policy.base.get_decoder().layers[0].register_forward_hook(lambda *_: runs.append(1))
        for policy in policies
    ]
    report = made.step(groups)
    for hook in hooks:
        hook.remove()
    return report, made.weights(trainable_only=False), len(runs)


@pytest.mark.parametrize("trainable_layers", [1, 2])
@pytest.mark.parametrize(
    ("minibatches", "kl", "passes"),
    [(2, 0.0, 1.5), (1, 0.1, 2), (2, 0.1, 2.5)],  # of each microbatch: old (not the first), KL, training
)
def test_a_step_is_the_same_to_the_bit(
    llama: Path,
    llama_basis: Basis,
    monkeypatch: pytest.MonkeyPatch,
    trainable_layers: int,
    minibatches: int,
    kl: float,
    passes: float,
) -> None:
    config = free(trainable="last_layers", trainable_layers=trainable_layers, microbatch_tokens=64)
    objective = replace(UNWEIGHTED, minibatches=minibatches, kl_coefficient=kl)
    report, weights, runs = _step(learner(llama, llama_basis, config, objective), llama_basis)
    monkeypatch.setattr("learner.frozen_layers.frozen_layers", lambda *_: 0)
    plain, expected, plain_runs = _step(learner(llama, llama_basis, config, objective), llama_basis)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    assert replace(report, seconds=0) == replace(plain, seconds=0)
    assert runs == report.microbatches and plain_runs == pytest.approx(passes * runs, rel=0.2)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LearnerConfig(trainable="last_layers", trainable_layers=8), 22),
        (LearnerConfig(trainable="last_layers", trainable_layers=2), 26),  # Delta begins at layer 26
        (LearnerConfig(trainable="last_layers", trainable_layers=30), 0),
        (LearnerConfig(trainable="last_layers", trainable_layers=8, zero_stage=3), 0),
        (LearnerConfig(trainable="full"), 0),
        (LearnerConfig(trainable="lora"), 0),
    ],
)
def test_frozen_are_the_layers_below_training_and_delta(config: LearnerConfig, count: int) -> None:
    names = [f"model.layers.{number}.mlp.up_proj" for number in range(26, 30)]
    a = {name: torch.zeros(2, 4) for name in names}
    basis = Basis("b", "svd", 2, a, dict.fromkeys(names, 4), False)
    assert frozen_layers(30, config, basis) == count
