"""Fast weights: the one definition that writer, engine and learner share.

In an adapted matrix W [d_out, d_in] the weight that acts is W + B A (method: TMEM, arXiv 2606.04536, on fast weights; no alpha / r factor).
A [r, d_in] is the *basis*: frozen, computed once from the weights the run starts from. B [d_out, r] is all that an episode writes.
(fast_weights.train_a, an ablation: writes move A too, from the basis on, and each revision carries its own.)

    injector = DeltaInjector(model, basis)
    with injector.use(stack([weights_1, None, weights_3], basis, model.dtype, model.device)):
        model(input_ids)                       # sequence 0 under Delta 1, sequence 1 under the base model, sequence 2 under Delta 3
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from actors.fast_weights.sensitivity import Sensitivity
from actors.types import FastWeights

BasisKind = Literal["svd", "unit_svd", "random", "data"]
SUPPORTED = "supported are Llama-like models (Llama, Mistral, Qwen2, Qwen3): model.layers.N.mlp with gate_proj, up_proj, down_proj as nn.Linear"


class BasisError(ValueError):
    """A basis, or fast weights for it, cannot be computed, read or applied. One line: what, where, cure."""


@dataclass(frozen=True, eq=False)
class Basis:
    """The frozen side A of every adapted matrix, by full module name ("model.layers.26.mlp.gate_proj").

    a: float32 [rank, d_in] on the CPU, never requiring grad. d_out: rows of each W. train_a: a write moves A too, so that every revision but 0 has
    its own. id: hash of kind, rank, train_a, names, d_out and the bytes of A, and of the sensitivity where it was measured; two bases with one id are
    the same basis. sensitivity: of every matrix, for write.optimizer=natural, or empty.
    """

    id: str
    kind: BasisKind
    rank: int
    a: Mapping[str, Tensor]
    d_out: Mapping[str, int]
    train_a: bool
    sensitivity: Mapping[str, Sensitivity] = field(default_factory=dict)

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
        own = sum(matrix.shape[1] for matrix in self.a.values()) if self.train_a else 0
        return self.rank * (sum(self.d_out.values()) + own)


@dataclass(frozen=True, slots=True, eq=False)
class StackedWeights:
    """The fast weights of n sequences side by side, by module. b: [n, d_out, rank]. a: [n, rank, d_in]; empty where A is the basis' for all."""

    b: Mapping[str, Tensor]
    a: Mapping[str, Tensor]


def zero(basis: Basis) -> FastWeights:
    """Revision 0: Delta = 0."""
    return FastWeights(basis_id=basis.id, revision=0, b={})


def check(weights: FastWeights, basis: Basis) -> None:
    """Raise BasisError unless ``weights`` belong to ``basis``: same id, every matrix there with its shape, all finite, A where writes move it."""
    if weights.basis_id != basis.id:
        raise BasisError(
            f"fast weights of revision {weights.revision} belong to basis {weights.basis_id}, not {basis.id}: use the run's saved basis"
        )
    if weights.revision == 0:
        return
    if wrong := set(weights.b) ^ set(basis.a):
        raise BasisError(
            f"fast weights of revision {weights.revision} and basis {basis.id} differ in matrices, first {min(wrong)}"
        )
    if (len(weights.a) > 0) != basis.train_a:
        has, wants = ("its own A", "frozen") if weights.a else ("no A of its own", "moved by writes")
        raise BasisError(
            f"fast weights of revision {weights.revision} have {has}, A of basis {basis.id} is {wants} (fast_weights.train_a)"
        )
    for side, matrices in (("B", weights.b), ("A", weights.a)):
        for name, matrix in matrices.items():
            needed = (basis.d_out[name], basis.rank) if side == "B" else tuple(basis.a[name].shape)
            if matrix.shape != needed:
                raise BasisError(f"{side} of {name} has shape {matrix.shape}, the basis needs {needed}")
            if not np.isfinite(matrix).all():
                raise BasisError(
                    f"{side} of {name} in revision {weights.revision} is not finite: the write that made it diverged"
                )


def stack(
    weights: Sequence[FastWeights | None],
    basis: Basis,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StackedWeights:
    """The fast weights of n sequences as constants, for ``DeltaInjector.use``. None and revision 0: B is zero, A the basis' (where writes move A).

    In memory each B lies as [rank, d_out]: the products with it, above all the backward's, are several times as quick that way on a CPU.
    When every Delta is 0, ``use(None)`` is the base model itself and costs nothing. Raises BasisError (see ``check``).
    """
    for one in weights:
        if one is not None:
            check(one, basis)
    b: dict[str, Tensor] = {}
    for name, rows in basis.d_out.items():
        out = np.zeros((len(weights), basis.rank, rows), dtype=np.float32)
        for index, one in enumerate(weights):
            if one is not None and one.revision > 0:
                out[index] = one.b[name].T
        b[name] = torch.from_numpy(out).to(device=device, dtype=dtype).transpose(1, 2)
    a: dict[str, Tensor] = {}
    for name, shared in basis.a.items() if basis.train_a else ():
        own = [shared if one is None or one.revision == 0 else torch.tensor(one.a[name]) for one in weights]
        a[name] = torch.stack(own).to(device=device, dtype=dtype)
    return StackedWeights(b, a)


def add_delta(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y += (x A^T) B^T per sequence, in place: y [n, T, d_out], x [n, T, d_in], a [r, d_in] or [n, r, d_in], b [n, d_out, r]; returns y.

    In place, because a second array of y's size costs more time (page faults) than the product itself.
    """
    return y.baddbmm_(x @ a.mT, b.transpose(1, 2))


class DeltaInjector:
    """Adds each sequence's Delta inside a Hugging Face causal LM (Llama, Mistral, Qwen2, Qwen3: any with ``basis``' modules as nn.Linear).

    Invariant: without ``use``, and with ``use(None)``, the model is the base model bit for bit (nothing is added). No gradient reaches the basis; B
    (and an A of its own) gets one only if the caller's tensors require it; gradients of theta and of the activations are exact.

    Forward hooks on the target modules read the B in force when they run. So with gradient checkpointing, whose backward runs the layers again,
    ``backward()`` must be called inside the ``with``. The hooks never touch the weights, so ZeRO-3's partitioned parameters are fine. One ``use`` at
    a time per model: not for concurrent threads.
    """

    def __init__(self, model: nn.Module, basis: Basis) -> None:
        self._basis = basis
        self._active: StackedWeights | None = None
        self._a: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        modules = dict(model.named_modules())
        for name in basis.modules:
            module = modules.get(name)
            if not isinstance(module, nn.Linear):
                found = "no such module" if module is None else f"a {type(module).__name__}"
                raise BasisError(f"{name}: {found} in {type(model).__name__}; {SUPPORTED}")
            has, want = (module.out_features, module.in_features), (basis.d_out[name], basis.a[name].shape[1])
            if has != want:
                raise BasisError(
                    f"{name}: the model has {has}, basis {basis.id} {want}: it is another model's basis"
                )
        self._handles = [modules[name].register_forward_hook(self._hook(name)) for name in basis.modules]

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._active is None:
                return None
            x, b = args[0], self._active.b[name]
            if x.ndim != 3 or b.shape[0] != x.shape[0]:
                raise BasisError(
                    f"{name}: fast weights of {b.shape[0]} sequences met activations of shape {tuple(x.shape)}; one Delta per batch row"
                )
            own = self._active.a.get(name)
            a = self._constant(name, x) if own is None else own.to(device=x.device, dtype=x.dtype)
            return add_delta(output, x, a, b.to(device=x.device, dtype=x.dtype))

        return add

    def _constant(self, name: str, like: Tensor) -> Tensor:
        key = (name, like.device, like.dtype)
        if key not in self._a:
            self._a[key] = self._basis.a[name].to(device=like.device, dtype=like.dtype)
        return self._a[key]

    @contextmanager
    def use(self, stacked: StackedWeights | None) -> Iterator[None]:
        """Inside, batch row i acts under row i of ``stacked``; None is the base model. May be nested: the inner one acts."""
        if stacked is not None and (
            set(stacked.b) != set(self._basis.a)
            or set(stacked.a) != (set(self._basis.a) if self._basis.train_a else set())
        ):
            raise BasisError(
                f"stacked fast weights hold {len(stacked.b)} B and {len(stacked.a)} A, basis {self._basis.id} has {len(self._basis.a)} matrices, "
                f"train_a={self._basis.train_a}"
            )
        before, self._active = self._active, stacked
        try:
            yield
        finally:
            self._active = before

    def remove(self) -> None:
        """Take the hooks off; the model is as it was."""
        for handle in self._handles:
            handle.remove()
