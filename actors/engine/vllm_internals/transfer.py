"""Brings a new theta into a running vLLM engine: an in-process backend of vLLM's weight transfer.

    start.load_weights --> start_weight_update, update_weights(tensors), finish_weight_update
                                                        |
                                      tensors.py: find the places, check, then load

Why: vLLM's own backends reload layer by layer through temporary copies of every tensor, in twice the time on
CPU. Checked on vLLM 0.32 (CPU build). tests/integration/test_engine_refresh.py fails when vLLM changes:
it compares the engine with transformers, and with a fresh engine to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

from actors.engine.vllm_internals.tensors import check, find_places, load

TRANSFER_BACKEND = "engram"


@dataclass
class NoInit(WeightTransferInitInfo):
    """In-process transfer needs no rendezvous."""


@dataclass
class TensorsInProcess(WeightTransferUpdateInfo):
    """The new weights.

    tensors: Hugging Face name -> full tensor in this process, on any device. complete: they must be all of
    the model.
    """

    tensors: Mapping[str, Tensor]
    complete: bool


class InProcessTransfer(WeightTransferEngine[NoInit, TensorsInProcess]):
    """One ``update_weights`` is one whole update.

    It raises EngineError with the model untouched; after any other exception the model is broken.
    """

    init_info_cls = NoInit
    update_info_cls = TensorsInProcess

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Nothing to prepare: values are overwritten in place."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if not current_platform.is_cpu():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: TensorsInProcess) -> None:
        places = find_places(self.model)
        check(places, update_info.tensors, update_info.complete)
        load(self.model, places, update_info.tensors)

    def finish_weight_update(self) -> None:
        """Nothing to do here; vLLM's worker forgets its adapters now."""

    def shutdown(self) -> None:
        """Nothing is held."""


def register() -> None:
    """Register the backend with vLLM. Called when vLLM imports the worker's extension; safe to call twice."""
    if TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, InProcessTransfer)
