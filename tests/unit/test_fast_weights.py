"""The basis, the algebra of B, Deltas by sequence in a Hugging Face model, and PEFT's format.

On tiny random models of each supported family.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actors.fast_weights.basis import compute_basis, load_basis, make_basis, save_basis
from actors.fast_weights.delta import Basis, BasisError, DeltaInjector, StackedWeights, add_delta, stack, zero
from actors.fast_weights.peft_format import export_peft, from_peft, to_peft
from actors.types import FastWeights
from configs.schema import FastWeightsConfig
from tests.unit import write_cases
from tests.unit.write_cases import FAMILIES, basis_of

CONFIG = FastWeightsConfig(rank=3, last_layers=2)
IDS = torch.tensor([[5, 17, 3, 60, 22, 9], [8, 1, 90, 44, 2, 31], [5, 17, 3, 60, 22, 9]])


def tiny_model(family: str = "llama") -> nn.Module:
    return write_cases.tiny_model(family, head_scale=1)


def random_weights(basis: Basis, seed: int, revision: int = 1) -> FastWeights:
    draw = np.random.default_rng(seed)
    b = {
        name: draw.normal(0, 0.05, (rows, basis.rank)).astype(np.float32)
        for name, rows in basis.d_out.items()
    }
    return FastWeights(basis.id, revision, b)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    out: Tensor = model(ids).logits
    return out


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_row_acts_under_its_own_delta(family: str) -> None:
    """Row i of a mixed batch equals a model with W + B_i A merged by hand; row 1 is the base model."""
    model, merged = tiny_model(family), tiny_model(family)
    basis = basis_of(model)
    weights = [random_weights(basis, 1), None, random_weights(basis, 2)]
    injector = DeltaInjector(model, basis)
    with torch.no_grad(), injector.use(stack(weights, basis, torch.float32, "cpu")):
        got = logits(model)
    for row, one in enumerate(weights):
        merged.load_state_dict(model.state_dict())
        if one is not None:
            for name in basis.modules:
                merged.get_submodule(name).weight.data += torch.from_numpy(one.b[name]) @ basis.a[name]
        assert torch.allclose(got[row], logits(merged, IDS[row : row + 1])[0], atol=2e-4)
    assert (got[0] - got[2]).abs().max() > 0.05, "two Deltas on the same tokens must differ visibly"


def test_delta_zero_is_the_base_model_to_the_bit() -> None:
    model = tiny_model()
    base = logits(model)
    basis = basis_of(model)
    injector = DeltaInjector(model, basis)
    assert torch.equal(logits(model), base)
    with injector.use(stack([random_weights(basis, 1)] * 3, basis, torch.float32, "cpu")):
        assert not torch.equal(logits(model), base)
        with injector.use(None):
            assert torch.equal(logits(model), base)
        assert not torch.equal(logits(model), base)
    assert torch.equal(logits(model), base)
    with injector.use(stack([zero(basis), None, None], basis, torch.float32, "cpu")):
        assert torch.equal(logits(model), base)
    injector.remove()
    with injector.use(stack([random_weights(basis, 1)] * 3, basis, torch.float32, "cpu")):
        assert torch.equal(logits(model), base)


def test_gradients_reach_theta_and_never_the_constants() -> None:
    """theta's gradient under a constant Delta equals that of a model with W + B A merged in.

    None reaches A or a detached B.
    """
    model, merged = tiny_model(), tiny_model()
    basis = basis_of(model)
    one = random_weights(basis, 1)
    stacked = stack([one] * 3, basis, torch.float32, "cpu")
    with DeltaInjector(model, basis).use(stacked):
        logits(model).logsumexp(-1).sum().backward()
    for name in basis.modules:
        merged.get_submodule(name).weight.data += torch.from_numpy(one.b[name]) @ basis.a[name]
    logits(merged).logsumexp(-1).sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), merged.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(
            parameter.grad, other.grad, rtol=1e-3, atol=1e-4 * other.grad.abs().max().item()
        ), name
    assert all(
        matrix.grad is None and not matrix.requires_grad
        for matrix in [*stacked.b.values(), *basis.a.values()]
    )


def test_gradient_reaches_b_when_asked_also_under_checkpointing() -> None:
    basis = basis_of(tiny_model())
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
            assert model.is_gradient_checkpointing
        leaves = {
            name: b.requires_grad_()
            for name, b in stack([random_weights(basis, 1)] * 3, basis, torch.float32, "cpu").b.items()
        }
        with DeltaInjector(model, basis).use(StackedWeights(leaves, {})):
            logits(model).logsumexp(-1).sum().backward()
        gradients.append({name: b.grad for name, b in leaves.items()})
    for name in basis.modules:
        plain, again = gradients[0][name], gradients[1][name]
        assert plain is not None and again is not None and plain.abs().max() > 0
        assert torch.allclose(plain, again, rtol=1e-4, atol=1e-5)


def test_delta_is_added_per_sequence() -> None:
    draw = torch.Generator().manual_seed(0)
    x, a, b, y = (torch.randn(shape, generator=draw) for shape in ((2, 5, 7), (3, 7), (2, 4, 3), (2, 5, 4)))
    expected = torch.stack([y[i] + x[i] @ (b[i] @ a).T for i in range(2)])
    assert torch.allclose(add_delta(y, x, a, b), expected, atol=1e-5)


def moving(basis: Basis) -> Basis:
    return make_basis(basis.kind, basis.a, basis.d_out, train_a=True)


def with_own_a(basis: Basis, seed: int) -> FastWeights:
    draw = np.random.default_rng([seed, 1])
    a = {
        name: matrix.numpy() + draw.normal(0, 0.3, matrix.shape).astype(np.float32)
        for name, matrix in basis.a.items()
    }
    return replace(random_weights(basis, seed), a=a)


def test_rows_with_an_a_of_their_own_act_under_it(tmp_path: Path) -> None:
    """Where writes move A: each row equals W + B_i A_i merged by hand, in PEFT too.

    Both are constants to theta's gradient.
    """
    from peft import PeftModel

    model, merged = tiny_model(), tiny_model()
    frozen, basis = basis_of(model), moving(basis_of(model))
    assert basis.id != frozen.id and basis.parameters > frozen.parameters
    weights = [with_own_a(basis, 1), None, with_own_a(basis, 2)]
    stacked = stack(weights, basis)
    with DeltaInjector(model, basis).use(stacked):
        got = logits(model)
        got[0].logsumexp(-1).sum().backward()
    for row, one in enumerate(weights):
        merged.load_state_dict(model.state_dict())
        for name, b in one.b.items() if one is not None else ():
            change = torch.from_numpy(b) @ torch.from_numpy(one.a[name])
            merged.get_submodule(name).weight.data += change  # type: ignore[union-attr]
        expected = logits(merged)
        assert torch.allclose(got[row], expected[row], atol=2e-4)
        if row == 0:
            expected[0].logsumexp(-1).sum().backward()
    for parameter, other in zip(model.parameters(), merged.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(
            parameter.grad, other.grad, rtol=1e-3, atol=1e-4 * other.grad.abs().max().item()
        )
    assert all(not matrix.requires_grad for matrix in [*stacked.a.values(), *stacked.b.values()])
    assert weights[0] is not None
    with torch.no_grad(), DeltaInjector(tiny_model(), basis).use(None):
        export_peft(weights[0], basis, tmp_path / "adapter", "m")
        theirs = logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval())[0].log_softmax(
            -1
        )
    assert torch.allclose(theirs, got[0].detach().log_softmax(-1), atol=1e-3)
    back = from_peft(tmp_path / "adapter", basis)
    assert all(np.array_equal(back.a[name], weights[0].a[name]) for name in basis.modules)
    save_basis(basis, tmp_path / "basis.safetensors")
    assert load_basis(tmp_path / "basis.safetensors").train_a
    shared = replace(weights[0], a={})
    for bad, of, message in (
        (shared, basis, "no A of its own"),
        (replace(weights[0], basis_id=frozen.id), frozen, "its own A, A of basis"),
    ):
        with pytest.raises(BasisError, match=message):
            stack([bad], of)


def test_unfit_weights_and_models_are_refused() -> None:
    model = tiny_model()
    basis = basis_of(model)
    good = random_weights(basis, 1)
    name = basis.modules[0]
    not_finite = {**good.b, name: np.full_like(good.b[name], np.nan)}
    for weights, message in (
        (FastWeights("another", 1, good.b), "belong to basis another"),
        (FastWeights(basis.id, 1, {name: good.b[name]}), "differ in matrices"),
        (FastWeights(basis.id, 1, {**good.b, name: good.b[name][:, :2]}), "has shape"),
        (FastWeights(basis.id, 1, not_finite), "not finite"),
    ):
        with pytest.raises(BasisError, match=message):
            stack([weights], basis, torch.float32, "cpu")
    with pytest.raises(BasisError, match="no such module"):
        DeltaInjector(nn.Linear(2, 2), basis)
    wider = compute_basis({name: torch.randn(48, 40)}, CONFIG, 0)
    with pytest.raises(BasisError, match="another model's basis"):
        DeltaInjector(model, wider)
    with (
        DeltaInjector(model, basis).use(stack([good], basis, torch.float32, "cpu")),
        pytest.raises(BasisError, match="one Delta per batch row"),
    ):
        logits(model)


def test_exported_adapter_acts_the_same_in_stock_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_model()
    basis = basis_of(model)
    weights = random_weights(basis, 1, revision=4)
    export_peft(weights, basis, tmp_path / "adapter", "some/model")
    injector = DeltaInjector(model, basis)
    with torch.no_grad(), injector.use(stack([weights] * 3, basis, torch.float32, "cpu")):
        ours = logits(model).log_softmax(-1)
    with torch.no_grad():
        theirs = logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()).log_softmax(-1)
        base = logits(model).log_softmax(-1)
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - base).abs().max() > 0.05
    back = from_peft(tmp_path / "adapter", basis)
    assert back.revision == 4
    assert all(np.array_equal(back.b[name], weights.b[name]) for name in basis.modules)


def test_adapter_of_another_basis_or_damaged_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    basis, other = basis_of(model), basis_of(model, kind="random")
    export_peft(random_weights(basis, 1), basis, tmp_path / "adapter", "m")
    with pytest.raises(BasisError, match="is not that of basis"):
        from_peft(tmp_path / "adapter", other)
    with pytest.raises(FileExistsError, match="already holds something"):
        export_peft(random_weights(basis, 1), basis, tmp_path / "adapter", "m")
    with pytest.raises(BasisError, match="belong to basis"):
        export_peft(random_weights(other, 1), basis, tmp_path / "second", "m")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]  # nothing half-written is left
    tensors = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(BasisError, match="cannot be read as an adapter"):
        from_peft(tmp_path / "adapter", basis)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 6},
        {"r": 6, "lora_alpha": 6},
        {"r": 0},
        {"r": "3"},
        {"r": None},
        {"use_rslora": True},
        {"alpha_pattern": {"down_proj": 6}},
        {"alpha_pattern": {r"model\.layers\.\d+\.mlp.*": 6}},
        {"rank_pattern": {"up_proj": 2}},
        {"rank_pattern": {"(": 2}},
        {"rank_pattern": {r"(.|..|...)+\b\B": 2}},  # it would take for ever
        {"alpha_pattern": [1]},
    ],
)
def test_an_adapter_of_another_rank_or_scaling_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    """PEFT acts under W + (lora_alpha / r) B A: another scaling makes another Delta of the same matrices."""
    basis = basis_of(tiny_model())
    export_peft(random_weights(basis, 1), basis, tmp_path / "adapter", "m")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(BasisError, match=r"rank 3 and scaling 1$|cannot be read as an adapter") as caught:
        from_peft(tmp_path / "adapter", basis)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["use_dora", "fan_in_fan_out"])
def test_an_adapter_that_is_no_plain_lora_is_refused(tmp_path: Path, setting: str) -> None:
    basis = basis_of(tiny_model())
    export_peft(random_weights(basis, 1), basis, tmp_path / "adapter", "m")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), setting: True}))
    with pytest.raises(BasisError, match=rf"has {setting}=true"):
        from_peft(tmp_path / "adapter", basis)


@pytest.mark.parametrize(
    "change",
    [
        {"use_rslora": True, "lora_alpha": 3**0.5},
        {"alpha_pattern": {"q_proj": 6}, "rank_pattern": {}, "use_dora": None},
        {"lora_alpha": 6, "alpha_pattern": {".*_proj": 3}},
    ],
)
def test_settings_that_come_to_the_same_delta_are_read(tmp_path: Path, change: dict[str, object]) -> None:
    basis = basis_of(tiny_model())
    weights = random_weights(basis, 1)
    export_peft(weights, basis, tmp_path / "adapter", "m")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    back = from_peft(tmp_path / "adapter", basis)
    assert all(np.array_equal(back.b[name], weights.b[name]) for name in basis.modules)


def test_revision_zero_exports_as_zeros(tmp_path: Path) -> None:
    basis = basis_of(tiny_model())
    assert all(
        not bool(tensor.any()) for name, tensor in to_peft(zero(basis), basis).items() if "lora_B" in name
    )
    export_peft(zero(basis), basis, tmp_path / "adapter", "m")
    assert from_peft(tmp_path / "adapter", basis).revision == 0
