"""A worker's process that records the weights it is given. A file of its own: it imports little."""

from __future__ import annotations

import os

import ray
from torch import Tensor

from actors.weight_transfer import Receiver, Rendezvous, TorchCollective
from cluster.fleet.broadcast import ObjectStoreWeights


class Dying(TorchCollective):
    _joined = False

    def broadcast(self, flat: Tensor, deadline: float) -> None:
        if self._joined:
            os._exit(1)
        self._joined = True
        super().broadcast(flat, deadline)


@ray.remote(num_cpus=0, max_restarts=0)
class Engine:
    """A worker that records what it loads; one that ``dies`` does so at its second broadcast."""

    def __init__(self, dies: bool) -> None:
        self._receiver = Receiver(Dying if dies else TorchCollective)

    def receive(self, meeting: Rendezvous, rank: int, transfer: str, deadline_s: float) -> None:
        self._receiver.receive(meeting, rank, transfer, deadline_s)

    def refresh(self, weights: ObjectStoreWeights) -> tuple[str, dict[str, Tensor]]:
        received = self._receiver.take(weights.transfer)
        if received is None:
            return "store", dict(weights.fetch(60))
        return "broadcast", dict(weights.formed(received))
