"""Fast weights: the one definition that writer, engine and learner share.

In an adapted matrix W [d_out, d_in] the weight that acts is W + B A (method: TMEM, arXiv 2606.04536, on fast weights; no alpha / r factor).
A [r, d_in] is the *basis*: frozen, computed once from the weights the run starts from. B [d_out, r] is all that an episode writes.

    injector = DeltaInjector(model, basis)
    with injector.use(stack([weights_1, None, weights_3], basis, model.dtype, model.device)):
        model(input_ids)                       # sequence 0 under Delta 1, sequence 1 under the base model, sequence 2 under Delta 3
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from actors.types import FastWeights
from configs.schema import FastWeightsConfig

BasisKind = Literal["svd", "random"]
_FORMAT = "engram-basis-1"
_SUPPORTED = "supported are Llama-like models (Llama, Mistral, Qwen2, Qwen3): model.layers.N.mlp with gate_proj, up_proj, down_proj as nn.Linear"


class BasisError(ValueError):
    """A basis, or fast weights for it, cannot be computed, read or applied. One line: what, where, cure."""


@dataclass(frozen=True, eq=False)
class Basis:
    """The frozen side A of every adapted matrix, by full module name ("model.layers.26.mlp.gate_proj").

    a: float32 [rank, d_in] on the CPU, never requiring grad. d_out: rows of each W. id: hash of kind, rank, names, d_out and the bytes of A; two
    bases with one id are the same basis.
    """

    id: str
    kind: BasisKind
    rank: int
    a: Mapping[str, Tensor]
    d_out: Mapping[str, int]

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.a)

    @property
    def first_layer(self) -> int:
        """Index of the lowest decoder layer that Delta touches: what lies below does not depend on B."""
        return min(int(name.split(".")[2]) for name in self.a)

    @property
    def parameters(self) -> int:
        """Numbers in one revision (528,384 for Qwen3-4B at rank 6 and four layers)."""
        return self.rank * sum(self.d_out.values())


def target_modules(num_layers: int, config: FastWeightsConfig) -> tuple[str, ...]:
    """Full names of the adapted matrices: ``config.projections`` of the last ``config.last_layers`` of ``num_layers`` decoder layers."""
    if config.last_layers > num_layers:
        raise BasisError(f"fast_weights.last_layers={config.last_layers} is not allowed: the model has {num_layers} layers; lower it")
    first = num_layers - config.last_layers
    return tuple(f"model.layers.{layer}.mlp.{projection}" for layer in range(first, num_layers) for projection in config.projections)


def make_basis(kind: BasisKind, a: Mapping[str, Tensor], d_out: Mapping[str, int]) -> Basis:
    """A basis from its matrices (float32 [rank, d_in], one rank for all); derives rank and id. Raises BasisError."""
    frozen = {name: matrix.detach().to("cpu", torch.float32).contiguous() for name, matrix in a.items()}
    ranks = sorted({matrix.shape[0] for matrix in frozen.values()})
    if len(ranks) != 1 or set(a) != set(d_out):
        raise BasisError(f"a basis needs matrices of one rank, each with its d_out: got ranks {ranks}, {len(a)} matrices, {len(d_out)} sizes")
    digest = hashlib.sha256(f"{kind}:{ranks[0]}".encode())
    for name in sorted(frozen):
        if not bool(torch.isfinite(frozen[name]).all()):
            raise BasisError(f"the basis of {name} is not finite: the base weights hold NaN or infinity; use an undamaged checkpoint")
        digest.update(f"|{name}:{d_out[name]}:{tuple(frozen[name].shape)}|".encode())
        digest.update(frozen[name].numpy().tobytes())
    return Basis(id=digest.hexdigest()[:16], kind=kind, rank=ranks[0], a=frozen, d_out={name: int(d_out[name]) for name in frozen})


def compute_basis(weights: Mapping[str, Tensor], config: FastWeightsConfig, seed: int) -> Basis:
    """The basis of the matrices ``weights`` (full module name -> W [d_out, d_in], any float dtype).

    "svd": A = S_r V_r^T of W = U S V^T (the paper's). "random": uniform in +-1/sqrt(d_in), PEFT's default initialisation, from ``seed`` and the
    module's name. Raises BasisError when the rank exceeds a matrix.
    """
    for name, weight in weights.items():
        if weight.ndim != 2 or config.rank > min(weight.shape):
            raise BasisError(f"fast_weights.rank={config.rank} does not fit {name} of shape {tuple(weight.shape)}: lower the rank")
    if config.basis == "svd":
        a = {name: _top_right_factor(weight, config.rank) for name, weight in weights.items()}
    else:
        a = {name: _random_factor(name, weight.shape[1], config.rank, seed) for name, weight in weights.items()}
    return make_basis(config.basis, a, {name: weight.shape[0] for name, weight in weights.items()})


def _top_right_factor(weight: Tensor, rank: int) -> Tensor:
    """S_r V_r^T, exactly, by the eigenvectors of the smaller Gram matrix in float64. Each row's largest entry is positive, so signs are stable."""
    w = weight.detach().to(torch.float64)
    if w.shape[1] <= w.shape[0]:
        squares, vectors = torch.linalg.eigh(w.T @ w)  # ascending; columns are V
        a = squares[-rank:].clamp_min(0).sqrt()[:, None] * vectors[:, -rank:].T
    else:
        _, vectors = torch.linalg.eigh(w @ w.T)  # columns are U, and U_r^T W = S_r V_r^T
        a = vectors[:, -rank:].T @ w
    a = a.flip(0)  # largest singular value first
    peaks = a.gather(1, a.abs().argmax(dim=1, keepdim=True))
    signed: Tensor = a * torch.where(peaks < 0, -1.0, 1.0)
    return signed.float()


def _random_factor(name: str, d_in: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big"))
    return (torch.rand(rank, d_in, generator=generator) * 2 - 1) / math.sqrt(d_in)


def compute_basis_from_checkpoint(model_path: str | os.PathLike[str], config: FastWeightsConfig, seed: int) -> Basis:
    """The basis from a Hugging Face folder. Reads config.json and only the adapted matrices from its safetensors (one file, or shards and index)."""
    folder = Path(model_path)
    try:
        num_layers = int(json.loads((folder / "config.json").read_text())["num_hidden_layers"])
    except (OSError, ValueError, KeyError) as error:
        raise BasisError(f"{folder}: no usable config.json with num_hidden_layers ({error}); give a Hugging Face model folder") from error
    weights: dict[str, Tensor] = {}
    for name, path in _files_of(folder, target_modules(num_layers, config)).items():
        try:
            with safetensors.safe_open(path, framework="pt") as reader:
                weights[name] = reader.get_tensor(f"{name}.weight")
        except (OSError, safetensors.SafetensorError) as error:
            raise BasisError(f"{path}: cannot read {name}.weight ({error}); {_SUPPORTED}") from error
    return compute_basis(weights, config, seed)


def _files_of(folder: Path, modules: Sequence[str]) -> dict[str, Path]:
    """By module, in the order given: the file that holds its weight."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return dict.fromkeys(modules, folder / "model.safetensors")
    try:
        shards: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: folder / shards[f"{name}.weight"] for name in modules}
    except (OSError, ValueError, KeyError) as error:
        raise BasisError(f"{index}: no entry {error}; {_SUPPORTED}") from error


def save_basis(basis: Basis, path: str | os.PathLike[str]) -> None:
    """Write ``basis`` as one safetensors file; readers see the old file or the whole new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": _FORMAT, "id": basis.id, "kind": basis.kind, "rank": str(basis.rank), "d_out": json.dumps(dict(basis.d_out))}
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        safetensors.torch.save_file(dict(basis.a), temporary, metadata=metadata)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def load_basis(path: str | os.PathLike[str]) -> Basis:
    """Read a basis and check format, shapes and id. Raises BasisError for anything else than what ``save_basis`` wrote."""
    cure = "delete it to have the basis computed anew, or restore the file"
    try:
        with safetensors.safe_open(path, framework="pt") as reader:
            metadata: dict[str, str] = reader.metadata() or {}
            a = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise BasisError(f"{path}: cannot be read as a basis ({error}); {cure}") from error
    if metadata.get("format") != _FORMAT:
        raise BasisError(f"{path}: is not a basis of format {_FORMAT} (format {metadata.get('format')!r}); {cure}")
    try:
        kind, d_out = metadata["kind"], {str(name): int(size) for name, size in json.loads(metadata["d_out"]).items()}
        if kind not in ("svd", "random") or set(d_out) != set(a) or any(matrix.ndim != 2 for matrix in a.values()):
            raise ValueError("kind, d_out and matrices do not fit each other")
        basis = make_basis("svd" if kind == "svd" else "random", {name: a[name] for name in d_out}, d_out)
    except (KeyError, ValueError, AttributeError) as error:
        raise BasisError(f"{path}: damaged basis ({error}); {cure}") from error
    if basis.id != metadata.get("id"):
        raise BasisError(f"{path}: its content has id {basis.id}, its label says {metadata.get('id')}: the file was altered; {cure}")
    return basis


def zero(basis: Basis) -> FastWeights:
    """Revision 0: Delta = 0."""
    return FastWeights(basis_id=basis.id, revision=0, b={})


def check(weights: FastWeights, basis: Basis) -> None:
    """Raise BasisError unless ``weights`` belong to ``basis``: same id, every matrix there with shape [d_out, rank], all finite."""
    if weights.basis_id != basis.id:
        raise BasisError(f"fast weights of revision {weights.revision} belong to basis {weights.basis_id}, not {basis.id}: use the run's saved basis")
    if weights.revision == 0:
        return
    if wrong := set(weights.b) ^ set(basis.a):
        raise BasisError(f"fast weights of revision {weights.revision} and basis {basis.id} differ in matrices, first {min(wrong)}")
    for name, matrix in weights.b.items():
        if matrix.shape != (basis.d_out[name], basis.rank):
            raise BasisError(f"B of {name} has shape {matrix.shape}, the basis needs {(basis.d_out[name], basis.rank)}")
        if not np.isfinite(matrix).all():
            raise BasisError(f"B of {name} in revision {weights.revision} is not finite: the write that made it diverged")


def stack(
    weights: Sequence[FastWeights | None], basis: Basis, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The B of n sequences side by side, for ``DeltaInjector.use``: name -> [n, d_out, rank] constants; zeros for None and revision 0.

    In memory each B lies as [rank, d_out]: the products with it, above all the backward's, are several times as quick that way on a CPU.
    When every Delta is 0, ``use(None)`` is the base model itself and costs nothing. Raises BasisError (see ``check``).
    """
    for one in weights:
        if one is not None:
            check(one, basis)
    stacked: dict[str, Tensor] = {}
    for name, rows in basis.d_out.items():
        out = np.zeros((len(weights), basis.rank, rows), dtype=np.float32)
        for index, one in enumerate(weights):
            if one is not None and one.revision > 0:
                out[index] = one.b[name].T
        stacked[name] = torch.from_numpy(out).to(device=device, dtype=dtype).transpose(1, 2)
    return stacked


def add_delta(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y += (x A^T) B^T per sequence, in place: y [n, T, d_out], x [n, T, d_in], a [r, d_in], b [n, d_out, r]; returns y.

    In place, because a second array of y's size costs more time (page faults) than the product itself.
    """
    return y.baddbmm_(x @ a.T, b.transpose(1, 2))


class DeltaInjector:
    """Adds each sequence's Delta inside a Hugging Face causal LM (Llama, Mistral, Qwen2, Qwen3: any with ``basis``' modules as nn.Linear).

    Invariant: without ``use``, and with ``use(None)``, the model is the base model bit for bit (nothing is added). No gradient reaches A; B gets
    one only if the caller's tensors require it; gradients of theta and of the activations are exact.

    Forward hooks on the target modules read the B in force when they run. So with gradient checkpointing, whose backward runs the layers again,
    ``backward()`` must be called inside the ``with``. The hooks never touch the weights, so ZeRO-3's partitioned parameters are fine. One ``use`` at
    a time per model: not for concurrent threads.
    """

    def __init__(self, model: nn.Module, basis: Basis) -> None:
        self._basis = basis
        self._active: Mapping[str, Tensor] | None = None
        self._a: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        modules = dict(model.named_modules())
        for name in basis.modules:
            module = modules.get(name)
            if not isinstance(module, nn.Linear):
                found = "no such module" if module is None else f"a {type(module).__name__}"
                raise BasisError(f"{name}: {found} in {type(model).__name__}; {_SUPPORTED}")
            has, want = (module.out_features, module.in_features), (basis.d_out[name], basis.a[name].shape[1])
            if has != want:
                raise BasisError(f"{name}: the model has {has}, basis {basis.id} {want}: it is another model's basis")
        self._handles = [modules[name].register_forward_hook(self._hook(name)) for name in basis.modules]

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._active is None:
                return None
            x, b = args[0], self._active[name]
            if x.ndim != 3 or b.shape[0] != x.shape[0]:
                raise BasisError(f"{name}: fast weights of {b.shape[0]} sequences met activations of shape {tuple(x.shape)}; one Delta per batch row")
            return add_delta(output, x, self._constant(name, x), b.to(device=x.device, dtype=x.dtype))

        return add

    def _constant(self, name: str, like: Tensor) -> Tensor:
        key = (name, like.device, like.dtype)
        if key not in self._a:
            self._a[key] = self._basis.a[name].to(device=like.device, dtype=like.dtype)
        return self._a[key]

    @contextmanager
    def use(self, stacked: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Inside, batch row i acts under ``stacked``[:, i] (name -> [n, d_out, rank]); None is the base model. May be nested: the inner one acts."""
        if stacked is not None and set(stacked) != set(self._basis.a):
            raise BasisError(f"stacked fast weights hold {len(stacked)} matrices, basis {self._basis.id} has {len(self._basis.a)}")
        before, self._active = self._active, stacked
        try:
            yield
        finally:
            self._active = before

    def remove(self) -> None:
        """Take the hooks off; the model is as it was."""
        for handle in self._handles:
            handle.remove()
