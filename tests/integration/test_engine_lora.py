"""The CPU's stand-ins for vLLM's LoRA, without an engine.

The matmul is compared with a plain loop over tokens, and with vLLM's own where that is right.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from actors.engine.adapters import OLDEST_KEY, AdapterTable, AdapterTensors
from actors.engine.start import WORKER_EXTENSION
from actors.engine.vllm_internals.lora import (
    RUN,
    AdapterStore,
    OwnBasisDelta,
    Routes,
    SharedBasisDelta,
    StepRoutes,
    find_routes,
)
from actors.protocols import EngineError
from actors.types import AdapterKey

pytestmark = pytest.mark.engine_in_process
SLOTS, RANK, D_IN, WIDTHS = 5, 3, 12, (7, 9)
IDS = [11, 22, 33, 44, None]  # which adapter is in which slot
EXACT = 1e-5  # float32, sums of a dozen products in another order

DECODE = (33, 11, 44, 22)
MIXED = (
    22,
    *(33,) * RUN,
    0,
    11,
    11,
    *(0,) * 6,
    44,
    *(22,) * (RUN + 3),
    0,
)  # single tokens, short and long runs, base tokens
BATCHES = {
    "decode": DECODE,
    "one token": (44,),
    "decode with two of one adapter": (11, 33, 33, 22),
    "decode with base requests": (33, 0, 11, 0, 0, 44),
    "prefill": (*(22,) * 20, *(44,) * 9),
    "prefill, decode and base requests": MIXED,
    "base requests only": (0,) * 9,
}


class Case:
    """Random slots in our layout and in vLLM's, and a batch of random activations."""

    def __init__(self, tokens: tuple[int, ...], own_a: bool = False) -> None:
        from vllm.lora.layers import LoRAMapping
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        draw = torch.Generator().manual_seed(0)
        self.tokens = tokens
        self.x = torch.randn(len(tokens), D_IN, generator=draw)
        self.y = torch.randn(len(tokens), sum(WIDTHS), generator=draw)
        self.a = [torch.randn(RANK, D_IN, generator=draw).expand(SLOTS, -1, -1).clone() for _ in WIDTHS]
        shared = torch.cat([matrices[0] for matrices in self.a])
        self.b = [torch.randn(SLOTS, width, RANK, generator=draw) for width in WIDTHS]
        self.punica = PunicaWrapperCPU(64, 16, "cpu")
        self.routes = StepRoutes(self.punica)
        if own_a:
            self.a = [torch.randn(SLOTS, RANK, D_IN, generator=draw) for _ in WIDTHS]
        self.ours = (OwnBasisDelta if own_a else SharedBasisDelta)(self.routes, shared, WIDTHS, SLOTS)
        for slot in range(SLOTS):
            self.ours.set_lora(
                slot, [matrices[slot] for matrices in self.a], [matrices[slot] for matrices in self.b]
            )
        self.routes.update_metadata(LoRAMapping(tokens, tokens, is_prefill=True), IDS, SLOTS + 1, 100)

    def added_by_us(self) -> Tensor:
        y = self.y.clone()
        self.ours.add_lora_linear(y, self.x, (), (), 1.0, WIDTHS)
        return y

    def added_by_vllm(self) -> Tensor:
        y = self.y.clone()
        a = tuple(matrices[:, None].contiguous() for matrices in self.a)
        self.punica.add_lora_linear(
            y, self.x, a, tuple(matrices[:, None] for matrices in self.b), 1.0, WIDTHS
        )
        return y

    def added_token_by_token(self) -> Tensor:
        y = self.y.clone()
        for token, adapter in enumerate(self.tokens):
            if adapter:
                slot = IDS.index(adapter)
                y[token] += torch.cat(
                    [b[slot] @ (a[slot] @ self.x[token]) for a, b in zip(self.a, self.b, strict=True)]
                )
        return y


@pytest.mark.parametrize("own_a", [False, True], ids=["shared A", "own A"])
@pytest.mark.parametrize("tokens", BATCHES.values(), ids=BATCHES.keys())
def test_every_token_gets_its_own_adapters_delta_and_base_tokens_none(
    tokens: tuple[int, ...], own_a: bool
) -> None:
    case = Case(tokens, own_a)
    ours = case.added_by_us()
    torch.testing.assert_close(ours, case.added_token_by_token(), rtol=EXACT, atol=EXACT)
    base = torch.tensor([adapter == 0 for adapter in tokens])
    assert torch.equal(ours[base], case.y[base]), "not the base model to the bit"
    assert not torch.isclose(ours[~base], case.y[~base]).all(-1).any()


@pytest.mark.parametrize("own_a", [False, True], ids=["shared A", "own A"])
@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_the_delta_is_vllms_own_where_every_token_has_an_adapter(name: str, own_a: bool) -> None:
    case = Case(BATCHES[name], own_a)
    torch.testing.assert_close(case.added_by_us(), case.added_by_vllm(), rtol=EXACT, atol=EXACT)


def test_vllm_still_gives_base_tokens_the_last_slot() -> None:
    case = Case(MIXED)
    base = torch.tensor([adapter == 0 for adapter in MIXED])
    assert not torch.allclose(case.added_by_vllm()[base], case.y[base]), (
        "vLLM mended index -1: the stand-in has one reason less"
    )


def test_a_slot_that_is_written_again_or_reset_holds_nothing_of_the_old_adapter() -> None:
    case = Case(DECODE)
    fresh = [torch.ones(width, RANK) for width in WIDTHS]
    case.ours.set_lora(2, [], fresh)
    for matrices, matrix in zip(case.b, fresh, strict=True):
        matrices[2] = matrix
    torch.testing.assert_close(case.added_by_us(), case.added_token_by_token(), rtol=EXACT, atol=EXACT)
    case.ours.reset_lora(2)
    assert torch.equal(case.added_by_us()[0], case.y[0])  # token 0 is under slot 2


def test_routes_say_where_each_adapted_token_goes() -> None:
    assert find_routes(torch.tensor([3, 1, 1, 0])).rows is None
    routes: Routes = find_routes(torch.tensor([1, -1, *[2] * RUN, 0, 0, -1]))
    assert routes.runs == ((2, 2, 2 + RUN),)
    assert routes.rows is not None and routes.rows.tolist() == [0, 2 + RUN, 3 + RUN]
    assert routes.slots.tolist() == [1, 0, 0]


def test_the_store_gives_back_what_was_put_and_refuses_what_was_not() -> None:
    from vllm.lora.request import LoRARequest

    draw = torch.Generator().manual_seed(1)
    a = {"left": torch.randn(RANK, D_IN, generator=draw), "right": torch.randn(RANK, D_IN, generator=draw)}
    store = AdapterStore(a, torch.float32)
    assert torch.equal(store.a_of(["right", "left"]), torch.cat([a["right"], a["left"]]))
    b = {"left": torch.randn(4, RANK, generator=draw), "right": torch.randn(6, RANK, generator=draw)}
    store.put("mem://one", b, {})
    request = LoRARequest("one", 7, "mem://one")
    loaded = store.load(request)
    assert loaded.id == 7 and all(
        torch.equal(loaded.loras[name].lora_b, b[name]) and loaded.loras[name].scaling == 1 for name in b
    )
    own = {name: torch.randn(RANK, D_IN, generator=draw) for name in a}
    store.put("mem://two", b, own)
    again = store.load(LoRARequest("two", 8, "mem://two"))
    assert all(
        torch.equal(loaded.loras[name].lora_a, a[name]) and torch.equal(again.loras[name].lora_a, own[name])
        for name in a
    )
    store.drop("mem://two")
    store.put("mem://two", b, {})  # nothing of the dropped revision is left: A is the basis again
    assert torch.equal(store.load(LoRARequest("two", 9, "mem://two")).loras["left"].lora_a, a["left"])
    store.drop("mem://one")
    with pytest.raises(EngineError, match="mem://one is not in the store"):
        store.load(request)


class Worker:
    """The part of an engine that AdapterTable uses; ``held`` are the paths in the worker's store."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.removed: list[int] = []

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> None:
        if method == "engram_put":
            self.held.add(args[0])
        elif method == "engram_drop":
            self.held.remove(args[0])
        elif method == "engram_clear":
            self.held.clear()

    def remove_lora(self, number: int) -> None:
        self.removed.append(number)


NOTHING = AdapterTensors({}, {})


def test_a_released_adapter_stays_in_the_worker_while_a_request_runs_under_it() -> None:
    """vLLM may have to read it again after an eviction; no new request may name it."""
    worker: Any = Worker()
    table, key, other = AdapterTable(3), AdapterKey(3, "a", 1), AdapterKey(3, "b", 1)
    for name in (key, other):
        table.put(worker, name, NOTHING)
    table.drop(worker, [key, AdapterKey(3, "ghost", 1)], running={key.name})
    assert worker.held == {"mem://v3/a@1", "mem://v3/b@1"} and worker.removed == []
    with pytest.raises(EngineError, match="v3/a@1 was released"):
        table.find(key)
    table.drop(worker, [], running=set())
    request = table.find(other)
    assert worker.held == {"mem://v3/b@1"} and request is not None
    assert len(worker.removed) == 1 and request.lora_int_id not in worker.removed


def test_names_and_numbers_of_adapters_never_come_back() -> None:
    worker: Any = Worker()
    table, key = AdapterTable(3), AdapterKey(3, "a", 1)
    table.put(worker, key, NOTHING)
    first = table.find(key)
    table.drop(worker, [key], running=set())
    table.start_version(worker, 3)  # the same version again: its names are still used
    with pytest.raises(EngineError, match="v3/a@1 was installed before"):
        table.put(worker, key, NOTHING)
    table.start_version(worker, 4)
    assert worker.held == set()
    with pytest.raises(EngineError, match="belongs to policy version 3, the engine is at 4"):
        table.put(worker, key, NOTHING)
    table.put(worker, AdapterKey(4, "a", 1), NOTHING)
    again = table.find(AdapterKey(4, "a", 1))
    assert first is not None and again is not None and first.lora_int_id != again.lora_int_id
    table.check_successor(4)
    with pytest.raises(EngineError, match="cannot refresh to version 3: the engine is at 4"):
        table.check_successor(3)


def test_adapters_outlive_refreshes_in_flight_up_to_a_bound() -> None:
    worker: Any = Worker()
    table, old = AdapterTable(0), AdapterKey(0, "a", 1)
    table.put(worker, old, NOTHING)
    for version in range(1, OLDEST_KEY + 1):
        table.follow_on(version)
    assert table.find(old) is not None and worker.held == {"mem://v0/a@1"}
    table.put(worker, AdapterKey(0, "a", 2), NOTHING)  # its episode goes on writing
    with pytest.raises(EngineError, match="v0/a@1 was installed before"):
        table.put(worker, old, NOTHING)
    table.follow_on(OLDEST_KEY + 1)
    with pytest.raises(EngineError, match=f"version 0, the engine is at {OLDEST_KEY + 1}"):
        table.find(old)


def test_vllm_imports_the_worker_extension_by_its_name() -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from actors.engine.vllm_internals.worker_extension import EngramWorker

    assert resolve_obj_by_qualname(WORKER_EXTENSION) is EngramWorker
