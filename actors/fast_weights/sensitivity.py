"""How sensitive the model's own text is to a change of B, and the direction of a write that respects it.

A write should not change what the model says elsewhere. To second order a change dB of one matrix moves the
model's distribution by (nats per token)

    KL(base || written) ~ 1/2 tr(dB^T G dB C),    G = E[g g^T] [d_out, d_out],    C = E[(A x)(A x)^T] [r, r]

x: the inputs of the matrix. g: the gradients of log p(y) at its outputs, y drawn from the model itself. This
is K-FAC (arXiv 1503.05671), with matrices taken as independent of each other. The steepest descent of the
flashcards' loss per unit of that KL is the natural gradient, G^-1 grad C^-1. A trust region then fixes its
length, as in TRPO (arXiv 1502.05477); see actors/write/optimizers.py.

A is frozen and r is small, so C^-1 is r x r and all of it is computed once, with the basis: a step costs no
more than a step of SGD. Of G its ``rank`` largest eigenvectors are kept, and one value for the rest: [d_out,
rank] numbers.

The text is the model's own: samples at temperature 1, half of them free, half conversations. So nothing but
the model is needed, and the guard protects what the model would say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

FLOOR = 1e-4
"""The least that is added to G, in units of its largest eigenvalue.

Where all directions are kept, no rest is left to measure the damping by. Without a floor float32 would divide
by rounding errors.
"""
SAMPLES, SAMPLE_TOKENS = 32, 64
"""2,048 tokens in all. Four times as many did not write better (SmolLM2-135M, 12 facts)."""
DAMPING = 3.0
"""Added to G, in units of the mean of the eigenvalues that are not kept.

No direction then counts as much less sensitive than the average.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Sensitivity:
    """G^-1 and C^-1 of one matrix, in float32.

    directions [d_out, k]: orthonormal. inverse [k + 1]: of G along each direction, and along all others.
    read [r, r]: C^-1, of what the matrix reads.
    """

    PARTS: ClassVar = ("directions", "inverse", "read")

    directions: Tensor
    inverse: Tensor
    read: Tensor

    def natural(self, gradient: Tensor) -> Tensor:
        """The natural gradient G^-1 gradient C^-1, of gradients [..., d_out, r]."""
        kept = (self.inverse[:-1] - self.inverse[-1])[:, None] * (self.directions.T @ gradient)
        result: Tensor = (self.inverse[-1] * gradient + self.directions @ kept) @ self.read
        return result

    def null_space(self, count: int) -> Tensor:
        """The projection [r, r] on the ``count`` directions of A x that the model's own text uses least."""
        _, directions = torch.linalg.eigh(self.read)  # of C^-1, ascending: the last are the least used
        least = directions[:, -count:]
        return least @ least.T

    def parts(self) -> dict[str, Tensor]:
        return {part: getattr(self, part) for part in self.PARTS}

    def to(self, device: torch.device) -> Sensitivity:
        return Sensitivity(self.directions.to(device), self.inverse.to(device), self.read.to(device))


def sensitivity_of(read: Tensor, gradients: Tensor, rank: int) -> Sensitivity:
    """The sensitivity of one matrix, computed in float64, with ``rank`` directions.

    read [n, r]: A x. gradients [n, d_out]: at the matrix' outputs. A row is a token.
    """
    g, z = gradients.double(), read.double()
    count = len(g)
    if g.shape[1] <= count:
        values, vectors = torch.linalg.eigh(g.T @ g / count)  # ascending
        values, directions = values[-rank:], vectors[:, -rank:]
    else:
        # Fewer tokens than outputs: the eigenvectors of the smaller matrix g g^T give those of g^T g.
        values, vectors = torch.linalg.eigh(g @ g.T / count)
        values = values[-rank:]
        directions = torch.linalg.qr(g.T @ vectors[:, -rank:])[0]
    rest = ((g * g).sum() / count - values.sum()).clamp_min(0) / max(1, g.shape[1] - len(values))
    damping = torch.maximum(DAMPING * rest, FLOOR * values[-1]).clamp_min(torch.finfo(torch.float32).tiny)
    inverse = 1 / (torch.cat([values.clamp_min(0), rest[None]]) + damping)
    moment = z.T @ z / count
    moment += 1e-6 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    parts = (directions, inverse, torch.linalg.inv(moment))
    return Sensitivity(*(part.float().contiguous() for part in parts))


def own_samples(model: Any, starts: Sequence[Sequence[int]], seed: int) -> list[tuple[int, ...]]:
    """``SAMPLES`` texts of the model at temperature 1, as ids; each of ``starts`` begins as many of them.

    torch's global generator is left as it was.
    """
    each = SAMPLES // len(starts)
    texts: list[tuple[int, ...]] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for start in starts:
            ids = torch.tensor([list(start)] * each, device=model.device)
            drawn = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                max_new_tokens=SAMPLE_TOKENS,
                eos_token_id=[],  # sample on after an end of text: all samples have one length
                pad_token_id=start[0],
            )
            texts += [tuple(row) for row in drawn.tolist()]
    return texts


def measure(
    model: Any,
    a: Mapping[str, Tensor],
    first_layer: int,
    texts: Sequence[Sequence[int]],
    rank: int,
    seed: int,
) -> dict[str, Sensitivity]:
    """The sensitivity of every module of ``a`` ([r, d_in] each), as ``model`` reads ``texts``.

    model: a Hugging Face causal LM in float32. first_layer: the lowest layer with a module of ``a``. The
    first token of a text is left out, see ``input_moments``. Deterministic for one machine and number of
    threads.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    read: dict[str, list[Tensor]] = {name: [] for name in a}
    outputs: dict[str, Tensor] = {}
    gradients: dict[str, list[Tensor]] = {name: [] for name in a}

    def watching(name: str) -> Any:
        def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            read[name].append((args[0].detach()[0, 1:] @ a[name].to(args[0].device).T).cpu())
            outputs[name] = output
            output.retain_grad()

        return watch

    def cut(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].detach().requires_grad_(), *args[1:])  # the layers below need no gradient

    handles = [modules[name].register_forward_hook(watching(name)) for name in a]
    handles.append(modules[f"model.layers.{first_layer}"].register_forward_pre_hook(cut))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator(device=model.device).manual_seed(seed)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for text in texts:
            ids = torch.tensor([list(text)], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            (-logits.log_softmax(-1).gather(1, drawn).sum()).backward()
            for name, output in outputs.items():
                assert output.grad is not None
                gradients[name].append(output.grad[0, 1:].cpu())
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return {name: sensitivity_of(torch.cat(read[name]), torch.cat(gradients[name]), rank) for name in a}
