"""The learner under Ray: an actor per rank, and the driver's view of all ranks.

Every wait, and who ends it:
    the driver, for ranks       ``learner.step_timeout_s``; the error names the ranks that are late
    ranks, for each other       torch.distributed
Ray does not restart a rank: it would have lost its weights. A call that raises LearnerLost leaves a group
that ``restart`` brings back: all ranks start anew, from a checkpoint.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError
from torch import Tensor

from actors.fast_weights.delta import Basis
from actors.types import PolicyVersion, Segment, TrajectoryGroup
from actors.weight_transfer import Rendezvous, Sender
from configs.schema import LearnerConfig, ObjectiveConfig
from learner.types import LearnerError, LearnerLost, StepReport, WarmStartReport

if TYPE_CHECKING:
    from learner.learner import Learner

_SLICE_S = 5.0  # of a wait


@dataclass(frozen=True)
class LearnerSpec:
    """What every rank is built from."""

    config: LearnerConfig
    objective: ObjectiveConfig
    model_path: str
    basis: Basis
    seed: int
    temperature: float
    answer_temperature: float | None = None  # None: ``temperature``
    shuffle_rewards: bool = False
    lost_versions: int = 0  # that earlier learners of the run had made and lost: their numbers are taken


@ray.remote(max_restarts=0)
class LearnerActor:
    """One rank: prepares its process for torch.distributed and holds a Learner."""

    _learner: Learner

    def __init__(self, spec: LearnerSpec, rank: int) -> None:
        self._spec, self._rank = spec, rank
        self._sender: Sender | None = None

    @ray.method
    def address(self) -> tuple[str, int]:
        """Return this node's address and a free port for the rendezvous. Rank 0 is asked."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    @ray.method
    def start(self, host: str, port: int) -> PolicyVersion:
        import torch

        from learner.learner import Learner

        spec, ranks = self._spec, self._spec.config.workers
        os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
        os.environ.update(RANK=str(self._rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0")
        torch.set_num_threads(spec.config.threads)
        self._learner = Learner(
            spec.config,
            spec.objective,
            spec.model_path,
            spec.basis,
            spec.seed,
            spec.temperature,
            self._rank,
            ranks,
            spec.answer_temperature,
            spec.shuffle_rewards,
            spec.lost_versions,
        )
        return self._learner.version

    @ray.method
    def hold(self, *groups: TrajectoryGroup) -> None:
        """Do nothing. Ray brings the arguments to this rank's node before the call."""

    @ray.method
    def step(self, *groups: TrajectoryGroup) -> StepReport:
        return self._learner.step(groups)

    @ray.method
    def warm_start_step(self, segments: Sequence[Segment], learning_rate: float) -> WarmStartReport:
        return self._learner.warm_start_step(segments, learning_rate)

    @ray.method(num_returns=2)
    def weights(self, trainable_only: bool) -> tuple[dict[str, Tensor], PolicyVersion]:
        """Return two objects: the weights on rank 0, {} on other ranks, and their version. Collective.

        They need no copy: Ray writes them to the object store before it runs the next call.
        """
        weights = self._learner.weights(trainable_only, copy=False, wanted=self._rank == 0)
        return weights, self._learner.version

    @ray.method
    def open_transfer(self, size: int, backend: Literal["gloo", "nccl"]) -> Rendezvous:
        """Make this rank the root of a new group of ``size``. Rank 0 is asked."""
        if self._sender is not None:
            self._sender.close()
        try:
            self._sender = Sender(ray.util.get_node_ip_address(), size, backend)
        except RuntimeError as error:
            raise LearnerError(f"no group can meet at the learner's node: {_first_line(error)}") from error
        return self._sender.meeting

    @ray.method
    def send_weights(self, transfer: str, trainable_only: bool, deadline_s: float) -> str:
        """Return "" once the weights are out, or how that failed. Collective."""
        fault = self._learner.send(self._sender, transfer, trainable_only, deadline_s)
        if self._rank == 0 and self._sender is None:
            return "the learner has started again and has no group"
        return fault

    @ray.method
    def save(self, folder: str) -> PolicyVersion:
        self._learner.save(folder)
        return self._learner.version

    @ray.method
    def load(self, folder: str) -> PolicyVersion:
        self._learner.load(folder)
        return self._learner.version


class LearnerGroup:
    """All ranks as one learner, for the driver.

    Every call raises LearnerError with the rank's own message; LearnerLost where a rank died, failed by no
    fault of its input, or is silent for ``config.step_timeout_s``; ValueError for bad input. ``actor`` is
    what a rank runs in: LearnerActor, or another class with its methods. When ranks live on several nodes,
    ``folder`` must be on storage that all of them see.
    """

    def __init__(self, spec: LearnerSpec, start_timeout_s: float, actor: Any = LearnerActor) -> None:
        config = spec.config
        self._spec, self._start_timeout_s = spec, start_timeout_s
        self._timeout = config.step_timeout_s
        named = {config.resource: 1} if config.resource else {}
        cpus, gpus = f"{config.cpus_per_worker:g} CPUs", f"{config.gpus_per_worker:g} GPUs"
        asked = f"{cpus}, {gpus} and 1 {config.resource}" if named else f"{cpus} and {gpus}"
        self._resources = f"{asked} for each of {config.workers} learner ranks"
        # Without the second one Ray pickles tensors, which is several times slower. Ray reads it on import.
        environment = {"OMP_NUM_THREADS": str(config.threads), "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
        if config.gpus_per_worker == 0:
            environment["DS_ACCELERATOR"] = "cpu"
        self._options = actor.options(
            num_cpus=config.cpus_per_worker,
            num_gpus=config.gpus_per_worker,
            resources=named,
            runtime_env={"env_vars": environment},
        )
        self._actors: list[Any] = []
        self._unseen: list[Any] = []  # the versions of weights that nobody has waited for
        self._closing = threading.Lock()
        self._closed = False
        self._version: PolicyVersion = 0
        try:
            self._start()
        except LearnerError:
            self.close()
            raise

    @property
    def version(self) -> PolicyVersion:
        return self._version

    def restart(self, folder: str | None, lost_versions: int) -> None:
        """End what is left of the ranks and start them all again, from the checkpoint in ``folder``.

        None: from the weights that the run began with. ``lost_versions``: see LearnerSpec.
        """
        self._require_open()
        self._kill()
        self._spec = replace(self._spec, lost_versions=lost_versions)
        try:
            self._start()
            if folder is not None:
                self.load(folder)
        except LearnerLost:
            self._require_open()
            raise

    def _start(self) -> None:
        self._require_open()  # where Ray has ended, put would start another one
        reference = ray.put(self._spec)
        with self._closing:  # another thread may close the group
            self._require_open()
            self._actors = [
                self._options.remote(reference, rank) for rank in range(self._spec.config.workers)
            ]
        host, port = self._get([self._actors[0].address.remote()], "start", self._start_timeout_s)[0]
        self._version = self._get(
            [actor.start.remote(host, port) for actor in self._actors], "start", self._start_timeout_s
        )[0]

    def missing(self, groups: Sequence[ray.ObjectRef[TrajectoryGroup]]) -> list[int]:
        """Bring ``groups`` to the ranks' nodes. Return the places of groups that were lost with their node.

        Ask this before ``step``: there, a rank without its groups would leave the other ranks waiting.
        """
        if not self._lost(groups):
            return []
        return [place for place, group in enumerate(groups) if self._lost([group])]

    def step(self, groups: Sequence[ray.ObjectRef[TrajectoryGroup]]) -> StepReport:
        """See ``Learner.step``. The groups go straight to the ranks' nodes, not through the driver.

        Each group is an argument of its own. Ray brings arguments to the rank before the call. A list of
        references would make the rank a co-owner of each.
        """
        self._see_weights()  # they were to be written before it
        report: StepReport = self._get(
            [actor.step.remote(*groups) for actor in self._actors], "step", self._timeout
        )[0]
        self._version = report.version
        return report

    def warm_start_step(self, segments: Sequence[Segment], learning_rate: float) -> WarmStartReport:
        """See ``Learner.warm_start_step``."""
        reference = ray.put(tuple(segments))
        calls = [actor.warm_start_step.remote(reference, learning_rate) for actor in self._actors]
        report: WarmStartReport = self._get(calls, "warm_start_step", self._timeout)[0]
        self._version = report.version
        return report

    def weights_ref(self, trainable_only: bool, wait: bool = True) -> ray.ObjectRef[dict[str, Tensor]]:
        """Return a reference to rank 0's full weights in the object store.

        They never pass through the driver: their versions do, which are the sign that the ranks were whole.
        Without ``wait`` they are written after this returns. The next step raises what failed then.
        """
        self._see_weights()
        calls = [actor.weights.remote(trainable_only) for actor in self._actors]
        self._unseen = [version for _, version in calls]
        if wait:
            self._see_weights()
        reference: ray.ObjectRef[dict[str, Tensor]] = calls[0][0]
        return reference

    def _see_weights(self) -> None:
        """Raise what failed while the last weights were written to the object store."""
        unseen, self._unseen = self._unseen, []
        self._get(unseen, "weights", self._timeout)

    def open_transfer(self, size: int, backend: Literal["gloo", "nccl"]) -> Rendezvous:
        """Open a group for ``send_weights``, in the place of the last one. ``size`` counts rank 0 too."""
        call = self._actors[0].open_transfer.remote(size, backend)
        meeting: Rendezvous = self._get([call], "open_transfer", self._timeout)[0]
        return meeting

    def send_weights(self, transfer: str, trainable_only: bool, deadline_s: float) -> str:
        """Broadcast rank 0's weights to its group. Return "", or how that failed within ``deadline_s``.

        After a failure the group is closed. The learner is whole.
        """
        calls = [actor.send_weights.remote(transfer, trainable_only, deadline_s) for actor in self._actors]
        fault: str = self._get(calls, "send_weights", deadline_s + self._timeout)[0]
        return fault

    def save(self, folder: str) -> None:
        self._get([actor.save.remote(folder) for actor in self._actors], "save", self._timeout)

    def load(self, folder: str) -> PolicyVersion:
        self._version = self._get(
            [actor.load.remote(folder) for actor in self._actors], "load", self._timeout
        )[0]
        return self._version

    def close(self) -> None:
        """End the ranks' processes. The group cannot be used afterwards."""
        with self._closing:
            self._closed = True
        self._kill()

    def _require_open(self) -> None:
        if self._closed:
            raise LearnerError("the learner was closed")

    def _kill(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._unseen = [], []

    def _lost(self, groups: Sequence[ray.ObjectRef[TrajectoryGroup]]) -> bool:
        """Return whether one of ``groups`` was lost with the node that held it."""
        calls = [actor.hold.remote(*groups) for actor in self._actors]
        self._wait(calls, "hold", self._timeout, raises=False)
        try:
            ray.get(calls, timeout=self._timeout)
        except RayTaskError as error:
            if isinstance(error.cause, ObjectLostError):
                return True
            self._raise_failure(calls, "hold")
        except RayError:
            self._raise_failure(calls, "hold")
        return False

    def _wait(self, calls: list[Any], verb: str, timeout: float, raises: bool) -> None:
        """Wait until all ranks have answered. Raises LearnerLost after ``timeout`` of running time.

        With ``raises`` the failure of a rank is raised at once: the others may wait for that rank. It waits
        in slices: a driver that was stopped (Ctrl-Z, a paused machine) goes on with the time that was left.
        """
        pending, left = calls, timeout
        while pending and left > 0:
            part = min(_SLICE_S, left)
            done, pending = ray.wait(pending, timeout=part, fetch_local=False)
            if not done:
                left -= part
            if raises:
                self._raise_failure(done, verb)
        if pending:
            late = [rank for rank, call in enumerate(calls) if call in pending]
            cluster = ray.cluster_resources()
            raise LearnerLost(
                f"learner {verb}: no answer from rank {late} within {timeout:g} s "
                f"(asked for {self._resources}; the cluster has {cluster.get('CPU', 0):g} CPUs, "
                f"{cluster.get('GPU', 0):g} GPUs): free resources, or raise the timeout"
            )

    def _get(self, calls: list[Any], verb: str, timeout: float) -> list[Any]:
        self._wait(calls, verb, timeout, raises=True)
        return ray.get(calls, timeout=timeout)

    def _raise_failure(self, calls: list[Any], verb: str) -> None:
        try:
            ray.get(calls, timeout=self._timeout)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, LearnerError | ValueError):
                raise cause from error
            raise LearnerLost(f"learner {verb}: a rank failed: {type(cause).__name__}: {cause}") from error
        except RayActorError as error:
            raise LearnerLost(f"learner {verb}: a rank's process died ({_first_line(error)})") from error
        except GetTimeoutError as error:
            raise LearnerLost(
                f"learner {verb}: a result could not be fetched within {self._timeout:g} s"
            ) from error
        except RayError as error:
            raise LearnerLost(f"learner {verb}: a rank was lost ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    """What Ray says, without its lines of actor ids and causes."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
