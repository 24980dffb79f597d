"""Weights by collective broadcasts, with gloo between threads: whole, late, broken in the middle."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Store

from actors import weight_transfer
from actors.weight_transfer import Manifest, Receiver, Rendezvous, Sender, TorchCollective, TransferError
from tests.unit.test_loop_worker import Bench, Weights

PATIENCE_S = 60.0


def weights(version: int) -> dict[str, Tensor]:
    """Two dtypes, a scalar, and a matrix of several slices (see ``slices``)."""
    draw = torch.Generator().manual_seed(version)
    return {
        "embed.weight": torch.randn(97, 31, generator=draw),
        "norm.weight": torch.randn(31, generator=draw).bfloat16(),
        "scale": torch.tensor(float(version)),
    }


def manifest(tensors: dict[str, Tensor]) -> Manifest:
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


@pytest.fixture(autouse=True)
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_transfer, "SLICE_BYTES", 1000)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def sender(receivers: int) -> Sender:
    return Sender("127.0.0.1", 1 + receivers, "gloo")


def start(
    pool: ThreadPoolExecutor,
    root: Sender,
    receivers: list[Receiver],
    transfer: str,
    deadline_s: float = PATIENCE_S,
) -> list[Future[None]]:
    return [
        pool.submit(receiver.receive, root.meeting, rank, transfer, deadline_s)
        for rank, receiver in enumerate(receivers, 1)
    ]


def equal(got: dict[str, Tensor] | None, sent: dict[str, Tensor]) -> bool:
    return (
        got is not None
        and list(got) == list(sent)
        and all(got[name].dtype == sent[name].dtype and torch.equal(got[name], sent[name]) for name in sent)
    )


class Mortal:
    """A receiver's membership that ends before its broadcast number ``last``."""

    last = 2

    def __init__(self, meeting: Rendezvous, store: Store, rank: int, deadline: float) -> None:
        self._inner, self._count = TorchCollective(meeting, store, rank, deadline), 0
        self.device = self._inner.device

    def broadcast(self, flat: Tensor, deadline: float) -> None:
        self._count += 1
        if self._count > self.last:
            raise RuntimeError("killed")
        self._inner.broadcast(flat, deadline)

    def close(self) -> None:
        self._inner.close()


class Elsewhere(TorchCollective):
    """A membership whose device is not the host's memory, as a GPU is not."""

    def __init__(self, meeting: Rendezvous, store: Store, rank: int, deadline: float) -> None:
        super().__init__(meeting, store, rank, deadline)
        self.device = torch.device("cpu", 0)

    def broadcast(self, flat: Tensor, deadline: float) -> None:
        assert flat.untyped_storage().nbytes() <= 1000, "it arrives in one slice's memory"
        super().broadcast(flat, deadline)


def test_what_arrives_in_a_devices_memory_is_copied_slice_by_slice(pool: ThreadPoolExecutor) -> None:
    root, receiver, sent = sender(1), Receiver(Elsewhere), weights(1)
    calls = start(pool, root, [receiver], "1.1")
    assert root.send("1.1", manifest(sent), sent.items(), PATIENCE_S) == ""
    calls[0].result(PATIENCE_S)
    assert equal(receiver.take("1.1"), sent)


def test_one_group_brings_several_versions_to_the_bit(pool: ThreadPoolExecutor) -> None:
    root, receivers = sender(2), [Receiver(), Receiver()]
    for version in (1, 2):
        sent = weights(version)
        calls = start(pool, root, receivers, f"1.{version}")
        assert root.send(f"1.{version}", manifest(sent), sent.items(), PATIENCE_S) == ""
        for call, receiver in zip(calls, receivers, strict=True):
            call.result(PATIENCE_S)
            assert receiver.take("1.0") is None, "another transfer's"
            assert equal(receiver.take(f"1.{version}"), sent)
            assert receiver.take(f"1.{version}") is None, "it is given once"


def test_a_receiver_that_dies_in_the_middle_leaves_nothing_half_received(pool: ThreadPoolExecutor) -> None:
    root, receivers = sender(2), [Receiver(), Receiver(Mortal)]
    sent, gathered = {f"{number}.weight": torch.ones(10) for number in range(200)}, list[str]()
    calls = start(pool, root, receivers, "1.1")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in sent.items():
            if len(gathered) == Mortal.last:  # what goes to it later would be lost in a socket's buffer
                wait(calls[1:], PATIENCE_S)
            gathered.append(name)
            yield name, tensor

    assert root.send("1.1", manifest(sent), tensors(), PATIENCE_S).startswith("at ")
    assert gathered == list(sent), "other ranks wait for the gathers that are left"
    for call in calls:
        with pytest.raises(TransferError):
            call.result(PATIENCE_S)
    assert [receiver.take("1.1") for receiver in receivers] == [None, None]

    again = root.send("1.2", manifest(sent), sent.items(), PATIENCE_S)
    assert again == "its group has failed before"
    smaller = sender(1)  # the one that lives forms a new group
    calls = start(pool, smaller, receivers[:1], "2.1")
    assert smaller.send("2.1", manifest(sent), sent.items(), PATIENCE_S) == ""
    calls[0].result(PATIENCE_S)
    assert equal(receivers[0].take("2.1"), sent)


def test_a_member_that_never_comes_ends_with_the_deadline(pool: ThreadPoolExecutor) -> None:
    root, receiver, sent = sender(2), Receiver(), weights(1)
    calls = start(pool, root, [receiver], "1.1", deadline_s=1.0)
    assert root.send("1.1", manifest(sent), sent.items(), 1.0) != ""
    with pytest.raises(TransferError):
        calls[0].result(PATIENCE_S)
    assert receiver.take("1.1") is None


class Hanging(TorchCollective):
    """A membership that stands still in its second transfer until it is let go."""

    go = threading.Event()
    whole = 0  # broadcasts of the first transfer

    def broadcast(self, flat: Tensor, deadline: float) -> None:
        Hanging.whole -= 1
        if Hanging.whole < 0:
            self.go.wait(PATIENCE_S)
        super().broadcast(flat, deadline)


def test_a_member_that_hangs_costs_the_transfers_deadline_and_not_the_groups(
    pool: ThreadPoolExecutor,
) -> None:
    root, receiver, sent = sender(1), Receiver(Hanging), weights(1)
    Hanging.whole = sum(-(-tensor.nbytes // 1000) for tensor in sent.values())
    calls = start(pool, root, [receiver], "1.1")
    assert root.send("1.1", manifest(sent), sent.items(), PATIENCE_S) == ""
    calls[0].result(PATIENCE_S)
    calls = start(pool, root, [receiver], "1.2", deadline_s=1.0)
    began = time.monotonic()
    # more than the sockets take in while nobody reads
    large = {"large": torch.zeros(5_000_000)}
    try:
        assert root.send("1.2", manifest(large), large.items(), 1.0) != ""
        assert time.monotonic() - began < PATIENCE_S / 2, "it waited for the deadline at which the group met"
    finally:
        Hanging.go.set()
    with pytest.raises(TransferError):
        calls[0].result(PATIENCE_S)


def test_the_meeting_is_open_at_its_own_address_alone() -> None:
    root = sender(1)
    with socket.create_connection(("127.0.0.1", root.meeting.port), timeout=PATIENCE_S):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", root.meeting.port), timeout=PATIENCE_S)
    with pytest.raises(RuntimeError, match=r"cannot listen at 198\.51\.100\.7"):
        Sender("198.51.100.7", 2, "gloo")


def test_a_root_that_is_gone_is_an_error_of_the_transfer(pool: ThreadPoolExecutor) -> None:
    root, receiver, sent = sender(1), Receiver(), weights(1)
    calls = start(pool, root, [receiver], "1.1")
    assert root.send("1.1", manifest(sent), sent.items(), PATIENCE_S) == ""
    calls[0].result(PATIENCE_S)
    meeting = root.meeting
    root.close()
    del root
    with pytest.raises(TransferError):
        receiver.receive(meeting, 1, "1.2", 2.0)
    assert receiver.take("1.1") is None, "it was given up for the next one"


def test_received_weights_are_loaded_once_and_others_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = {"w": torch.full((3,), 7.0)}

    async def body() -> None:
        bench, root = Bench(monkeypatch), Sender("127.0.0.1", 2, "gloo")
        receiving = asyncio.create_task(bench.worker.receive(root.meeting, 1, "1.1", 60))
        assert await asyncio.to_thread(root.send, "1.1", manifest(sent), sent.items(), 60) == ""
        await receiving
        weights = Weights(1)
        weights.transfer = "1.1"
        await bench.worker.refresh(weights, 5)
        assert torch.equal(bench.policy.tensors["formed.w"], sent["w"])
        weights = Weights(2, {"fetched": torch.ones(2)})
        weights.transfer = "1.2"  # this one it did not receive
        await bench.worker.refresh(weights, 5)
        assert list(bench.policy.tensors) == ["fetched"]

    asyncio.run(body())


def test_a_gpu_group_is_nccls_and_its_watchdog_does_not_end_the_process() -> None:
    """Without a GPU: how the group is made, not that it works."""
    made = list[tuple[object, ...]]()

    class Fake:
        Options = SimpleNamespace

        def __init__(self, *arguments: object) -> None:
            made.append((*arguments, os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")))

    store = HashStore()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._C._distributed_c10d.ProcessGroupNCCL", Fake, raising=False)
        patch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
        store.set("here/1", "")
        deadline = time.monotonic() + PATIENCE_S
        group = TorchCollective(Rendezvous("127.0.0.1", 1, 2, "nccl"), store, 0, deadline)
        assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ
    ((_, rank, size, options, handling),) = made
    assert (rank, size, handling, group.device) == (0, 2, "0", torch.device("cuda", 0))
    assert options._timeout > timedelta(minutes=30)  # type: ignore[attr-defined]
