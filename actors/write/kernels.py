"""The products of a write that the library has no function for, each with its gradient.

    shrink_grouped   A x, each group under its own A           for the ablation that trains A
    add_grouped      base + B (A x), each group under its own B
    head_pass        log-probs of the answers, and the gradient of their cross-entropy, without the logits
    kl_pass          KL to given distributions, and its gradient, without the logits

A stream [n, d] holds groups one behind the other: group g is tokens ``offsets[g]:offsets[g + 1]``, and the
groups cover the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_HEAD_WORDS = 4096
_HEAD_TOKENS = 256  # logits of one block: 50 MB at a vocabulary of 49k, 155 MB at 152k (float32)


class _AddDelta(torch.autograd.Function):
    """See ``add_grouped``. One autograd node writes the groups into one output: nothing is concatenated."""

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
    """base + shrunk_g B_g^T of each group g: base [n, d_out], shrunk [n, rank], b [G, d_out, rank]."""
    added: Tensor = _AddDelta.apply(base, shrunk, b, offsets)
    return added


def shrink_grouped(x: Tensor, a: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """x_g A_g^T of each group g, as [n, rank]: x [n, d_in], a [G, rank, d_in]."""
    return torch.cat(
        [x[start:end] @ own.T for own, (start, end) in zip(a.unbind(0), pairwise(offsets), strict=True)]
    )


@torch.no_grad()
def head_pass(
    states: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None, most: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """Log-probs float32 [A] of ``targets``, given states [A, d] and head [V, d].

    With ``weights`` [A] also the gradient [A, d] of -sum(weights * log-probs) with respect to ``states``. The
    sum is over the tokens whose log-prob is at most ``most``.
    """
    logprobs = torch.empty(len(states), dtype=torch.float32, device=states.device)
    gradient = torch.empty_like(states) if weights is not None else None
    for start in range(0, len(states), _HEAD_TOKENS):
        block = slice(start, min(start + _HEAD_TOKENS, len(states)))
        target = targets[block, None]
        z = (states[block] @ head.T).float()
        z -= z.amax(dim=-1, keepdim=True)
        chosen = z.gather(-1, target)
        total = z.exp_().sum(dim=-1, keepdim=True)
        logprobs[block] = (chosen - total.log()).squeeze(-1)
        if weights is not None and gradient is not None:
            # softmax(z) - onehot is formed in the memory of z, so logits exist for one block at a time.
            scale = (weights.to(z.device)[block] * (logprobs[block] <= most))[:, None]
            z *= scale / total
            z.scatter_add_(-1, target, -scale)
            gradient[block] = _summed_by_blocks(z.to(states.dtype), head)
    return logprobs, gradient


@torch.no_grad()
def kl_pass(states: Tensor, head: Tensor, base: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """KL(base || now) float32 [A] in nats, and the gradient [A, d] of sum(weights * KL) by ``states``.

    states [A, d] and head [V, d] give the distributions now. base: log-probs float32 [a, V], A rows in all.
    By the logits z, the gradient of KL(p || softmax(z)) is softmax(z) - p.
    """
    kl = torch.empty(len(states), dtype=torch.float32, device=states.device)
    gradient = torch.empty_like(states)
    start = 0
    # Several replies in a block: a product of few rows takes nearly as long, as it reads the whole head.
    for wanted in _blocks(base, _HEAD_TOKENS):
        block = slice(start, start + len(wanted))
        now = (states[block] @ head.T).float().log_softmax(-1)
        p = wanted.exp()
        kl[block] = torch.linalg.vecdot(p, wanted - now)
        z = now.exp_().sub_(p).mul_(weights[block, None].to(states.device))
        gradient[block] = _summed_by_blocks(z.to(states.dtype), head)
        start = block.stop
    return kl, gradient


def _blocks(matrices: Sequence[Tensor], rows: int) -> Iterator[Tensor]:
    """The rows of ``matrices``, in order, in blocks of about ``rows`` and never more than twice as many."""
    block: list[Tensor] = []
    for piece in (piece for matrix in matrices for piece in matrix.split(rows)):
        block.append(piece)
        if sum(len(piece) for piece in block) >= rows:
            yield torch.cat(block)
            block = []
    if block:
        yield torch.cat(block)


def _summed_by_blocks(z: Tensor, head: Tensor) -> Tensor:
    """z [n, V] @ head [V, d] as a sum over blocks of the vocabulary.

    Why: one float32 product over 49k terms of few rows is only good to 2e-4.
    """
    parts = [
        z[:, start : start + _HEAD_WORDS] @ head[start : start + _HEAD_WORDS]
        for start in range(0, head.shape[0], _HEAD_WORDS)
    ]
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total
