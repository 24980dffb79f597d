"""New weights by broadcast: who gets them, and what the object store is for. Gloo between threads, no Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from actors.types import PolicyVersion
from actors.weight_transfer import Receiver, Rendezvous, Sender, TorchCollective
from cluster.fleet.broadcast import ObjectStoreChannel, ObjectStoreWeights
from cluster.fleet.collective import CollectiveChannel
from learner.types import LearnerError, LearnerLost

PATIENCE_S = 60.0


class Learner:
    """Rank 0 with one matrix. ``stored``: what a Ray object store would hold, by reference."""

    def __init__(self) -> None:
        self.version: PolicyVersion = 0
        self.stored = dict[str, dict[str, Tensor]]()
        self.waited, self.sizes = list[bool](), list[int]()
        self.lost = self.unreachable = False
        self._sender: Sender | None = None

    def step(self) -> None:
        self.version += 1

    def restart(self) -> None:
        """Its processes are new ones."""
        if self._sender is not None:
            self._sender.close()
        self._sender, self.lost = None, False

    def weights_ref(self, trainable_only: bool, wait: bool = True) -> Any:
        self._check()
        reference = f"ref-{self.version}"
        self.stored[reference] = self._weights()
        self.waited.append(wait)
        return reference

    def open_transfer(self, size: int, backend: Literal["gloo", "nccl"]) -> Rendezvous:
        self._check()
        if self.unreachable:
            raise LearnerError("no group can meet at the learner's node")
        self.sizes.append(size)
        self._sender = Sender("127.0.0.1", size, backend)
        return self._sender.meeting

    def send_weights(self, transfer: str, trainable_only: bool, deadline_s: float) -> str:
        self._check()
        if self._sender is None:
            return "the learner has started again and has no group"
        tensors = self._weights()
        manifest = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        return self._sender.send(transfer, manifest, tensors.items(), deadline_s)

    def _weights(self) -> dict[str, Tensor]:
        return {f"{name}.weight": torch.full((50, 7), self.version + 0.5) for name in "abc"}

    def _check(self) -> None:
        if self.lost:
            raise LearnerLost("learner: a rank's process died")


class Dying:
    """A membership that ends in the middle of a transfer."""

    def __init__(self, meeting: Rendezvous, store: Store, rank: int, deadline: float) -> None:
        self._inner, self._left = TorchCollective(meeting, store, rank, deadline), 1
        self.device = self._inner.device

    def broadcast(self, flat: Tensor, deadline: float) -> None:
        if not self._left:
            raise RuntimeError("killed")
        self._left -= 1
        self._inner.broadcast(flat, deadline)

    def close(self) -> None:
        self._inner.close()


class Engine:
    """A worker whose engine records what it loads, and which way that came."""

    def __init__(self, name: str, learner: Learner, dies: bool = False) -> None:
        self.name, self._learner = name, learner
        self._receiver = Receiver(Dying if dies else TorchCollective)
        self._thread = ThreadPoolExecutor(1)
        self.silent = False
        self.loaded = list[tuple[float, str]]()

    def receive(self, meeting: Rendezvous, rank: int, transfer: str, deadline_s: float) -> Future[None]:
        if self.silent:
            return Future()
        return self._thread.submit(self._receiver.receive, meeting, rank, transfer, deadline_s)

    def refresh(self, weights: ObjectStoreWeights) -> tuple[float, str]:
        """As RolloutWorker does, with the learner's references in the place of Ray's."""
        received: Mapping[str, Tensor] | None = self._receiver.take(weights.transfer)
        way = "store" if received is None else "broadcast"
        tensors = self._learner.stored[str(weights.ref)] if received is None else received
        assert len(tensors) == 3, "no version is loaded in part"
        (value,) = {float(value) for tensor in tensors.values() for value in tensor.unique()}
        self.loaded.append((value, way))
        return self.loaded[-1]


class Cluster:
    """A learner, engines and the channel between them."""

    def __init__(self, deadline_s: float = PATIENCE_S) -> None:
        self.learner, self.said = Learner(), list[str]()
        self.engines = [Engine("worker-0", self.learner), Engine("worker-1", self.learner)]
        store = ObjectStoreChannel(trainable_only=False)
        self.channel = CollectiveChannel(
            store, self.learner, lambda: list(self.engines), "gloo", self.said.append, deadline_s
        )

    def publish(self) -> ObjectStoreWeights:
        self.learner.step()
        return self.channel.publish(self.learner)

    def refresh(self) -> list[tuple[float, str]]:
        weights = self.publish()
        assert weights.version == self.learner.version and self.channel.newest is weights
        return [engine.refresh(weights) for engine in self.engines]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    yield Cluster()


def test_one_group_serves_versions_and_the_store_has_them_too(cluster: Cluster) -> None:
    assert cluster.refresh() == [(1.5, "broadcast")] * 2
    assert cluster.refresh() == [(2.5, "broadcast")] * 2
    assert cluster.learner.sizes == [3], "one group"
    assert list(cluster.learner.stored) == ["ref-1", "ref-2"] and cluster.learner.waited == [False, False]
    assert cluster.channel.metrics() == {"sync/collective_received": 4, "sync/collective_missed": 0}
    assert cluster.said == []


def test_a_worker_that_joins_late_fetches_and_then_belongs_to_a_new_group(cluster: Cluster) -> None:
    weights = cluster.publish()
    late = Engine("worker-2", cluster.learner)
    assert late.refresh(weights) == (1.5, "store")
    cluster.engines.append(late)
    assert cluster.refresh() == [(2.5, "broadcast")] * 3
    del cluster.engines[0]  # and one that has ended belongs to none
    assert cluster.refresh() == [(3.5, "broadcast")] * 2
    assert cluster.learner.sizes == [3, 4, 3] and cluster.said == []


def test_after_a_death_in_the_middle_the_others_load_a_whole_version(cluster: Cluster) -> None:
    """They may have it already, or not: the last bytes to the dead one may be on their way when it dies."""
    cluster.engines[1] = Engine("worker-1", cluster.learner, dies=True)
    weights = cluster.publish()
    value, way = cluster.engines[0].refresh(weights)
    assert value == 1.5
    received = int(way == "broadcast")
    assert cluster.learner.waited == [not received], "with nobody that has it, the store must have it first"
    (said,) = cluster.said
    assert said.startswith(f"the broadcast of version 1 did not reach {2 - received} of 2 workers (")
    assert "worker-1: killed" in said and said.endswith("they take it from the object store")
    counted = {"sync/collective_received": received, "sync/collective_missed": 2 - received}
    assert cluster.channel.metrics() == counted
    cluster.engines[1] = Engine("worker-2", cluster.learner)  # its replacement
    assert cluster.refresh() == [(2.5, "broadcast")] * 2
    assert cluster.learner.sizes == [3, 3]


def test_broadcasts_that_fail_three_times_in_a_row_are_given_up() -> None:
    cluster = Cluster(deadline_s=0.3)
    cluster.engines[1].silent = True
    for version in (1, 2, 3, 4):
        assert cluster.refresh() == [(version + 0.5, "store")] * 2
    assert cluster.learner.sizes == [3, 3, 3], "the fourth was not tried"
    assert len(cluster.said) == 4
    assert "worker-1: no answer" in cluster.said[0]
    assert cluster.said[-1] == "3 broadcasts in a row failed: the object store from now on"


def test_a_learner_that_cannot_be_met_is_no_lost_learner(cluster: Cluster) -> None:
    cluster.learner.unreachable = True
    assert cluster.refresh() == [(1.5, "store")] * 2
    reason = "(the learner: no group can meet at the learner's node): they take it from the object store"
    assert cluster.said == [f"the broadcast of version 1 did not reach 2 of 2 workers {reason}"]
    cluster.learner.unreachable = False
    assert cluster.refresh() == [(2.5, "broadcast")] * 2


def test_a_version_that_was_overtaken_is_never_loaded_for_another(cluster: Cluster) -> None:
    first, second = cluster.publish(), cluster.publish()
    assert cluster.engines[0].refresh(first) == (1.5, "store"), "the second has taken its place"
    assert cluster.engines[0].refresh(second) == (2.5, "broadcast")
    assert cluster.engines[0].refresh(second) == (2.5, "store"), "loaded again after an evaluation"


def test_a_learner_that_was_lost_gets_a_new_group(cluster: Cluster) -> None:
    assert cluster.refresh() == [(1.5, "broadcast")] * 2
    cluster.learner.lost = True
    with pytest.raises(LearnerLost):
        cluster.publish()
    cluster.learner.restart()
    assert cluster.refresh() == [(3.5, "broadcast")] * 2
    cluster.learner.restart()  # lost in a step, of which the channel did not hear
    assert [way for _, way in cluster.refresh()] == ["store", "store"]
    assert "the learner has started again and has no group" in cluster.said[0]
    assert cluster.refresh() == [(5.5, "broadcast")] * 2
