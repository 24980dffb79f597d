"""How a new theta enters a running vLLM engine: a weight-transfer backend (vLLM's public registry) that takes tensors from this process.

    engine_start.load_weights --> start_weight_update, update_weights(tensors), finish_weight_update --> engine_tensors: check, then load

vLLM's own backends reload layer by layer through temporary copies of every tensor, twice the seconds of this one on CPU.
Checked on vLLM 0.32 (CPU build); tests/integration/test_engine.py fails when vLLM changes underneath.
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
    """``tensors``: Hugging Face name -> full tensor in this process, on any device. ``complete``: whether they must be all of the model's."""

    tensors: Mapping[str, Tensor]
    complete: bool


class InProcessTransfer(WeightTransferEngine[NoInit, TensorsInProcess]):
    """One ``update_weights`` is one whole update. It raises EngineError with the model untouched, or something else with the model broken."""

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
        """Nothing left to do here; vLLM's worker forgets its adapters now."""

    def shutdown(self) -> None:
        """Nothing is held."""


def register() -> None:
    """Make the backend known to vLLM. Called where vLLM imports the worker's extension; safe to call twice."""
    if TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, InProcessTransfer)
