"""How far two computations of the same log-prob or loss may differ, by the dtype of the model's weights."""

from __future__ import annotations

from configs.schema import EngineConfig, ModelConfig

RECEIPT = {"float32": 0.02, "bfloat16": 0.3}
"""Nats per token, between the engine's log-probs and the writer's (``engine.receipt_tolerance``)."""

REPLAY = {"float32": 1e-2, "bfloat16": 0.1}
"""Nats per answer token, between the loss of a write and that of the same write made again."""


def receipt_tolerance(engine: EngineConfig, model: ModelConfig) -> float:
    """``engine.receipt_tolerance``, or what ``model.dtype`` needs."""
    return RECEIPT[model.dtype] if engine.receipt_tolerance is None else engine.receipt_tolerance
