"""Fast weights: the one definition that writer, engine and learner share.

In an adapted matrix W [d_out, d_in] the weight that acts is W + B A, without PEFT's factor alpha / r (method:
TMEM, arXiv 2606.04536, on fast weights). A [r, d_in] is the *basis*: frozen, computed once from the weights
that the run starts from. B [d_out, r] is all that an episode writes.
With fast_weights.train_a, an ablation, writes move A too: each revision starts from the basis and carries its
own A.

    injector = DeltaInjector(model, basis)
    with injector.use(stack([weights_1, None, weights_3], basis, model.dtype, model.device)):
        model(input_ids)    # sequence 0 under Delta 1, 1 under the base model, 2 under Delta 3
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from actors.fast_weights.sensitivity import Sensitivity
from actors.types import FastWeights

BasisKind = Literal["svd", "unit_svd", "random", "data"]
SUPPORTED = (
    "supported are Llama-like models (Llama, Mistral, Qwen2, Qwen3): "
    "model.layers.N.mlp with gate_proj, up_proj, down_proj as nn.Linear"
)


class BasisError(ValueError):
    """A basis, or fast weights for it, cannot be computed, read or applied. One line: what, where, cure."""


@dataclass(frozen=True, eq=False)
class Basis:
    """The frozen side A of every adapted matrix, by full module name ("model.layers.26.mlp.gate_proj").

    id: a hash of kind, rank, train_a, names, d_out, the bytes of A, and the sensitivity where it was
    measured. Two bases with one id are the same basis.
    a: float32 [rank, d_in] on the CPU, never requiring grad. d_out: rows of each W.
    train_a: a write moves A too, so every revision but 0 has its own.
    sensitivity: of every matrix, for write.optimizer=natural; or empty.
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
        """Index of the lowest decoder layer that Delta touches. The layers below it do not depend on B."""
        return min(int(name.split(".")[2]) for name in self.a)

    @property
    def parameters(self) -> int:
        """Numbers in one revision (528,384 for Qwen3-4B at rank 6 and four layers)."""
        own = sum(matrix.shape[1] for matrix in self.a.values()) if self.train_a else 0
        return self.rank * (sum(self.d_out.values()) + own)


@dataclass(frozen=True, slots=True, eq=False)
class StackedWeights:
    """The fast weights of n sequences side by side, by module.

    b: [n, d_out, rank]. a: [n, rank, d_in]; empty where A is the basis for all.
    """

    b: Mapping[str, Tensor]
    a: Mapping[str, Tensor]

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """All B, then all A."""
        return (*self.b.values(), *self.a.values())

    def map(self, function: Callable[[Tensor], Tensor]) -> StackedWeights:
        """The same with ``function`` of every matrix."""
        b, a = ({name: function(matrix) for name, matrix in side.items()} for side in (self.b, self.a))
        return StackedWeights(b, a)


def zero(basis: Basis) -> FastWeights:
    """Revision 0: Delta = 0."""
    return FastWeights(basis_id=basis.id, revision=0, b={})


def check(weights: FastWeights, basis: Basis) -> None:
    """Raise BasisError unless ``weights`` belong to ``basis``.

    They need the basis' id, every matrix with its shape, finite numbers, and an A of their own where writes
    move A.
    """
    subject = f"fast weights of revision {weights.revision}"
    if weights.basis_id != basis.id:
        raise BasisError(
            f"{subject} belong to basis {weights.basis_id}, not {basis.id}: use the run's saved basis"
        )
    if weights.revision == 0:
        return
    if wrong := set(weights.b) ^ set(basis.a):
        raise BasisError(f"{subject} and basis {basis.id} differ in matrices, first {min(wrong)}")
    if (len(weights.a) > 0) != basis.train_a:
        has, wants = ("its own A", "frozen") if weights.a else ("no A of its own", "moved by writes")
        raise BasisError(f"{subject} have {has}, A of basis {basis.id} is {wants} (fast_weights.train_a)")
    for side, matrices in (("B", weights.b), ("A", weights.a)):
        for name, matrix in matrices.items():
            needed = (basis.d_out[name], basis.rank) if side == "B" else tuple(basis.a[name].shape)
            if matrix.shape != needed:
                raise BasisError(f"{side} of {name} has shape {matrix.shape}, the basis needs {needed}")
            if not np.isfinite(matrix).all():
                raise BasisError(
                    f"{side} of {name} in revision {weights.revision} is not finite: "
                    "the write that made it diverged"
                )


def stack(
    weights: Sequence[FastWeights | None],
    basis: Basis,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StackedWeights:
    """The fast weights of n sequences as constants, for ``DeltaInjector.use``.

    None and revision 0 get a B of zeros, and the basis as A where writes move A. When every Delta is 0,
    prefer ``use(None)``: it is the base model itself and costs nothing. Raises BasisError (see ``check``).
    """
    for revision in weights:
        if revision is not None:
            check(revision, basis)
    b: dict[str, Tensor] = {}
    for name, rows in basis.d_out.items():
        # Each B lies in memory as [rank, d_out]: on a CPU its products, above all the backward's, are then
        # several times as quick.
        out = np.zeros((len(weights), basis.rank, rows), dtype=np.float32)
        for index, revision in enumerate(weights):
            if revision is not None and revision.revision > 0:
                out[index] = revision.b[name].T
        b[name] = torch.from_numpy(out).to(device=device, dtype=dtype).transpose(1, 2)
    a: dict[str, Tensor] = {}
    for name, shared in basis.a.items() if basis.train_a else ():
        own = [
            shared if revision is None or revision.revision == 0 else torch.tensor(revision.a[name])
            for revision in weights
        ]
        a[name] = torch.stack(own).to(device=device, dtype=dtype)
    return StackedWeights(b, a)


def add_delta(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y += (x A^T) B^T per sequence, in place; returns y.

    y [n, T, d_out], x [n, T, d_in], a [r, d_in] or [n, r, d_in], b [n, d_out, r].
    """
    # In place, because a second array of y's size costs more time (page faults) than the product itself.
    return y.baddbmm_(x @ a.mT, b.transpose(1, 2))


class DeltaInjector:
    """Adds each sequence's Delta inside a Hugging Face causal LM that has the basis' modules as nn.Linear.

    Invariant: without ``use``, and with ``use(None)``, the model is the base model bit for bit: nothing is
    added. No gradient reaches the basis. B (and a revision's own A) gets one only if the caller's tensors
    require it. Gradients of theta and of the activations are exact.

    Forward hooks on the target modules read the B in force when they run. Gradient checkpointing runs the
    layers again in the backward pass, so call ``backward()`` inside the ``with``. The hooks never touch the
    weights, so ZeRO-3's partitioned parameters are fine. One ``use`` at a time per model: not for concurrent
    threads.
    """

    def __init__(self, model: nn.Module, basis: Basis) -> None:
        self._basis = basis
        self._active: StackedWeights | None = None
        self._a: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        modules = dict(model.named_modules())
        for name in basis.modules:
            module = modules.get(name)
            module = getattr(module, "base_layer", module)  # inside PEFT's, where theta itself is a LoRA
            if not isinstance(module, nn.Linear):
                fault = "no such module" if module is None else f"a {type(module).__name__}"
                raise BasisError(f"{name}: {fault} in {type(model).__name__}; {SUPPORTED}")
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
                    f"{name}: fast weights of {b.shape[0]} sequences met activations of shape "
                    f"{tuple(x.shape)}; one Delta per batch row"
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
        """Inside, batch row i acts under row i of ``stacked``; None is the base model.

        May be nested: the inner call is in force. Raises BasisError for matrices that are not the basis'.
        """
        names = set(self._basis.a)
        own_a = names if self._basis.train_a else set()
        if stacked is not None and (set(stacked.b) != names or set(stacked.a) != own_a):
            raise BasisError(
                f"stacked fast weights hold {len(stacked.b)} B and {len(stacked.a)} A, "
                f"basis {self._basis.id} has {len(names)} matrices, train_a={self._basis.train_a}"
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
