"""How a new theta enters a running vLLM engine: a weight-transfer backend (vLLM's public registry) that takes tensors from this process.

Checked on vLLM 0.32 (CPU build); tests/integration/test_engine.py fails when vLLM changes underneath.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

TRANSFER_BACKEND = "engram"


@dataclass
class NoInit(WeightTransferInitInfo):
    """In-process transfer needs no rendezvous."""


@dataclass
class TensorsInProcess(WeightTransferUpdateInfo):
    """``tensors``: Hugging Face name -> full tensor in this process, on any device; not copied before vLLM's own loader reads them."""

    tensors: Mapping[str, Tensor]


class InProcessTransfer(WeightTransferEngine[NoInit, TensorsInProcess]):
    """Loads a whole checkpoint's tensors through vLLM's own layer-by-layer reload, which also repacks weights for the device."""

    init_info_cls = NoInit
    update_info_cls = TensorsInProcess

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if not current_platform.is_cpu():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: TensorsInProcess) -> None:
        model: Any = self.model
        tensors = dict(update_info.tensors)
        if "lm_head.weight" not in tensors and getattr(model.config, "tie_word_embeddings", False):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # vLLM holds a repacked copy of its own on CPU
        model.load_weights(iter(tensors.items()))

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        # It warns of each layer without a tensor in a checkpoint (rotary tables); that every parameter came was checked by name before.
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held."""


def register() -> None:
    """Make the backend known to vLLM. Called where vLLM imports the worker's extension; safe to call twice."""
    if TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, InProcessTransfer)
