"""How far two computations of the same log-prob or loss may differ, by the dtype of the model's weights.

Engine and writer, or a write and the same write made again beside others, add the same numbers in another
order. In float32 that shows in the fifth digit. In bfloat16 it is the rounding of the model itself.

Measured in bfloat16 on 2026-11-30 with SmolLM2-135M on a CPU, with vLLM's plain weights as a GPU has them: 36
installs after ten steps of Adam at 1e-3 (86 tokens of probes), 20 of these writes made again alone.

    receipts   a token is off by 0.13 nats (root mean square), the largest by 0.47, as without an adapter.
               Refused at 0.02: 29 of 36, at 0.3: 3, at 0.5: none. At 0.8 the tail of these differences, taken
               as exponential, leaves 2 false refusals in 1,000 installs. A write moved its probe by 15 nats
               (median; 10 or less in a tenth), so an adapter that does not act is seen. Writes that move it
               by less than the tolerance prove little, and are counted (``receipts_unseen``).
    replays    losses are off by 0.08 nats at most. Refused at 0.01: 5 of 20, at 0.05: 1, at 0.1: none. A
               false refusal only starts an episode again.
"""

from __future__ import annotations

from configs.schema import EngineConfig, ModelConfig

RECEIPT = {"float32": 0.02, "bfloat16": 0.8}
"""Nats per token, between the engine's log-probs and the writer's (``engine.receipt_tolerance``)."""

REPLAY = {"float32": 1e-2, "bfloat16": 0.2}
"""Nats per answer token, between the loss of a write and that of the same write made again."""


def receipt_tolerance(engine: EngineConfig, model: ModelConfig) -> float:
    """``engine.receipt_tolerance``, or what ``model.dtype`` needs."""
    return RECEIPT[model.dtype] if engine.receipt_tolerance is None else engine.receipt_tolerance
