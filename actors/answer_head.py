"""The output head of a write: log-probs of the answers and, beside them, the gradient of their loss. No logits are kept."""

from __future__ import annotations

import torch
from torch import Tensor

_HEAD_WORDS = 4096
_HEAD_TOKENS = 256  # logits of one block: 50 MB at a vocabulary of 49k, 155 MB at 152k (float32)


@torch.no_grad()
def head_pass(states: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
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
    parts = [z[:, start : start + _HEAD_WORDS] @ head[start : start + _HEAD_WORDS] for start in range(0, head.shape[0], _HEAD_WORDS)]
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total
