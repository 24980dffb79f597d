"""Log-prob and entropy of chosen tokens from hidden states, without ever holding [tokens x vocabulary].

The gradient of a token's log-prob with respect to its own state is (W[target] - E_p[W]) / temperature. It
does not depend on what is done with the log-prob later. So the forward computes it chunk by chunk, next to
the logits. The backward only scales it by each token's incoming gradient. No logits are kept, and a frozen
head computes none twice. A trained head needs its logits once more in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_CHUNK = 2**23  # logits at a time: 32 MiB of float32, twice; more is no faster on a CPU
# 256 MiB: 441 tokens of a vocabulary of 152k. With 55 a GPU would wait for its many small products.
_GPU_CHUNK = 2**26


class TokenHead(nn.Module):
    """Takes the place of a model's output embedding.

    It holds the same parameter, so names, tying and ZeRO-3's gathering stay as they are.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        if "bias" in dict(head.named_parameters()):
            raise ValueError("the model's output head has a bias: supported are heads without one")
        self.weight = head.weight

    def forward(self, states: Tensor, targets: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probs of softmax(z / temperature), with gradient, and entropies in nats, without.

        states [K, d], targets int64 [K], temperature a number or float32 [K] -> float32 [K] each.
        """
        result: tuple[Tensor, Tensor] = _TokenLogprobs.apply(
            states, self.weight, targets, temperature, torch.is_grad_enabled()
        )
        return result


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float | Tensor,
        gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        logp = torch.empty(len(states), dtype=torch.float32, device=states.device)
        entropy = torch.empty_like(logp)
        # [K, d]: the gradient of each log-prob with respect to its own state
        slopes = torch.empty_like(states) if gradients and states.requires_grad else None
        for part in _chunks(states, weight):
            heat = _column(temperature, part)
            logs = _log_softmax(states[part], weight, heat)
            chosen = logs.gather(-1, targets[part, None])
            logp[part] = chosen.squeeze(-1)
            p = logs.exp()
            # a dot product per row, without a third array of the chunk's size
            entropy[part] = -torch.bmm(p[:, None], logs[:, :, None]).flatten()
            if slopes is not None:
                slopes[part] = _residual(p, targets[part]).to(weight.dtype) @ weight / heat
            del logs, p  # before the next chunk allocates its own
        ctx.save_for_backward(states, weight, targets, slopes)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, incoming: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, targets, slopes = ctx.saved_tensors
        for_states = (slopes * incoming[:, None]).to(slopes.dtype) if slopes is not None else None
        for_weight = None
        if ctx.needs_input_grad[1]:
            for_weight = torch.zeros_like(weight, dtype=torch.float32)
            for part in _chunks(states, weight):
                heat = _column(ctx.temperature, part)
                p = _log_softmax(states[part], weight, heat).exp_()
                residual = _residual(p, targets[part])  # in place of p
                residual.mul_(incoming[part, None] / heat)
                if weight.dtype == torch.float32:
                    for_weight.addmm_(residual.T, states[part])
                else:  # only a chunk's own sum is rounded to 16 bits: a sum of all in 16 bits loses 1 %
                    for_weight += residual.to(weight.dtype).T @ states[part]
                del p, residual
            for_weight = for_weight.to(weight.dtype)
        return for_states, for_weight, None, None, None


def _chunks(states: Tensor, weight: Tensor) -> Iterator[slice]:
    tokens, logits = len(states), _CHUNK if weight.device.type == "cpu" else _GPU_CHUNK
    size = max(1, logits // len(weight))
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _column(temperature: float | Tensor, part: slice) -> float | Tensor:
    """Return the temperature of a chunk: one number, or a column with one for each token."""
    return temperature[part, None] if isinstance(temperature, Tensor) else temperature


def _log_softmax(states: Tensor, weight: Tensor, temperature: float | Tensor) -> Tensor:
    logits = linear(states, weight).float()
    same = not isinstance(temperature, Tensor) and temperature == 1
    return (logits if same else logits.div_(temperature)).log_softmax(-1)


def _residual(p: Tensor, targets: Tensor) -> Tensor:
    """Return one-hot minus ``p``, in place of ``p``."""
    p.neg_()
    return p.scatter_add_(-1, targets[:, None], torch.ones_like(targets[:, None], dtype=p.dtype))
