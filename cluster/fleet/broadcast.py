"""Brings new weights to every rollout worker: the driver *publishes* a version, each worker *fetches* it.

    learner rank 0 --> object store --(shared memory on a node, network between nodes)--> workers

A published version is a small handle; the tensors never pass through the driver. Ray's object store works on
any hardware. collective.py brings them to the workers before they fetch, and the store is its fallback.
Invariant: a handle's tensors are those of its version, whenever they are fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from actors.types import PolicyVersion

if TYPE_CHECKING:
    from ray import ObjectRef
    from torch import Tensor

    from actors.policy_lora import LoraBase


class WeightSource(Protocol):
    """What a channel asks of the learner."""

    @property
    def version(self) -> PolicyVersion: ...

    def weights_ref(self, trainable_only: bool) -> ObjectRef[dict[str, Tensor]]:
        """A reference to the weights by Hugging Face name, in the object store when this returns."""
        ...


class Channel(Protocol):
    """The way of new weights from the learner to the workers."""

    def publish(self, source: WeightSource) -> ObjectStoreWeights:
        """Make the source's present weights available under its version.

        The source may go on when this returns: what it does next does not change them.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What a step logs about the way of its weights."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ObjectStoreWeights:
    """A published version (actors.worker.PublishedWeights). Dropping the last handle frees the tensors.

    ``base``: the tensors are the factors of a LoRA on it; None where they are the weights themselves.
    ``transfer``: the collective transfer that brought them to some workers already; "": none did.
    """

    version: PolicyVersion
    complete: bool
    ref: ObjectRef[dict[str, Tensor]]
    base: LoraBase | None = None
    transfer: str = ""

    def fetch(self, timeout_s: float) -> Mapping[str, Tensor]:
        """The tensors, read-only views of shared memory, or formed from such views when asked for.

        Blocks at most ``timeout_s``; raises TimeoutError (Ray's own) after that, and EngineError where the
        base weights on this node do not fit the factors.
        """
        import ray

        tensors: dict[str, Tensor] = ray.get(self.ref, timeout=timeout_s)
        return self.formed(tensors)

    def formed(self, received: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What ``fetch`` would return, from ``received``: tensors that came another way."""
        return received if self.base is None else self.base.with_factors(received)


class ObjectStoreChannel:
    """Ray's object store as a channel; it holds on to the newest version, for workers that start later.

    ``trainable_only`` leaves out what training never changes: the workers have it from the base model. With
    ``base`` the source trains a LoRA on it, and only the factors travel.
    """

    def __init__(self, trainable_only: bool, base: LoraBase | None = None) -> None:
        self.trainable_only, self._base = trainable_only, base
        self.newest: ObjectStoreWeights | None = None

    def publish(self, source: WeightSource) -> ObjectStoreWeights:
        return self.hold(source.version, source.weights_ref(self.trainable_only))

    def hold(
        self, version: PolicyVersion, ref: ObjectRef[dict[str, Tensor]], transfer: str = ""
    ) -> ObjectStoreWeights:
        """Make the tensors behind ``ref`` the newest version."""
        self.newest = ObjectStoreWeights(version, not self.trainable_only, ref, self._base, transfer)
        return self.newest

    def metrics(self) -> dict[str, float]:
        return {}
