"""Carries the policy's weights from the learner to the rollout workers by collective broadcasts.

    Sender (learner rank 0, root)  --manifest: names, dtypes, shapes--> TCPStore --> Receiver (each worker)
                                   --the tensors, in slices--> gloo or NCCL broadcast -->     |
                                                                    take(transfer): all tensors, or None

Everybody has a deadline. A receiver keeps the tensors of a whole transfer or none of it, so nothing of a
broken one can reach an engine. A group that has failed is closed; the next transfer needs a new one.

Why not vLLM's own ``nccl`` and ``ipc`` weight-transfer engines (0.32): they load while they receive. A peer
that dies would leave the model half loaded, and all engines must stop together. Here the tensors wait beside
the engine until its worker has drained. Then they go in by vLLM's weight-transfer interface
(engine/vllm_internals/transfer.py), as those from the object store do.

Checked with gloo on a CPU (tests/unit/test_weight_transfer.py). The NCCL way has not run on a GPU yet. Its
first broadcast connects the group, and waits without a deadline for a peer that dies in these milliseconds.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import BroadcastOptions, ProcessGroupGloo, Store, TCPStore

SLICE_BYTES = 2**28
"""The most that one broadcast carries. A receiver on a GPU holds so much of it there at a time."""

Manifest = Sequence[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, dtype and shape of each tensor, in the order in which they travel."""

_POLL_S = 2e-4
_LISTEN_S = 60.0
_HOST = torch.device("cpu")


class TransferError(RuntimeError):
    """A transfer did not arrive whole. The message says where it broke."""


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where a group meets: rank 0's store. ``size`` counts rank 0 and the receivers."""

    host: str
    port: int
    size: int
    backend: Literal["gloo", "nccl"]


class Collective(Protocol):
    """A group of processes with one root, rank 0."""

    device: torch.device

    def broadcast(self, flat: Tensor, deadline: float) -> None:
        """Bring the root's bytes into everybody's ``flat`` (uint8, on ``device``).

        Raises RuntimeError when a peer is gone, and at ``deadline`` (of time.monotonic).
        """
        ...

    def close(self) -> None:
        """Leave the group, whatever the peers do."""
        ...


class TorchCollective:
    """A group of torch.distributed, apart from the default one that a process may have.

    Blocks until all ``meeting.size`` members are there, at most until ``deadline``.
    """

    def __init__(self, meeting: Rendezvous, store: Store, rank: int, deadline: float) -> None:
        # NCCL would wait without end for a member that is not there.
        store.set(f"here/{rank}", "")
        store.wait([f"here/{member}" for member in range(meeting.size)], _left(deadline))
        if meeting.backend == "nccl":
            self.device = torch.device("cuda", 0)  # Ray shows each process its own GPU alone
            self._group: Any = _nccl_group(store, rank, meeting.size)
        else:
            self.device = _HOST
            self._group = _gloo_group(meeting, store, rank, deadline)

    def broadcast(self, flat: Tensor, deadline: float) -> None:
        options = BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        options.timeout = _left(deadline)  # gloo counts the group's own anew for each broadcast
        work = self._group.broadcast([flat], options)
        # Asked again and again: a wait for a peer that died in NCCL would never end.
        try:
            while not work.is_completed():
                _left(deadline)
                time.sleep(_POLL_S)
            work.wait()
        finally:
            del work  # it holds gloo's connections, and an error would hold this frame

    def close(self) -> None:
        group, self._group = self._group, None  # gloo's connections end with their last holder
        if self.device.type == "cuda":
            group.abort()


class Sender:
    """The learner's end: rank 0 of one group, which meets at a store that it serves.

    Raises RuntimeError where ``host`` is no address at which this process can be reached.
    """

    def __init__(self, host: str, size: int, backend: Literal["gloo", "nccl"]) -> None:
        try:  # TCPStore by itself would listen on every interface
            listening = socket.create_server((host, 0), family=_family(host))
        except OSError as error:
            raise RuntimeError(f"cannot listen at {host} ({error})") from error
        port = listening.getsockname()[1]
        self._store = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=_LISTEN_S),
            master_listen_fd=listening.detach(),
        )
        self.meeting = Rendezvous(host, port, size, backend)
        self._group: Collective | None = None
        self._used: list[str] = []  # the store's keys of the last transfer
        self._closed = False

    def send(
        self,
        transfer: str,
        manifest: Manifest,
        tensors: Iterable[tuple[str, Tensor]],
        deadline_s: float,
    ) -> str:
        """Broadcast ``tensors``, those of ``manifest`` in its order. Return "", or how it failed.

        It goes through ``tensors`` to the end in any case: other ranks may be helping to gather them.
        """
        deadline, fault = time.monotonic() + deadline_s, ""
        try:
            group = self._begin(transfer, manifest, deadline)
        except RuntimeError as error:
            fault = self._failed(error)
        for name, tensor in tensors:
            if fault:
                continue
            try:
                flat = _bytes_of(tensor.detach().to(group.device).contiguous())
                for part in flat.split(SLICE_BYTES):
                    group.broadcast(part, deadline)
            except RuntimeError as error:
                fault = f"at {name}: {self._failed(error)}"
        return fault

    def close(self) -> None:
        """End the group. Its members notice at their next broadcast."""
        self._closed = True
        if self._group is not None:
            self._group.close()
            self._group = None

    def _begin(self, transfer: str, manifest: Manifest, deadline: float) -> Collective:
        if self._closed:
            raise TransferError("its group has failed before")
        if self._group is None:
            self._group = TorchCollective(self.meeting, self._store, 0, deadline)
        for key in self._used:
            self._store.delete_key(key)
        ready = [_ready(transfer, rank) for rank in range(1, self.meeting.size)]
        self._used = [transfer, *ready]
        named = [(name, str(dtype).removeprefix("torch."), shape) for name, dtype, shape in manifest]
        self._store.set(transfer, json.dumps(named))
        # NCCL would wait without end for a receiver that found no memory.
        self._store.wait(ready, _left(deadline))
        return self._group

    def _failed(self, error: RuntimeError) -> str:
        self.close()
        return _first_line(error)


Join = Callable[[Rendezvous, Store, int, float], Collective]


class Receiver:
    """A worker's end. It holds the tensors of one transfer at most, in host memory.

    ``receive`` blocks: one call at a time, on a thread of its own. ``take`` may be called from any thread.
    """

    def __init__(self, join: Join = TorchCollective) -> None:
        self._join = join
        self._lock = threading.Lock()
        self._staged: tuple[str, dict[str, Tensor]] | None = None
        self._meeting: Rendezvous | None = None
        self._store: Store | None = None
        self._group: Collective | None = None

    def receive(self, meeting: Rendezvous, rank: int, transfer: str, deadline_s: float) -> None:
        """Take part in a broadcast as ``rank``. Raises TransferError, and nothing is kept then.

        What an earlier transfer brought is given up first: two of them would double the memory.
        """
        deadline = time.monotonic() + deadline_s
        self._keep(None)
        try:
            group = self._joined(meeting, rank, deadline)
            self._keep((transfer, self._receive(group, rank, transfer, deadline)))
        except RuntimeError as error:
            self.leave()
            raise TransferError(_first_line(error)) from error

    def take(self, transfer: str) -> dict[str, Tensor] | None:
        """The tensors of ``transfer``, once; None where they are not here."""
        with self._lock:
            if self._staged is None or self._staged[0] != transfer:
                return None
            (_, tensors), self._staged = self._staged, None
            return tensors

    def leave(self) -> None:
        """End the membership. The next ``receive`` joins anew."""
        if self._group is not None:
            self._group.close()
        self._group = self._store = self._meeting = None

    def _keep(self, staged: tuple[str, dict[str, Tensor]] | None) -> None:
        with self._lock:
            self._staged = staged

    def _joined(self, meeting: Rendezvous, rank: int, deadline: float) -> Collective:
        if self._group is not None and self._meeting == meeting:
            return self._group
        self.leave()
        self._store = TCPStore(
            meeting.host,
            meeting.port,
            is_master=False,
            wait_for_workers=False,
            timeout=_left(deadline),
        )
        self._group = self._join(meeting, self._store, rank, deadline)
        self._meeting = meeting
        return self._group

    def _receive(self, group: Collective, rank: int, transfer: str, deadline: float) -> dict[str, Tensor]:
        assert self._store is not None, "the group was joined there"
        self._store.wait([transfer], _left(deadline))
        manifest = json.loads(self._store.get(transfer))
        in_place = group.device == _HOST
        # Not pinned: torch rounds pinned memory up to powers of two, and never gives it back.
        tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, dtype, shape in manifest}
        largest = 0 if in_place else max((tensor.nbytes for tensor in tensors.values()), default=0)
        scratch = torch.empty(min(SLICE_BYTES, largest), dtype=torch.uint8, device=group.device)
        self._store.set(_ready(transfer, rank), "")
        for tensor in tensors.values():
            for part in _bytes_of(tensor).split(SLICE_BYTES):
                arriving = part if in_place else scratch[: len(part)]
                group.broadcast(arriving, deadline)
                if not in_place:
                    part.copy_(arriving)
        return tensors


def _ready(transfer: str, rank: int) -> str:
    """The key that says that a receiver has the memory for a transfer."""
    return f"{transfer}/{rank}"


def _bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a contiguous ``tensor``, flat."""
    return tensor.view(-1).view(torch.uint8)


def _left(deadline: float) -> timedelta:
    """The time until ``deadline``. Raises TransferError when it has passed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TransferError("the deadline has passed")
    return timedelta(seconds=seconds)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _gloo_group(meeting: Rendezvous, store: Store, rank: int, deadline: float) -> Any:
    """A group that listens where this process reaches the meeting, not where the host's name points."""
    left = _left(deadline)
    try:
        with socket.create_connection((meeting.host, meeting.port), left.total_seconds()) as way:
            here = way.getsockname()[0]
    except OSError as error:
        raise TransferError(f"the meeting at {meeting.host}:{meeting.port} is gone ({error})") from error
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=here)]
    options._timeout = left
    return ProcessGroupGloo(store, rank, meeting.size, options)


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None)[0][0]


def _nccl_group(store: Store, rank: int, size: int) -> Any:
    """A group that connects at its first broadcast. Its deadlines are those of ``broadcast``."""
    from torch._C._distributed_c10d import ProcessGroupNCCL  # torch's CPU builds have none

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(hours=1)
    with _no_watchdog():
        return ProcessGroupNCCL(store, rank, size, options)


@contextmanager
def _no_watchdog() -> Iterator[None]:
    """Let NCCL groups that are made in the block never end their process when a peer is gone.

    torch's default is to end it. A learner must outlive a worker.
    """
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
