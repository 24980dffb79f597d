"""What becomes of a write: rolled back where it diverged, and the probe of its receipt."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from actors.fast_weights.delta import DeltaInjector, stack, zero
from actors.types import WriteExample, WriteRequest
from actors.write.writer import BatchedWriter
from configs.schema import WriteConfig
from tests.unit.test_writer import ADAM, SGD
from tests.unit.write_cases import (
    basis_of,
    examples,
    frozen,
    ragged_requests,
    random_weights,
    tiny_model,
    write,
)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_diverged_write_is_rolled_back(optimizer: Literal["sgd", "adam"]) -> None:
    """A good write, then one with a hopeless lr: the good one stays in force."""
    basis = basis_of(tiny_model())
    first = WriteRequest("a", zero(basis), examples(1, 7))
    good = write([first], WriteConfig(optimizer="adam", learning_rate=0.01, epochs=40))[0]
    assert good.loss_after < 0.5 * good.loss_before
    request = WriteRequest("a", good.weights, first.examples)
    config = WriteConfig(optimizer=optimizer, learning_rate=1e3, batch_size=3)
    result = write([request], config)[0]
    assert result.outcome == "rolled_back"
    assert result.weights is request.weights
    assert result.probe is None
    assert "lower write.learning_rate=1000" in result.reason
    assert "\n" not in result.reason
    assert math.isfinite(result.loss_before)
    assert not result.loss_after <= config.max_loss_ratio * result.loss_before


@pytest.mark.parametrize(("share", "outcome"), [(0.98, "rolled_back"), (1.02, "accepted")])
def test_a_write_is_rolled_back_where_its_loss_rose_past_the_ratio(share: float, outcome: str) -> None:
    """One write, under a ratio just below its rise and under one just above."""
    basis = basis_of(tiny_model())
    first = WriteRequest("a", zero(basis), examples(1, 7))
    known = write([first], WriteConfig(optimizer="adam", learning_rate=0.01, epochs=40))[0]
    request = replace(first, weights=known.weights)
    harmful = WriteConfig(optimizer="adam", learning_rate=1.0, epochs=1, max_loss_ratio=1e9)
    free = write([request], harmful)[0]
    rise = free.loss_after / free.loss_before
    assert free.outcome == "accepted" and rise > 2 and free.loss_after > 0.1
    result = write([request], replace(harmful, max_loss_ratio=share * rise))[0]
    assert result.outcome == outcome
    assert (result.loss_before, result.loss_after) == (free.loss_before, free.loss_after)
    if outcome == "rolled_back":
        assert result.weights is request.weights and result.probe is None
        assert f"past write.max_loss_ratio={share * rise:g}" in result.reason


def test_a_loss_that_rises_and_stays_small_is_no_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rise is past ``max_loss_ratio``. Where all of it is below ``KNOWN``, the write is accepted."""
    basis = basis_of(tiny_model())
    config = WriteConfig(optimizer="adam", learning_rate=10.0, epochs=1)
    known = write(
        [WriteRequest("a", zero(basis), examples(1, 7))],
        WriteConfig(optimizer="adam", learning_rate=0.01, epochs=40),
    )[0]
    request = WriteRequest("a", known.weights, examples(1, 7))
    refused = write([request], config)[0]
    assert (
        refused.outcome == "rolled_back" and refused.loss_after > config.max_loss_ratio * refused.loss_before
    )
    monkeypatch.setattr("actors.write.writer.KNOWN", refused.loss_after + 1)
    accepted = write([request], config)[0]
    assert accepted.outcome == "accepted" and accepted.loss_after == refused.loss_after


def test_probe_is_the_middle_of_the_shortest_example_under_old_and_new_weights() -> None:
    """The last 3 tokens of its prompt and the first 3 of its answer, scored alone by a plain forward."""
    model = tiny_model()
    basis = basis_of(model)
    shortest = WriteExample(tuple(range(10, 21)), tuple(range(30, 41)))
    request = WriteRequest(
        "b", random_weights(basis, 5), (WriteExample(tuple(range(20)), (1, 2, 3, 4, 5)), shortest)
    )
    result = write([request, *ragged_requests(basis)], SGD)[0]
    assert result.probe is not None
    assert result.probe.token_ids == (*range(18, 21), *range(30, 33))
    injector = DeltaInjector(model, basis)
    for weights, logprobs in ((request.weights, result.probe.before), (result.weights, result.probe.after)):
        with torch.no_grad(), injector.use(stack([weights], basis, torch.float32, "cpu")):
            table = model(torch.tensor([result.probe.token_ids])).logits[0].log_softmax(-1)
        expected = [table[2 + k, token].item() for k, token in enumerate(range(30, 33))]
        assert logprobs == pytest.approx(expected, abs=1e-4)
    assert np.abs(np.subtract(result.probe.before, result.probe.after)).max() > 1e-3


def test_the_probe_of_a_short_example_is_all_of_it() -> None:
    basis = basis_of(tiny_model())
    probe = write([WriteRequest("a", zero(basis), (WriteExample((5, 6, 7), (1, 2)),))], SGD)[0].probe
    assert probe is not None
    assert probe.token_ids == (5, 6, 7, 1, 2)
    assert len(probe.after) == len(probe.before) == 2


def test_theta_and_basis_stay_as_they_are() -> None:
    model = tiny_model()
    basis = basis_of(model)
    theta = {name: parameter.clone() for name, parameter in model.named_parameters()}
    a = {name: matrix.clone() for name, matrix in basis.a.items()}
    requests = ragged_requests(basis)
    old = {name: matrix.copy() for name, matrix in requests[1].weights.b.items()}
    BatchedWriter(frozen(model), basis, ADAM).write(requests)
    assert all(
        torch.equal(parameter, theta[name]) and parameter.grad is None
        for name, parameter in model.named_parameters()
    )
    assert all(torch.equal(matrix, a[name]) and matrix.grad is None for name, matrix in basis.a.items())
    assert all(np.array_equal(requests[1].weights.b[name], matrix) for name, matrix in old.items())
