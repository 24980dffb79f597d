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
    return torch.cat(
        [x[start:end] @ own.T for own, (start, end) in zip(a.unbind(0), pairwise(offsets), strict=True)]
    )


_HEAD_WORDS = 4096
_HEAD_TOKENS = 256  # logits of one block: 50 MB at a vocabulary of 49k, 155 MB at 152k (float32)


@torch.no_grad()
def head_pass(
    states: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Log-probs float32 [A] of ``targets`` and, with ``weights`` [A], the gradient [A, d] of -sum(weights * log-probs) with respect to ``states``.

    states [A, d], head [V, d]. softmax(z) - onehot is formed in the memory of the logits z, so they exist for one block at a time.
    """
    logprobs = torch.empty(len(states), dtype=torch.float32, device=states.device)
    gradient = torch.empty_like(states) if weights is not None else None
    for start in range(0, len(states), _HEAD_TOKENS):
        block = slice(start, min(start + _HEAD_TOKENS, len(states)))
        picked = targets[block, None]
        z = (states[block] @ head.T).float()
        z -= z.amax(dim=-1, keepdim=True)
        chosen = z.gather(-1, picked)
        total = z.exp_().sum(dim=-1, keepdim=True)
        logprobs[block] = (chosen - total.log()).squeeze(-1)
        if weights is not None and gradient is not None:
            scale = weights[block, None].to(z.device)
            z *= scale / total
            z.scatter_add_(-1, picked, -scale)
            gradient[block] = _summed_by_blocks(z.to(states.dtype), head)
    return logprobs, gradient


def _summed_by_blocks(z: Tensor, head: Tensor) -> Tensor:
    """z [n, V] @ head [V, d] as a sum over blocks of the vocabulary: one float32 product over 49k terms of few rows is only good to 2e-4."""
    parts = [
        z[:, start : start + _HEAD_WORDS] @ head[start : start + _HEAD_WORDS]
        for start in range(0, head.shape[0], _HEAD_WORDS)
    ]
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total
