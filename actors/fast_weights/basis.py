"""Computes the basis, A [r, d_in] of every adapted matrix, and keeps it in a file.

    model folder --> weights of the adapted matrices --> A --> Basis <--> basis.safetensors
                     (basis=data: also input_moments.py)       (sensitivity_rank > 0: also sensitivity.py)

A basis is computed once, from the weights that a run starts from, and frozen.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from actors.fast_weights.delta import SUPPORTED, Basis, BasisError, BasisKind
from actors.fast_weights.input_moments import input_moments, own_sensitivity
from actors.fast_weights.sensitivity import Sensitivity
from configs.files import FileError, parse_json, read_json, write_bytes
from configs.schema import FastWeightsConfig

_FORMAT = "engram-basis-1"
_SENSITIVITY = "sensitivity."


def target_modules(num_layers: int, config: FastWeightsConfig) -> tuple[str, ...]:
    """Names of the adapted matrices: ``config.projections`` of the last ``config.last_layers`` layers."""
    if config.last_layers > num_layers:
        raise BasisError(
            f"fast_weights.last_layers={config.last_layers} is not allowed: "
            f"the model has {num_layers} layers; lower it"
        )
    first = num_layers - config.last_layers
    return tuple(
        f"model.layers.{layer}.mlp.{projection}"
        for layer in range(first, num_layers)
        for projection in config.projections
    )


def make_basis(kind: BasisKind, a: Mapping[str, Tensor], d_out: Mapping[str, int], train_a: bool) -> Basis:
    """A basis of matrices ``a`` [rank, d_in] of one rank; derives rank and id. Raises BasisError."""
    frozen = {name: matrix.detach().to("cpu", torch.float32).contiguous() for name, matrix in a.items()}
    ranks = sorted({matrix.shape[0] for matrix in frozen.values()})
    if len(ranks) != 1 or set(a) != set(d_out):
        raise BasisError(
            f"a basis needs matrices of one rank, each with its d_out: "
            f"got ranks {ranks}, {len(a)} matrices, {len(d_out)} sizes"
        )
    digest = hashlib.sha256(f"{kind}:{ranks[0]}{':train_a' if train_a else ''}".encode())
    for name in sorted(frozen):
        if not bool(torch.isfinite(frozen[name]).all()):
            raise BasisError(
                f"the basis of {name} is not finite: "
                "the base weights hold NaN or infinity; use an undamaged checkpoint"
            )
        digest.update(f"|{name}:{d_out[name]}:{tuple(frozen[name].shape)}|".encode())
        digest.update(frozen[name].numpy().tobytes())
    sizes = {name: int(d_out[name]) for name in frozen}
    return Basis(id=digest.hexdigest()[:16], kind=kind, rank=ranks[0], a=frozen, d_out=sizes, train_a=train_a)


def compute_basis(
    weights: Mapping[str, Tensor],
    config: FastWeightsConfig,
    seed: int,
    moments: Mapping[str, Tensor] | None = None,
) -> Basis:
    """The basis of the matrices ``weights`` (full module name -> W [d_out, d_in], any float dtype).

    svd       A = S_r V_r^T of W = U S V^T: the paper's
    unit_svd  V_r^T, which shows what S does
    random    uniform in +-1/sqrt(d_in), PEFT's default initialisation, from ``seed`` and the module's name
    data      the top directions of the layers' inputs (EVA, arXiv 2410.07170), from ``moments``, see
              ``input_moments``. All matrices keep ``config.rank``: EVA's redistribution of ranks is left out.

    Raises BasisError when the rank exceeds a matrix, or "data" has no moments.
    """
    for name, weight in weights.items():
        if weight.ndim != 2 or config.rank > min(weight.shape):
            raise BasisError(
                f"fast_weights.rank={config.rank} does not fit {name} of shape {tuple(weight.shape)}: "
                "lower the rank"
            )
    if config.basis == "data":
        if moments is None:
            raise BasisError(
                "fast_weights.basis=data needs a model that reads fast_weights.calibration_path: "
                "weights alone do not do"
            )
        a = {
            name: _data_factor(moments[name], _top_right_factor(weight, config.rank))
            for name, weight in weights.items()
        }
    elif config.basis in ("svd", "unit_svd"):
        a = {name: _top_right_factor(weight, config.rank) for name, weight in weights.items()}
        if config.basis == "unit_svd":
            a = {name: functional.normalize(matrix, dim=1) for name, matrix in a.items()}
    else:
        a = {
            name: _random_factor(name, weight.shape[1], config.rank, seed) for name, weight in weights.items()
        }
    d_out = {name: weight.shape[0] for name, weight in weights.items()}
    return make_basis(config.basis, a, d_out, config.train_a)


def _top_right_factor(weight: Tensor, rank: int) -> Tensor:
    """S_r V_r^T, exactly, by the eigenvectors of the smaller Gram matrix in float64."""
    w = weight.detach().to(torch.float64)
    if w.shape[1] <= w.shape[0]:
        squares, vectors = torch.linalg.eigh(w.T @ w)  # ascending; columns are V
        a = squares[-rank:].clamp_min(0).sqrt()[:, None] * vectors[:, -rank:].T
    else:
        _, vectors = torch.linalg.eigh(w @ w.T)  # columns are U, and U_r^T W = S_r V_r^T
        a = vectors[:, -rank:].T @ w
    return _signed(a.flip(0)).float()  # largest singular value first


def _signed(a: Tensor) -> Tensor:
    """Each row with the sign that makes its largest entry positive: eigenvectors come with either sign."""
    peaks = a.gather(1, a.abs().argmax(dim=1, keepdim=True))
    signed: Tensor = a * torch.where(peaks < 0, -1.0, 1.0)
    return signed


def _data_factor(moment: Tensor, svd: Tensor) -> Tensor:
    """c V_r^T, V_r the top eigenvectors of the inputs' second moment [d_in, d_in].

    c makes the sum of |A x|^2 over the inputs that of ``svd``, the paper's A. Why: a step of SGD on B adds
    -lr g |A x|^2 to the layer's output for x, so with this c one learning rate fits both bases. This is our
    choice: EVA leaves the directions at unit length, for which the paper's rate is far too low. Exact, by a
    float64 eigh: minutes where d_in is near 10,000.
    """
    _, vectors = torch.linalg.eigh(moment)  # ascending
    directions = vectors[:, -svd.shape[0] :].T.flip(0)
    energy, wanted = ((a @ moment * a).sum() for a in (directions, svd.double()))
    return (_signed(directions) * (wanted / energy).sqrt()).float()


def _random_factor(name: str, d_in: int, rank: int, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return (torch.rand(rank, d_in, generator=generator) * 2 - 1) / math.sqrt(d_in)


@dataclass(frozen=True)
class _ModelConfig:
    """What is read of a Hugging Face folder's config.json."""

    num_hidden_layers: int


@dataclass(frozen=True)
class _ShardIndex:
    """What is read of a sharded folder's index. weight_map: the file of each tensor."""

    weight_map: dict[str, str]


def compute_basis_from_checkpoint(
    model_path: str | os.PathLike[str], config: FastWeightsConfig, seed: int
) -> Basis:
    """The basis of a Hugging Face folder. Raises BasisError.

    Reads config.json, and of the safetensors (one file, or shards and an index) the adapted matrices alone.
    The whole model is loaded for basis=data, which reads the calibration text, and for a sensitivity.
    """
    folder = Path(model_path)
    try:
        num_layers = read_json(folder / "config.json", _ModelConfig).num_hidden_layers
    except (OSError, FileError) as error:
        raise BasisError(
            f"{folder}: no usable config.json with num_hidden_layers ({error}); "
            "give a Hugging Face model folder"
        ) from error
    weights: dict[str, Tensor] = {}
    for name, path in _files_of(folder, target_modules(num_layers, config)).items():
        try:
            with safetensors.safe_open(path, framework="pt") as reader:
                weights[name] = reader.get_tensor(f"{name}.weight")
        except (OSError, safetensors.SafetensorError) as error:
            raise BasisError(f"{path}: cannot read {name}.weight ({error}); {SUPPORTED}") from error
    moments = None
    if config.basis == "data":
        moments = input_moments(folder, tuple(weights), config.calibration_path)
    basis = compute_basis(weights, config, seed, moments)
    if config.sensitivity_rank == 0:
        return basis
    return with_sensitivity(basis, own_sensitivity(folder, basis, config.sensitivity_rank, seed))


def with_sensitivity(basis: Basis, sensitivity: Mapping[str, Sensitivity]) -> Basis:
    """The same A with a sensitivity, under an id of its own.

    Raises BasisError for shapes that do not fit, and for numbers that are not finite or not float32.
    """
    digest = hashlib.sha256(basis.id.encode())
    for name, rows in basis.d_out.items():
        parts = sensitivity[name].parts()
        directions, inverse, read = parts.values()
        kept = directions.shape[-1] if directions.ndim else 0
        expected = [(rows, kept), (kept + 1,), (basis.rank, basis.rank)]
        shapes = [tuple(part.shape) for part in (directions, inverse, read)]
        if shapes != expected:
            raise BasisError(f"the sensitivity of {name} does not fit its matrix: shapes {shapes}")
        for part in parts.values():
            if part.dtype != torch.float32:
                raise BasisError(
                    f"the sensitivity of {name} is {str(part.dtype).removeprefix('torch.')}; "
                    "it must be float32"
                )
            if not bool(torch.isfinite(part).all()):
                raise BasisError(
                    f"the sensitivity of {name} is not finite: "
                    "the base model gives NaN or infinity; use an undamaged checkpoint"
                )
            digest.update(part.numpy().tobytes())
    return replace(basis, id=digest.hexdigest()[:16], sensitivity=dict(sensitivity))


def _files_of(folder: Path, modules: Sequence[str]) -> dict[str, Path]:
    """The file that holds each module's weight, in the order of ``modules``."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return dict.fromkeys(modules, folder / "model.safetensors")
    try:
        shards = read_json(index, _ShardIndex).weight_map
        return {name: folder / shards[f"{name}.weight"] for name in modules}
    except KeyError as error:
        raise BasisError(f"{index}: no entry {error}; {SUPPORTED}") from error
    except (OSError, FileError) as error:
        raise BasisError(f"{error}; {SUPPORTED}") from error


def save_basis(basis: Basis, path: str | os.PathLike[str]) -> None:
    """Write ``basis`` as one safetensors file. Readers see the old file or the whole new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": _FORMAT,
        "id": basis.id,
        "kind": basis.kind,
        "rank": str(basis.rank),
        "d_out": json.dumps(dict(basis.d_out)),
        "train_a": json.dumps(basis.train_a),
    }
    parts = {
        f"{_SENSITIVITY}{part}.{name}": tensor
        for name, sensitivity in basis.sensitivity.items()
        for part, tensor in sensitivity.parts().items()
    }
    write_bytes(target, safetensors.torch.save({**basis.a, **parts}, metadata=metadata))


def load_basis(path: str | os.PathLike[str]) -> Basis:
    """Read a basis that ``save_basis`` wrote; check format, shapes and id. Raises BasisError."""
    cure = "delete it to have the basis computed anew, or restore the file"
    try:
        tensors, metadata = read_safetensors(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise BasisError(f"{path}: cannot be read as a basis ({error}); {cure}") from error
    if metadata.get("format") != _FORMAT:
        raise BasisError(
            f"{path}: is not a basis of format {_FORMAT} (format {metadata.get('format')!r}); {cure}"
        )
    try:
        basis = _unpack(tensors, metadata)
    except (KeyError, ValueError, AttributeError) as error:
        raise BasisError(f"{path}: damaged basis ({error}); {cure}") from error
    if basis.id != metadata.get("id"):
        raise BasisError(
            f"{path}: its content has id {basis.id}, its label says {metadata.get('id')}: "
            f"the file was altered; {cure}"
        )
    return basis


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, and its metadata. Raises OSError, SafetensorError."""
    with safetensors.safe_open(path, framework="pt") as reader:
        metadata: dict[str, str] = reader.metadata() or {}
        return {name: reader.get_tensor(name) for name in reader.keys()}, metadata  # noqa: SIM118


def _unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Basis:
    """The basis of a file's content, by ``save_basis``. Raises KeyError, ValueError."""
    a = {name: tensor for name, tensor in tensors.items() if not name.startswith(_SENSITIVITY)}
    kinds: dict[str, BasisKind] = {kind: kind for kind in get_args(BasisKind)}
    kind, d_out = metadata["kind"], parse_json(metadata["d_out"], dict[str, int])
    if kind not in kinds or set(d_out) != set(a) or any(matrix.ndim != 2 for matrix in a.values()):
        raise ValueError("kind, d_out and matrices do not fit each other")
    in_order = {name: a[name] for name in d_out}
    basis = make_basis(kinds[kind], in_order, d_out, train_a=metadata.get("train_a") == "true")
    if len(tensors) == len(a):
        return basis
    sensitivity = {
        name: Sensitivity(*(tensors[f"{_SENSITIVITY}{part}.{name}"] for part in Sensitivity.PARTS))
        for name in a
    }
    return with_sensitivity(basis, sensitivity)
