"""Adapters inside the vLLM worker: the store of revisions, the bookkeeping of a step, the CPU's matmul.

worker_extension.py puts these stand-ins in place, and lists each reach into vLLM with its reason.

    AdapterStore                         revisions by path        instead of adapter files
    StepAdapters                         adapters of a step       each gets a slot, used ones stay
    StepRoutes --> SharedBasisDelta      CPU: tokens -> slots     y += x A^T B^T
                   OwnBasisDelta         the same, where writes move A

All adapters of an engine share one A (the basis) and differ in B. So x A^T is computed once for all tokens of
a step. Only the product with B is taken per token (decode: one token each) or per run of tokens (prefill).
Where writes move A, both products are.
"""

from __future__ import annotations

from collections.abc import KeysView, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest

from actors.protocols import EngineError

RUN = 4
"""Tokens in a row under one adapter that are worth a matmul of their own.

Shorter runs go token by token through one batched product.
"""


class AdapterStore:
    """The revisions that this worker can act under, by path.

    A of the basis is held once. Each revision holds its B, and its A where writes move it.
    a: module -> [rank, d_in]. b: module -> [d_out, rank], quickest with d_out innermost in memory (see
    ``SharedBasisDelta``). Both in ``dtype`` on the CPU. W + B A acts, without a factor alpha / rank.
    """

    def __init__(self, a: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._a = {module: matrix.to(dtype).contiguous() for module, matrix in a.items()}
        self.rank = next(iter(self._a.values())).shape[0]
        self._b: dict[str, dict[str, Tensor]] = {}
        self._own_a: dict[str, dict[str, Tensor]] = {}

    def a_of(self, modules: Sequence[str]) -> Tensor:
        """The A of ``modules``, one below the other: [len(modules) * rank, d_in]."""
        return torch.cat([self._a[module] for module in modules])

    def put(self, path: str, b: Mapping[str, Tensor], a: Mapping[str, Tensor]) -> None:
        """Hold a revision under ``path``; ``a`` is empty where A is the basis."""
        self._b[path] = {module: matrix.to(self._dtype) for module, matrix in b.items()}
        if a:
            self._own_a[path] = {module: matrix.to(self._dtype) for module, matrix in a.items()}

    def drop(self, path: str) -> None:
        self._b.pop(path, None)
        self._own_a.pop(path, None)

    def clear(self) -> None:
        self._b.clear()
        self._own_a.clear()

    def load(self, request: LoRARequest) -> LoRAModel:
        """vLLM's view of a stored revision. Stands in for WorkerLoRAManager._load_adapter.

        vLLM pads the rank up to the slot's width with zeros.
        """
        if request.lora_path not in self._b:
            raise EngineError(
                f"adapter {request.lora_path} is not in the store: "
                "it was never installed, or released while a request named it"
            )
        a = self._own_a.get(request.lora_path, self._a)
        layers = {
            module: LoRALayerWeights(
                module, rank=self.rank, lora_alpha=self.rank, lora_a=a[module], lora_b=matrix
            )
            for module, matrix in self._b[request.lora_path].items()
        }
        return LoRAModel(request.lora_int_id, self.rank, layers)


class StepAdapters:
    """Prepares the adapters of a step before it runs: each gets a slot and is marked as used.

    Work is O(active), and almost none for an adapter that is in its slot.
    Invariant: no adapter of a step is evicted for another of the same step. Adapters in place are marked as
    used before the first new one is loaded, and vLLM never schedules more of them than there are slots.
    """

    def __init__(self, manager: Any) -> None:
        self._manager, self._adapters = manager, manager._adapter_manager

    def apply(self, requests: set[LoRARequest]) -> None:
        """Give each adapter of the step a slot. Stands in for LRUCacheWorkerLoRAManager._apply_adapters.

        Raises EngineError for an adapter that the store does not have.
        """
        adapters = self._adapters
        if len(requests) > adapters.lora_slots:
            raise EngineError(
                f"a step names {len(requests)} adapters, "
                f"the engine has {adapters.lora_slots} slots (engine.slots)"
            )
        registered, active = adapters._registered_adapters, adapters._active_adapters
        absent = []
        for request in requests:
            number = request.lora_int_id
            if number in active:
                active.touch(number)
                registered.touch(number)
            else:
                absent.append(request)
        # An adapter that only lost its slot must not be evicted when the next loop loads a new one.
        for request in absent:
            registered.touch(request.lora_int_id)
        for request in absent:
            self._manager.add_adapter(request)

    def list(self) -> KeysView[int]:
        """Ids of the registered adapters, not copied. Stands in for WorkerLoRAManager.list_adapters."""
        ids: KeysView[int] = self._adapters._registered_adapters.keys()
        return ids


@dataclass(frozen=True, slots=True)
class Routes:
    """Which tokens of a step belong to which slot.

    runs: (slot, first token, end) of each long run. rows, slots: int64 [n], the other adapted tokens and the
    slot of each; ``rows`` is None where they are all tokens of the step in order. Tokens in neither have no
    adapter.
    """

    runs: tuple[tuple[int, int, int], ...]
    rows: Tensor | None
    slots: Tensor


def find_routes(token_slots: Tensor) -> Routes:
    """The routes of a step, from the slot of each token, int64 [tokens]; -1 is no adapter."""
    of_run, counts = torch.unique_consecutive(token_slots, return_counts=True)
    runs: list[tuple[int, int, int]] = []
    rows: list[int] = []
    start = 0
    for slot, count in zip(of_run.tolist(), counts.tolist(), strict=True):
        if slot >= 0:
            if count >= RUN:
                runs.append((slot, start, start + count))
            else:
                rows.extend(range(start, start + count))
        start += count
    if len(rows) == start:
        return Routes((), None, token_slots.clone())
    index = torch.tensor(rows, dtype=torch.int64)
    return Routes(tuple(runs), index, token_slots[index])


class StepRoutes:
    """The routes of the running step, computed once for all modules."""

    def __init__(self, punica: Any) -> None:
        self._punica, self._read_mapping = punica, punica.update_metadata
        self.current = Routes((), None, torch.empty(0, dtype=torch.int64))

    def update_metadata(
        self, mapping: LoRAMapping, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int
    ) -> None:
        """Follow a change of the batch or of the slots. Stands in for PunicaWrapperBase.update_metadata."""
        self._read_mapping(mapping, lora_index_to_id, max_loras, vocab_size)
        self.current = find_routes(self._punica.token_lora_indices)


class SharedBasisDelta:
    """Every slot's B of one module, and the Delta of every token. The module may be several matrices in one.

    On the CPU it stands in for vLLM's slots (``set_lora``, ``reset_lora``) and for its PunicaWrapperCPU
    (``add_lora_linear``); the arguments are vLLM's.

    a [slices * rank, d_in]: the A of each slice of the output, one below the other. widths: d_out of each
    slice; they add up to the output's width. The slots are kept as [slots, rank, width]: without padding, and
    with the long side innermost, as the product of a single token wants it.
    """

    def __init__(self, routes: StepRoutes, a: Tensor, widths: Sequence[int], slots: int) -> None:
        self._routes, self._a, self._rank = routes, a, a.shape[0] // len(widths)
        self._b = [torch.zeros(slots, self._rank, width, dtype=a.dtype) for width in widths]

    def set_lora(self, index: int, lora_a: Tensor | list[Tensor], lora_b: Tensor | list[Tensor]) -> None:
        """Fill slot ``index`` with ``lora_b`` [width, rank], a list where there are several slices.

        ``lora_a`` is the basis, and is not read.
        """
        matrices = lora_b if isinstance(lora_b, list) else [lora_b]
        for slot, matrix in zip(self._b, matrices, strict=True):
            slot[index].copy_(matrix.T)

    def reset_lora(self, index: int) -> None:
        for slot in self._b:
            slot[index] = 0

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        scale: float,
        output_slices: Sequence[int],
    ) -> None:
        """y[t] += x[t] A^T B^T with the B of token t's slot; a token without adapter is left alone.

        y [tokens, width of all slices] is changed in place; x [tokens, d_in]. vLLM's own slots ``a`` and
        ``b`` are not read; its ``scale`` is 1.
        """
        assert scale == 1.0, scale
        routes = self._routes.current
        if not routes.runs and not len(routes.slots):
            return
        hidden = self._shrunk(x, routes)
        left = 0
        for place, slots in enumerate(self._b):
            columns = y[:, left : left + slots.shape[2]]
            shrunk = hidden[:, place * self._rank : (place + 1) * self._rank]
            for slot, start, end in routes.runs:
                columns[start:end].addmm_(shrunk[start:end], slots[slot])
            if routes.rows is None:
                columns += torch.bmm(shrunk[:, None], slots.index_select(0, routes.slots))[:, 0]
            elif len(routes.rows):
                added = torch.bmm(shrunk[routes.rows, None], slots.index_select(0, routes.slots))[:, 0]
                columns.index_add_(0, routes.rows, added)
            left += slots.shape[2]

    def _shrunk(self, x: Tensor, routes: Routes) -> Tensor:
        """x A^T [tokens, slices * rank]. Nobody reads the rows of tokens without adapter."""
        return x @ self._a.T


class OwnBasisDelta(SharedBasisDelta):
    """For revisions with an A of their own. The slots hold A too: [slots, slices * rank, d_in]."""

    def __init__(self, routes: StepRoutes, a: Tensor, widths: Sequence[int], slots: int) -> None:
        super().__init__(routes, a, widths, slots)
        self._own = a.expand(slots, *a.shape).clone()

    def set_lora(self, index: int, lora_a: Tensor | list[Tensor], lora_b: Tensor | list[Tensor]) -> None:
        """Fill slot ``index`` with ``lora_b``, and with ``lora_a`` [rank, d_in] of each slice."""
        super().set_lora(index, lora_a, lora_b)
        self._own[index].copy_(torch.cat(lora_a) if isinstance(lora_a, list) else lora_a)

    def _shrunk(self, x: Tensor, routes: Routes) -> Tensor:
        hidden = x.new_zeros(x.shape[0], self._own.shape[1])
        for slot, start, end in routes.runs:
            torch.mm(x[start:end], self._own[slot].T, out=hidden[start:end])
        rows = slice(None) if routes.rows is None else routes.rows
        if len(routes.slots):
            hidden[rows] = torch.bmm(self._own.index_select(0, routes.slots), x[rows, :, None])[:, :, 0]
        return hidden


def replace_matmuls(adapters: Any, store: AdapterStore, train_a: bool) -> None:
    """Put the CPU's stand-ins in place. ``adapters``: vLLM's LoRAModelManager, which loses its own slots."""
    kind = OwnBasisDelta if train_a else SharedBasisDelta
    (punica,) = adapters.punica_wrapper_mapping.values()
    routes = StepRoutes(punica)
    punica.update_metadata = routes.update_metadata
    for name, module in adapters.modules.items():
        a = store.a_of(adapters.packed_modules.get(name, [name]))
        delta = kind(routes, a, module.output_slices, adapters.lora_slots)
        module.set_mapping(delta)
        module.set_lora, module.reset_lora = delta.set_lora, delta.reset_lora
        module.lora_a_stacked = module.lora_b_stacked = ()
