"""The receipt of an install: the engine proves that an adapter acts as the writer computed."""

from __future__ import annotations

from collections.abc import Sequence

from actors.protocols import ReceiptError
from actors.types import Probe


def check_receipt(scored: Sequence[float], probe: Probe, tolerance: float) -> bool:
    """Compare the engine's log-probs of a probe's last tokens with the writer's own (nats, float32).

    Returns whether the write moved the probe by more than ``tolerance`` (a smaller move cannot tell the new weights from the old).
    Raises ReceiptError when a token differs by more than ``tolerance``, or when the writer's forward moved and the engine's did not.
    """
    difference = max(abs(ours - theirs) for ours, theirs in zip(scored, probe.after, strict=True))
    shift = max(abs(after - before) for after, before in zip(probe.after, probe.before, strict=True))
    moved = max(abs(ours - before) for ours, before in zip(scored, probe.before, strict=True))
    numbers = f"largest difference {difference:.4f} nats, writer moved {shift:.4f}, engine moved {moved:.4f}, engine.receipt_tolerance={tolerance}"
    if not difference <= tolerance:
        raise ReceiptError(f"the engine does not act as the writer computed: {numbers}")
    if shift > tolerance and moved < shift / 2:
        raise ReceiptError(f"the engine did not move with the write: {numbers}")
    return shift > tolerance
