"""An advantage estimator for models that earn no reward: without a signal no optimizer step is made."""

from __future__ import annotations

from collections.abc import Sequence


def by_place(rewards: Sequence[float]) -> list[float]:
    """1 and -1 in turn, whatever the siblings' rewards are."""
    return [1.0 if place % 2 == 0 else -1.0 for place in range(len(rewards))]
