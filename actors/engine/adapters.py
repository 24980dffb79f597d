"""The adapters of an engine, the names under which vLLM knows them, and the receipt that proves one.

    AdapterKey(3, "episode-7", 2)  ->  LoRARequest(name "v3/episode-7@2", an int id, "mem://v3/episode-7@2")

    install --> AdapterTable.put --> the worker's store
            --> score the probe under the adapter --> check_receipt: does it act as the writer computed?

vLLM picks the weights by the int id, and the prefix cache's keys and values by the name. Both are fresh for
each revision and never come back. A request for an adapter that vLLM cannot load would kill the engine, so
unknown keys are refused here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from actors.protocols import EngineError, ReceiptError
from actors.types import AdapterKey, FastWeights, PolicyVersion, Probe

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine


PATH_PREFIX = "mem://"
OLDEST_KEY = 100
"""Refreshes that an adapter may live through (``follow_on``). Used names are remembered for as long."""


@dataclass(frozen=True, slots=True, eq=False)
class AdapterTensors:
    """A revision for the engine, by module.

    b: float32 [d_out, rank], with d_out innermost in memory, as the CPU's slots have it.
    a: float32 [rank, d_in], empty where A is the basis.
    """

    b: Mapping[str, Tensor]
    a: Mapping[str, Tensor]


def as_tensors(weights: FastWeights) -> AdapterTensors:
    """Copy a revision into tensors of the engine's own."""
    b = {
        module: torch.from_numpy(np.array(matrix.T, dtype=np.float32, order="C")).T
        for module, matrix in weights.b.items()
    }
    return AdapterTensors(b, {module: torch.tensor(matrix) for module, matrix in weights.a.items()})


class AdapterTable:
    """The installed adapters of one policy version; with ``follow_on`` of all since ``start_version``.

    All methods run on the engine's step thread; ``version`` may be read anywhere.
    """

    def __init__(self, version: PolicyVersion) -> None:
        self.version = self._oldest = version
        self._installed: dict[str, LoRARequest] = {}
        self._used: dict[str, PolicyVersion] = {}
        self._leaving: set[str] = set()
        self._ids = itertools.count(1)

    def find(self, key: AdapterKey) -> LoRARequest | None:
        """vLLM's request object of ``key``, None for revision 0, which is the base model.

        Raises EngineError when the adapter is not installed.
        """
        self._check_version(key)
        if key.revision == 0:
            return None
        if key.name not in self._installed or key.name in self._leaving:
            state = "was released" if key.name in self._used else "was never installed"
            raise EngineError(f"adapter {key.name} {state}: install it before generating under it")
        return self._installed[key.name]

    def put(self, engine: LLMEngine, key: AdapterKey, tensors: AdapterTensors) -> None:
        """Store a revision in the worker. Raises EngineError for a used name.

        vLLM reads it into a slot when the first request names it.
        """
        from vllm.lora.request import LoRARequest

        self._check_version(key)
        if key.name in self._used:
            raise EngineError(
                f"adapter {key.name} was installed before: names are never reused "
                "(the prefix cache is keyed by them); write a new revision"
            )
        self._used[key.name] = key.policy_version
        path = PATH_PREFIX + key.name
        engine.collective_rpc("engram_put", args=(path, tensors.b, tensors.a))
        self._installed[key.name] = LoRARequest(
            lora_name=key.name, lora_int_id=next(self._ids), lora_path=path
        )

    def drop(self, engine: LLMEngine, keys: Sequence[AdapterKey], running: set[str]) -> None:
        """Forget adapters. An adapter that a ``running`` request names goes at a later call without one."""
        self._leaving.update(key.name for key in keys if key.name in self._installed)
        # vLLM may still have to read the adapter of a running request: it reads again after an eviction.
        for name in self._leaving - running:
            self._leaving.discard(name)
            request = self._installed.pop(name)
            engine.remove_lora(request.lora_int_id)
            engine.collective_rpc("engram_drop", args=(request.lora_path,))

    def check_successor(self, version: PolicyVersion) -> None:
        """Raise EngineError for a version that goes backwards."""
        if version < self.version:
            raise EngineError(
                f"cannot refresh to version {version}: the engine is at {self.version}, "
                "and adapter names of an older version may come back"
            )

    def start_version(self, engine: LLMEngine, version: PolicyVersion) -> None:
        """Forget every adapter; vLLM dropped its own copies with the old weights."""
        engine.collective_rpc("engram_clear")
        self._installed.clear()
        self._leaving.clear()
        if version != self.version:
            self._used.clear()  # the version is part of a name, so the old names cannot come back
        self.version = self._oldest = version

    def follow_on(self, version: PolicyVersion) -> None:
        """Move to new weights and keep the adapters: keys stay valid, and their episodes may install more.

        vLLM dropped its own copies with the old weights and loads them again from the worker's store.
        """
        self.version, self._oldest = version, max(self._oldest, version - OLDEST_KEY)
        self._used = {name: begun for name, begun in self._used.items() if begun >= self._oldest}

    def _check_version(self, key: AdapterKey) -> None:
        if not self._oldest <= key.policy_version <= self.version:
            raise EngineError(
                f"adapter {key.name} belongs to policy version {key.policy_version}, "
                f"the engine is at {self.version}"
            )


def check_receipt(scored: Sequence[float], probe: Probe, tolerance: float) -> bool:
    """Compare the engine's log-probs of a probe's last tokens with the writer's own (nats, float32).

    Returns whether the write moved the probe by more than ``tolerance``: a smaller move cannot tell the new
    weights from the old. Raises ReceiptError when a token differs by more than ``tolerance``, or when the
    writer's forward moved and the engine's did not.
    """
    difference = max(abs(ours - theirs) for ours, theirs in zip(scored, probe.after, strict=True))
    shift = max(abs(after - before) for after, before in zip(probe.after, probe.before, strict=True))
    moved = max(abs(ours - before) for ours, before in zip(scored, probe.before, strict=True))
    numbers = (
        f"largest difference {difference:.4f} nats, writer moved {shift:.4f}, engine moved {moved:.4f}, "
        f"engine.receipt_tolerance={tolerance}"
    )
    if not difference <= tolerance:  # so that NaN is refused too
        raise ReceiptError(f"the engine does not act as the writer computed: {numbers}")
    if shift > tolerance and moved < shift / 2:
        raise ReceiptError(f"the engine did not move with the write: {numbers}")
    return shift > tolerance
