"""Broadcasts new weights to all workers at once, with the object store for those that it does not reach.

    publish:  members as before?  no --> the learner opens a new group; each worker joins when it receives
                                  |
              broadcast: learner rank 0 --> the workers that are up, beside their episodes
                                  |
                     all have it  |  one died, is late or failed: the group is given up
                                  v
              a handle: a worker with the tensors loads those; any other fetches from the object store

    what happens                              what follows
    a worker starts between two versions      it fetches the newest; the next version has a new group
    a worker dies in the middle               the root and the others end at the latest with ``deadline_s``
    the learner dies                          LearnerLost, as everywhere; after its restart a new group
    three versions in a row fail              the object store, for the rest of the run

Invariant: the object store gets every version too. It does so after the broadcast, while the workers load.

Every wait, and who ends it:
    the root and the receivers, for each other      ``deadline_s``
    publish, for the learner                        ``deadline_s`` and learner.step_timeout_s
    publish, for the receivers                      ``deadline_s``
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from cluster.fleet.broadcast import ObjectStoreChannel, ObjectStoreWeights, WeightSource
from learner.types import LearnerError, LearnerLost

if TYPE_CHECKING:
    from ray import ObjectRef
    from torch import Tensor

    from actors.weight_transfer import Rendezvous

DEADLINE_S = 60.0
_MOST_FAILURES = 3


class Broadcaster(WeightSource, Protocol):
    """What a broadcast asks of the learner (learner.worker.LearnerGroup). All raise LearnerLost."""

    def weights_ref(self, trainable_only: bool, wait: bool = True) -> ObjectRef[dict[str, Tensor]]:
        """As WeightSource. Without ``wait`` the store has them before the learner's next step."""
        ...

    def open_transfer(self, size: int, backend: Literal["gloo", "nccl"]) -> Rendezvous:
        """Open a group of ``size`` members. Raises LearnerError where that fails and the learner is whole."""
        ...

    def send_weights(self, transfer: str, trainable_only: bool, deadline_s: float) -> str:
        """Return "", or how it failed."""
        ...


class Member(Protocol):
    """What a broadcast asks of a worker."""

    @property
    def name(self) -> str: ...

    def receive(self, meeting: Rendezvous, rank: int, transfer: str, deadline_s: float) -> Future[None]:
        """Take part as ``rank``, without waiting."""
        ...


@dataclass(frozen=True, slots=True)
class _Group:
    meeting: Rendezvous
    names: tuple[str, ...]
    number: int


class CollectiveChannel:
    """Broadcasts from ``learner`` to ``members``, in front of an ObjectStoreChannel (broadcast.Channel).

    ``members`` gives the workers that are up. ``say`` is told of what did not arrive.
    """

    def __init__(
        self,
        store: ObjectStoreChannel,
        learner: Broadcaster,
        members: Callable[[], Sequence[Member]],
        backend: Literal["gloo", "nccl"],
        say: Callable[[str], None],
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._store, self._learner, self._members = store, learner, members
        self._backend, self._say, self._deadline_s = backend, say, deadline_s
        self._group: _Group | None = None
        self._groups = self._transfers = self._failures = 0
        self._received = self._missed = 0

    @property
    def newest(self) -> ObjectStoreWeights | None:
        return self._store.newest

    def publish(self, source: WeightSource) -> ObjectStoreWeights:
        """See Channel. Raises LearnerLost. What fails on a worker's side is said and counted."""
        if self._failures >= _MOST_FAILURES or not (members := self._members()):
            return self._store.publish(source)
        transfer, received = self._broadcast(source, members)
        trainable_only = self._store.trainable_only
        # Workers that have them need not wait until the store has them too.
        ref = self._learner.weights_ref(trainable_only, wait=received == 0)
        return self._store.hold(source.version, ref, transfer)

    def metrics(self) -> dict[str, float]:
        """Workers that had a version by a broadcast, and those that it should have reached; so far."""
        return {
            "sync/collective_received": float(self._received),
            "sync/collective_missed": float(self._missed),
        }

    def _broadcast(self, source: WeightSource, members: Sequence[Member]) -> tuple[str, int]:
        """Bring the weights to ``members``. Returns the transfer's name and how many received it."""
        try:
            group = self._group_of(members)
        except LearnerLost:
            raise
        except LearnerError as error:
            self._missed += len(members)
            self._failed(source.version, str(error), {member.name: "" for member in members}, len(members))
            return "", 0
        self._group = None  # until it has been seen to work once more
        self._transfers += 1
        transfer = f"{group.number}.{self._transfers}"
        calls = {
            member.name: member.receive(group.meeting, rank, transfer, self._deadline_s)
            for rank, member in enumerate(members, 1)
        }
        fault = self._learner.send_weights(transfer, self._store.trainable_only, self._deadline_s)
        wait(calls.values(), timeout=self._deadline_s)
        faults = {name: reason for name, call in calls.items() if (reason := _fault(call))}
        received = len(calls) - len(faults)
        self._received += received
        self._missed += len(faults)
        if fault or faults:
            self._failed(source.version, fault, faults, len(calls))
        else:
            self._failures, self._group = 0, group
        return transfer, received

    def _group_of(self, members: Sequence[Member]) -> _Group:
        """The group of the last broadcast, or a new one where the members are others."""
        names = tuple(member.name for member in members)
        if self._group is not None and self._group.names == names:
            return self._group
        self._groups += 1
        meeting = self._learner.open_transfer(1 + len(names), self._backend)
        return _Group(meeting, names, self._groups)

    def _failed(self, version: int, fault: str, faults: dict[str, str], asked: int) -> None:
        self._failures += 1
        whose = [f"the learner: {fault}"] if fault else []
        whose += [f"{name}: {reason}" for name, reason in faults.items() if reason]
        self._say(
            f"the broadcast of version {version} did not reach {len(faults)} of {asked} workers "
            f"({'; '.join(whose)}): they take it from the object store"
        )
        if self._failures == _MOST_FAILURES:
            self._say(f"{_MOST_FAILURES} broadcasts in a row failed: the object store from now on")


def _fault(call: Future[None]) -> str:
    """Why ``call`` failed; "" where it did not."""
    if not call.done():
        return "no answer"
    error = call.exception()
    if error is None:
        return ""
    cause = getattr(error, "cause", None) or error  # Ray's error around the worker's own
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__
