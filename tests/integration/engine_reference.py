"""The reference for the engine: the same checkpoint in transformers, with Delta added by DeltaInjector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from actors.fast_weights.delta import Basis, DeltaInjector, stack
from actors.types import FastWeights


class Reference:
    """A Hugging Face model in float32 on the CPU that answers with log-probs."""

    def __init__(self, path: Path, basis: Basis) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.basis = basis
        self._injector = DeltaInjector(self.model, basis)

    def table(
        self, ids: Sequence[int], weights: FastWeights | None, temperature: float = 1.0
    ) -> torch.Tensor:
        """log_softmax(z / temperature) after each token of ``ids``: [len(ids), vocabulary]."""
        stacked = None if weights is None else stack([weights], self.basis)
        with torch.no_grad(), self._injector.use(stacked):
            return (self.model(torch.tensor([list(ids)])).logits[0] / temperature).log_softmax(-1)

    def logprobs(
        self, ids: Sequence[int], weights: FastWeights | None, temperature: float = 1.0
    ) -> list[float]:
        """Log-probs of tokens 1..n-1 given those before."""
        table = self.table(ids, weights, temperature)[:-1]
        return table.gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0].tolist()

    def of_generated(
        self,
        prompt: Sequence[int],
        generated: Sequence[int],
        weights: FastWeights | None,
        temperature: float = 1.0,
    ) -> list[float]:
        """Log-probs of ``generated`` after ``prompt``."""
        return self.logprobs([*prompt, *generated], weights, temperature)[len(prompt) - 1 :]


def written(basis: Basis, revision: int, seed: int, size: float) -> FastWeights:
    """Fast weights as a write could leave them: B drawn from a normal of standard deviation ``size``."""
    draw = np.random.default_rng(seed)
    b = {
        name: draw.normal(0, size, (rows, basis.rank)).astype(np.float32)
        for name, rows in basis.d_out.items()
    }
    return FastWeights(basis.id, revision, b)


def distance(left: Sequence[float], right: Sequence[float]) -> float:
    """Largest absolute difference; the lengths must agree."""
    assert len(left) == len(right), (len(left), len(right))
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(100, 40000, length).tolist()
