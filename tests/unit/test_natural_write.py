"""The natural write: its sensitivity follows the formula, and its steps do the harm that was predicted.

It does less harm than the paper's step for the same learning.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from actors.fast_weights.basis import load_basis, save_basis, with_sensitivity
from actors.fast_weights.delta import Basis, BasisError, DeltaInjector, stack, zero
from actors.fast_weights.input_moments import own_sensitivity
from actors.fast_weights.sensitivity import DAMPING, FLOOR, Sensitivity, measure, own_samples, sensitivity_of
from actors.types import FastWeights, WriteRequest
from actors.write.optimizers import NaturalOptimizer
from actors.write.writer import BatchedWriter
from configs.bounds import BoundError
from configs.schema import FastWeightsConfig, RunConfig, WriteConfig
from tests.unit.write_cases import VOCABULARY, basis_of, examples, frozen, ragged_requests, tiny_model

NATURAL = WriteConfig(optimizer="natural", epochs=3, batch_size=3, step_kl=0.02)


@pytest.fixture
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.fast_weights.sensitivity.SAMPLES", 4)
    monkeypatch.setattr("actors.fast_weights.sensitivity.SAMPLE_TOKENS", 16)


def texts(count: int = 24) -> list[tuple[int, ...]]:
    draw = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(0, VOCABULARY, (24,), generator=draw).tolist()) for _ in range(count)]


def sensitive(model: nn.Module, rank: int = 8) -> Basis:
    basis = basis_of(model)
    return with_sensitivity(basis, measure(model, basis.a, basis.first_layer, texts(), rank, 0))


@pytest.mark.parametrize("shape", [(200, 12), (8, 12)])
def test_the_direction_is_that_of_the_formula(shape: tuple[int, int]) -> None:
    """Every eigenvector kept that there is: G is exact but for the damping of what is left."""
    draw = torch.Generator().manual_seed(0)
    g, z = (torch.randn(shape[0], width, generator=draw, dtype=torch.float64) for width in (shape[1], 3))
    rank = min(shape) - 2
    one = sensitivity_of(z, g, rank)
    values, vectors = torch.linalg.eigh(g.T @ g / shape[0])
    rest = values[:-rank].mean()
    full = (
        vectors * torch.cat([rest.expand(shape[1] - rank), values[-rank:]])
    ) @ vectors.T + DAMPING * rest * torch.eye(shape[1], dtype=torch.float64)
    gradient = torch.randn(2, shape[1], 3, generator=draw)
    wanted = torch.linalg.solve(full, gradient.double()) @ torch.linalg.inv(z.T @ z / shape[0])
    assert torch.allclose(
        one.natural(gradient).double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())
    )


def test_it_is_measured_on_what_the_model_would_say() -> None:
    """Against gradients of log p(y) that the test takes itself, y drawn from the model and not from the text.

    The first token of each text is left out, and the model trains on afterwards.
    """
    model = tiny_model()
    basis = basis_of(model)
    measured = measure(model, basis.a, basis.first_layer, texts(3), 4, seed=7)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    draw = torch.Generator().manual_seed(7)
    name, inputs, gradients = basis.modules[0], list[Tensor](), list[Tensor]()
    for text in texts(3):
        module, seen = model.get_submodule(name), list[Tensor]()
        handle = module.register_forward_hook(
            lambda _, args, output, seen=seen: seen.extend((args[0], output))
        )
        scores = model(torch.tensor([text])).logits[0].log_softmax(-1)
        handle.remove()
        said = torch.multinomial(scores.detach().exp(), 1, generator=draw)
        (gradient,) = torch.autograd.grad(-scores.gather(1, said).sum(), seen[1])
        inputs.append(seen[0].detach()[0, 1:] @ basis.a[name].T)
        gradients.append(gradient[0, 1:])
    expected = sensitivity_of(torch.cat(inputs), torch.cat(gradients), 4)
    change = torch.randn(basis.d_out[name], basis.rank, generator=draw)
    wanted = expected.natural(change)
    assert torch.allclose(measured[name].natural(change), wanted, atol=1e-3 * float(wanted.abs().max()))


def test_every_direction_may_be_kept() -> None:
    """Then no rest is left to measure the damping by: the direction is that of G with its floor."""
    draw = torch.Generator().manual_seed(0)
    g, z = (torch.randn(200, width, generator=draw, dtype=torch.float64) for width in (16, 3))
    gradient = torch.randn(2, 16, 3, generator=draw)
    whole = g.T @ g / 200
    floored = whole + FLOOR * torch.linalg.eigvalsh(whole)[-1] * torch.eye(16, dtype=torch.float64)
    wanted = torch.linalg.solve(floored, gradient.double()) @ torch.linalg.inv(z.T @ z / 200)
    for rank in (16, 64):
        found = sensitivity_of(z, g, rank).natural(gradient).double()
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_a_step_is_as_long_as_the_harm_it_may_do() -> None:
    draw = torch.Generator().manual_seed(0)
    ones = [
        sensitivity_of(torch.randn(50, 3, generator=draw), torch.randn(50, rows, generator=draw), 4)
        for rows in (5, 7)
    ]
    b = [torch.zeros(2, rows, 3, requires_grad=True) for rows in (5, 7)]
    steps = NaturalOptimizer(b, ones, 0.02)
    for taken in range(3):
        before = [matrix.detach().clone() for matrix in b]
        for matrix in b:
            matrix.grad = torch.randn(matrix.shape, generator=draw)
            matrix.grad[1] *= taken == 0  # the second episode has had its one step: no gradient, no movement
        steps.step(torch.full((2,), 1e6))
        moved = [now.detach() - then for now, then in zip(b, before, strict=True)]
        assert sum(harm(one, change[0]) for one, change in zip(ones, moved, strict=True)) == pytest.approx(
            0.02, rel=1e-3
        )
        assert (sum(harm(one, change[1]) for one, change in zip(ones, moved, strict=True)) > 0) == (
            taken == 0
        )
        steps.zero_grad()
        assert all(matrix.grad is None for matrix in b)


def test_what_is_known_is_not_learnt_harder() -> None:
    """A step goes no further than to a loss of 0, by its own linear prediction."""
    draw = torch.Generator().manual_seed(0)
    one = sensitivity_of(torch.randn(50, 3, generator=draw), torch.randn(50, 5, generator=draw), 4)
    b = torch.zeros(2, 5, 3, requires_grad=True)
    b.grad = torch.randn(2, 5, 3, generator=draw)
    NaturalOptimizer([b], [one], 0.02).step(torch.tensor([0.0, 1e-4]))
    assert not b[0].any()
    assert float((b[1] * b.grad[1]).detach().sum()) == pytest.approx(-1e-4, rel=1e-3)


def harm(one: Sensitivity, change: Tensor) -> float:
    """1/2 tr(dB^T G dB C), with G and C as they were kept."""
    rows = len(one.directions)
    inverse = (
        one.inverse[-1] * torch.eye(rows)
        + (one.directions * (one.inverse[:-1] - one.inverse[-1])) @ one.directions.T
    )
    g, c = torch.linalg.inv(inverse.double()), torch.linalg.inv(one.read.double())
    return float((change.double().T @ g @ change.double() @ c).trace() / 2)


def test_episodes_written_together_get_what_each_would_get_alone() -> None:
    model = tiny_model()
    basis = sensitive(model)
    writer = BatchedWriter(frozen(model), basis, NATURAL)
    requests = [
        replace(one, weights=replace(one.weights, basis_id=basis.id)) for one in ragged_requests(basis)
    ]
    together = writer.write(requests)
    assert [result.outcome for result in together] == ["accepted"] * 3
    for request, result in zip(requests, together, strict=True):
        (alone,) = writer.write([request])
        assert result.loss_after < result.loss_before
        for name, matrix in alone.weights.b.items():
            assert abs(matrix - result.weights.b[name]).max() <= 2e-5 * max(1.0, abs(matrix).max())


def test_it_does_less_harm_than_the_papers_step_that_learns_as_much() -> None:
    """On texts that it was not measured on: KL(base || written) at the same loss of the flashcards."""
    model = tiny_model()
    basis = sensitive(model)
    llama = frozen(model)
    request = WriteRequest("a", zero(basis), examples(1, 3))
    (natural,) = BatchedWriter(llama, basis, replace(NATURAL, epochs=2, step_kl=0.01)).write([request])
    rates = (10 ** (quarter / 4) for quarter in range(-20, 0))
    plain = (
        BatchedWriter(llama, basis, WriteConfig(epochs=2, learning_rate=rate, batch_size=3)).write([request])[
            0
        ]
        for rate in rates
    )
    as_good = next(result for result in plain if result.loss_after <= natural.loss_after)
    assert kl(model, basis, natural.weights) < 0.5 * kl(model, basis, as_good.weights)


@torch.no_grad()
def kl(model: nn.Module, basis: Basis, weights: FastWeights) -> float:
    ids = torch.tensor(texts(48)[24:])
    base = model(ids).logits.log_softmax(-1)
    with DeltaInjector(model, basis).use(stack([weights] * len(ids), basis)):
        now = model(ids).logits.log_softmax(-1)
    return float((base.exp() * (base - now)).sum(-1).mean())


def test_a_basis_keeps_its_sensitivity_in_its_file(tmp_path: Path) -> None:
    model = tiny_model()
    basis, path = sensitive(model), tmp_path / "basis.safetensors"
    assert basis.id != basis_of(model).id
    save_basis(basis, path)
    loaded = load_basis(path)
    assert loaded.id == basis.id
    for name, one in basis.sensitivity.items():
        assert all(
            torch.equal(part, loaded.sensitivity[name].parts()[key]) for key, part in one.parts().items()
        )
    with safetensors.safe_open(path, framework="pt") as reader:
        metadata = reader.metadata()
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    for damage, message in (
        ({f"sensitivity.read.{basis.modules[0]}": torch.zeros(2, 2)}, "does not fit"),
        ({f"sensitivity.read.{basis.modules[0]}": torch.full((3, 3), torch.nan)}, "not finite"),
        ({f"sensitivity.directions.{basis.modules[0]}": torch.tensor(1.0)}, "does not fit"),
        (
            {f"sensitivity.read.{basis.modules[0]}": torch.eye(3, dtype=torch.bfloat16)},
            "is bfloat16; it must be float32",
        ),
        ({f"sensitivity.read.{basis.modules[0]}": torch.eye(3)}, "altered"),
    ):
        safetensors.torch.save_file({**tensors, **damage}, path, metadata=metadata)
        with pytest.raises(BasisError, match=message) as caught:
            load_basis(path)
        assert "\n" not in str(caught.value)
    del tensors[f"sensitivity.inverse.{basis.modules[0]}"]
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    with pytest.raises(BasisError, match="damaged"):
        load_basis(path)


@pytest.mark.usefixtures("few_samples")
def test_a_models_own_text_is_the_same_every_time_and_leaves_the_generator_alone(
    tiny_model_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    torch.manual_seed(5)
    untouched = torch.get_rng_state()
    first, again, other = (own_samples(model, ((1,), (1, 2, 3)), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), untouched)
    assert first == again != other
    assert {text[:1] for text in first} == {(1,)}
    assert len(set(first)) > 1


@pytest.mark.usefixtures("few_samples")
def test_a_folder_is_enough_and_trains_nothing(tiny_model_path: Path, tmp_path: Path) -> None:
    from actors.fast_weights.basis import compute_basis_from_checkpoint

    plain = compute_basis_from_checkpoint(tiny_model_path, FastWeightsConfig(), 0)
    first, again = (
        compute_basis_from_checkpoint(tiny_model_path, FastWeightsConfig(sensitivity_rank=8), 0)
        for _ in range(2)
    )
    assert first.id == again.id != plain.id
    assert all(torch.equal(first.a[name], plain.a[name]) for name in plain.modules)
    with pytest.raises(BasisError, match=r"cannot be loaded to measure fast_weights\.sensitivity_rank"):
        own_sensitivity(tmp_path, plain, 8, 0)

    shutil.copytree(tiny_model_path, tmp_path / "damaged")
    weights = safetensors.torch.load_file(tiny_model_path / "model.safetensors")
    damaged = {
        name: torch.full_like(one, torch.nan) if "norm" in name else one for name, one in weights.items()
    }
    safetensors.torch.save_file(
        damaged, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(BasisError, match=r"sensitivity_rank cannot be measured .*may be damaged"):
        own_sensitivity(tmp_path / "damaged", plain, 8, 0)


def test_what_the_natural_write_needs_is_asked_for() -> None:
    model = tiny_model()
    with pytest.raises(BasisError, match=r"was made without fast_weights\.sensitivity_rank"):
        BatchedWriter(frozen(model), basis_of(model), NATURAL)
    with pytest.raises(
        BoundError,
        match=r"fast_weights\.sensitivity_rank=0 is not allowed: "
        r"it must be 1 or more with write\.optimizer=natural",
    ):
        RunConfig(write=NATURAL)
    with pytest.raises(BoundError, match=r"train_a=True is not allowed"):
        FastWeightsConfig(sensitivity_rank=8, train_a=True)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_confined_write_moves_b_only_where_the_models_own_text_reads_least(
    optimizer: Literal["sgd", "adam"],
) -> None:
    model = tiny_model()
    basis = sensitive(model)
    config = WriteConfig(optimizer=optimizer, learning_rate=5e-3, epochs=6, null_space=1)
    (result,) = BatchedWriter(frozen(model), basis, config).write(
        [WriteRequest("a", zero(basis), examples(1, 3))]
    )
    assert result.loss_after < result.loss_before
    for name, b in result.weights.b.items():
        read = basis.sensitivity[name].read.double()  # C^-1
        moved = torch.from_numpy(b).double()
        used = torch.linalg.inv(read)
        least = torch.linalg.eigvalsh(used)[0]
        # B A x of a token has a part along one direction only: that of the least eigenvalue of C
        assert torch.linalg.matrix_rank(moved, rtol=1e-4) == 1
        assert torch.allclose(
            (moved @ used), least * moved, atol=1e-5 * float(moved.abs().max() * used.max())
        )
    with pytest.raises(BasisError, match=r"write\.null_space=1"):
        BatchedWriter(frozen(model), basis_of(model), config)
