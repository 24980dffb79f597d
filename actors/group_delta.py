"""The two products of a Delta on a flat stream of groups, each under fast weights of its own, differentiable: A x, and base + B (A x).

Group g is tokens ``offsets[g]:offsets[g + 1]``; the groups cover the stream.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class _AddDelta(torch.autograd.Function):
    """base + (shrunk_g B_g^T for each group g): base [n, d_out], shrunk [n, rank], b [G, d_out, rank], group g at offsets[g]:offsets[g + 1]."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, shrunk: Tensor, b: Tensor, offsets: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(shrunk, b)
        ctx.offsets = offsets
        out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
        for group, (start, end) in enumerate(pairwise(offsets)):
            torch.addmm(base[start:end], shrunk[start:end], b[group].T, out=out[start:end])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        grad, (shrunk, b), offsets = gradients[0], ctx.saved_tensors, ctx.offsets
        grad_shrunk, grad_b = torch.empty_like(shrunk), torch.empty_like(b)
        for group, (start, end) in enumerate(pairwise(offsets)):
            torch.mm(grad[start:end], b[group], out=grad_shrunk[start:end])
            torch.mm(grad[start:end].T, shrunk[start:end], out=grad_b[group])
        return grad, grad_shrunk, grad_b, None


def add_grouped(base: Tensor, shrunk: Tensor, b: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """base + (shrunk_g B_g^T for each group g) [n, d_out]: base [n, d_out], shrunk [n, rank], b [G, d_out, rank]."""
    added: Tensor = _AddDelta.apply(base, shrunk, b, offsets)
    return added


def shrink_grouped(x: Tensor, a: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """x_g A_g^T for each group g [n, rank]: x [n, d_in], a [G, rank, d_in]. For the ablation that trains A: plain autograd is quick enough."""
    return torch.cat([x[start:end] @ own.T for own, (start, end) in zip(a.unbind(0), pairwise(offsets), strict=True)])
