"""The basis A: how it is made, what its id names, and its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from actors.fast_weights import input_moments
from actors.fast_weights.basis import (
    compute_basis,
    compute_basis_from_checkpoint,
    load_basis,
    make_basis,
    save_basis,
    target_modules,
)
from actors.fast_weights.delta import Basis, BasisError
from actors.fast_weights.input_moments import MAX_TOKENS, WINDOW, moments_of
from configs.schema import FastWeightsConfig
from tests.unit.test_fast_weights import CONFIG, IDS, tiny_model
from tests.unit.write_cases import basis_of


def test_targets_are_the_mlp_of_the_last_layers() -> None:
    names = target_modules(30, FastWeightsConfig())
    assert len(names) == 12
    assert names[0] == "model.layers.26.mlp.gate_proj"
    assert names[-1] == "model.layers.29.mlp.down_proj"
    with pytest.raises(BasisError, match=r"last_layers=4 .* has 3 layers"):
        target_modules(3, FastWeightsConfig())


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_svd_basis_is_the_top_right_factor(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    basis = compute_basis({"model.layers.0.mlp.up_proj": weight}, FastWeightsConfig(rank=4), seed=0)
    _, s, vh = torch.linalg.svd(weight.double())
    wanted = s[:4, None] * vh[:4]
    got = basis.a["model.layers.0.mlp.up_proj"].double()
    assert torch.allclose(got * torch.sign((got * wanted).sum(1, keepdim=True)), wanted, atol=1e-5)
    peaks = got.gather(1, got.abs().argmax(1, keepdim=True))
    assert bool((peaks > 0).all())  # a sign convention: the id must not depend on the solver's choice


def test_the_id_of_a_basis_names_all_that_it_is() -> None:
    name = "model.layers.0.mlp.up_proj"
    a = {name: torch.ones(2, 4)}
    bases = [
        make_basis("svd", a, {name: 8}, train_a=False),
        make_basis("random", a, {name: 8}, train_a=False),
        make_basis("svd", a, {name: 9}, train_a=False),
        make_basis("svd", a, {name: 8}, train_a=True),
        make_basis("svd", {name: 2 * a[name]}, {name: 8}, train_a=False),
        make_basis("svd", {name.replace("0", "1"): a[name]}, {name.replace("0", "1"): 8}, train_a=False),
    ]
    assert len({basis.id for basis in bases}) == len(bases)
    assert make_basis("svd", {name: a[name].clone()}, {name: 8}, train_a=False).id == bases[0].id


def test_random_basis_depends_on_the_seed_and_has_pefts_scale() -> None:
    config = FastWeightsConfig(rank=8, basis="random")
    weights = {f"model.layers.0.mlp.{name}": torch.zeros(64, 400) for name in ("up_proj", "gate_proj")}
    first, again, other = (compute_basis(weights, config, seed) for seed in (1, 1, 2))
    assert first.id == again.id != other.id
    assert not torch.equal(*first.a.values())
    a = first.a["model.layers.0.mlp.up_proj"]
    assert a.abs().max() <= 1 / 20
    assert abs(a.std().item() - 1 / 20 / 3**0.5) < 0.002


def test_unit_svd_is_svd_at_unit_length() -> None:
    model = tiny_model()
    svd, unit = basis_of(model), basis_of(model, kind="unit_svd")
    assert svd.id != unit.id
    for name in svd.modules:
        assert torch.allclose(unit.a[name].norm(dim=1), torch.ones(3))
        assert torch.allclose(unit.a[name] * svd.a[name].norm(dim=1, keepdim=True), svd.a[name], atol=1e-6)


def test_data_basis_spans_what_the_layers_read() -> None:
    """Against a plain SVD of the inputs that the test's own hooks gather; c by its definition.

    The first token of each window is left out.
    """
    model, windows = tiny_model(), [IDS[0].tolist(), IDS[1].tolist(), IDS[1].flip(0).tolist()]
    svd = basis_of(model)
    config = replace(CONFIG, basis="data", calibration_path="text")
    weights = {name: model.get_parameter(f"{name}.weight") for name in svd.modules}
    basis = compute_basis(weights, config, 0, moments_of(model, svd.modules, windows))
    seen: dict[str, list[Tensor]] = {name: [] for name in svd.modules}
    for name, inputs in seen.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, inputs=inputs: inputs.append(args[0][0, 1:].double())
        )
    with torch.no_grad():
        for window in windows:
            model(torch.tensor([window]))
    for name, inputs in seen.items():
        x, a = torch.cat(inputs), basis.a[name].double()
        _, _, vh = torch.linalg.svd(x)
        directions = a / a.norm(dim=1, keepdim=True)
        assert torch.allclose(
            (directions * vh[:3]).sum(1).abs(), torch.ones(3, dtype=torch.float64), atol=1e-5
        )
        assert torch.allclose(
            (x @ a.T).square().sum(), (x @ svd.a[name].double().T).square().sum(), rtol=1e-4
        )
        assert torch.allclose(a.norm(dim=1), a.norm(dim=1)[0].expand(3), rtol=1e-5)
    other = compute_basis(weights, config, 0, moments_of(model, svd.modules, windows[:2]))
    assert basis.id != other.id  # another text, another basis
    with pytest.raises(BasisError, match="needs a model that reads"):
        compute_basis(weights, config, 0)


def test_a_long_text_is_read_to_its_bound_in_whole_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("words")
    ids, read = list(range(MAX_TOKENS + 700)), list[list[int]]()
    monkeypatch.setattr(input_moments, "_load", lambda *_: (None, lambda *_, **__: {"input_ids": ids}))
    monkeypatch.setattr(input_moments, "moments_of", lambda _, __, windows: read.extend(windows) or {})
    input_moments.input_moments(tmp_path, (), str(tmp_path / "text.txt"))
    assert [token for window in read for token in window] == ids[:MAX_TOKENS]
    assert {len(window) for window in read} == {WINDOW}


def test_data_basis_of_a_folder_reads_its_text_or_says_in_one_line_why_not(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    def made(text: Path) -> Basis:
        return compute_basis_from_checkpoint(
            tiny_model_path, FastWeightsConfig(basis="data", calibration_path=str(text)), 0
        )

    path = tmp_path / "text.txt"
    path.write_text(
        "The ferry to Ostra leaves at nine, and Vera keeps the spare key in the blue tin. " * 60,
        encoding="utf-8",
    )
    first = made(path)
    assert (first.kind, first.id) == ("data", made(path).id)
    for content, message in (
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "is no UTF-8 text"),
        (b"A few words.", "holds . tokens, at least 512"),
    ):
        bad = tmp_path / "bad.txt"
        if content is not None:
            bad.write_bytes(content)
        with pytest.raises(BasisError, match=rf"fast_weights.calibration_path=.*bad.txt {message}") as caught:
            made(bad)
        assert "\n" not in str(caught.value)


def test_rank_above_the_matrix_is_refused() -> None:
    with pytest.raises(BasisError, match=r"rank=6 does not fit .*up_proj of shape"):
        compute_basis({"model.layers.0.mlp.up_proj": torch.zeros(64, 5)}, FastWeightsConfig(), 0)


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_basis_from_checkpoint_single_file_and_shards(tmp_path: Path, shard: str) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=shard)  # type: ignore[operator]
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    assert compute_basis_from_checkpoint(tmp_path, CONFIG, 0).id == basis_of(model).id


def test_checkpoint_without_the_matrices_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    safetensors.torch.save_file(
        {"transformer.h.0.mlp.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(BasisError, match="supported are Llama-like"):
        compute_basis_from_checkpoint(tmp_path, CONFIG, 0)
    with pytest.raises(BasisError, match=r"no usable config\.json"):
        compute_basis_from_checkpoint(tmp_path / "nowhere", CONFIG, 0)


def test_basis_round_trip(tmp_path: Path) -> None:
    basis = basis_of(tiny_model())
    save_basis(basis, tmp_path / "run" / "basis.safetensors")
    loaded = load_basis(tmp_path / "run" / "basis.safetensors")
    assert (loaded.id, loaded.kind, loaded.rank, dict(loaded.d_out)) == (
        basis.id,
        "svd",
        3,
        dict(basis.d_out),
    )
    assert all(torch.equal(loaded.a[name], basis.a[name]) for name in basis.modules)
    assert set(loaded.modules) == set(basis.modules)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["basis.safetensors"]


def test_damaged_basis_files_are_refused_in_one_line(tmp_path: Path) -> None:
    basis, path = basis_of(tiny_model()), tmp_path / "basis.safetensors"
    save_basis(basis, path)
    whole = path.read_bytes()
    altered = bytearray(whole)
    altered[-2] ^= 1
    foreign = safetensors.torch.save({"x": torch.zeros(2)})
    for content, message in (
        (whole[: len(whole) // 2], "cannot be read as a basis"),
        (b"", "cannot be read as a basis"),
        (bytes(altered), "altered|not finite"),
        (foreign, "not a basis of format"),
    ):
        path.write_bytes(content)
        with pytest.raises(BasisError, match=message) as caught:
            load_basis(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
