"""The learner under Ray: a thin actor per rank, and the driver's view of all ranks.

Waits: the driver waits for actors under ``learner.step_timeout_s`` and says for which rank; ranks wait for each other inside torch.distributed.
Ray does not restart a rank: a rank that died ends the group, and the run resumes from its checkpoint.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError
from torch import Tensor

from actors.fast_weights.delta import Basis
from actors.types import PolicyVersion, Segment, TrajectoryGroup
from configs.schema import LearnerConfig, ObjectiveConfig
from learner.types import LearnerError, StepReport, WarmStartReport


@dataclass(frozen=True)
class LearnerSpec:
    """What every rank is built from."""

    config: LearnerConfig
    objective: ObjectiveConfig
    model_path: str
    basis: Basis
    seed: int
    temperature: float


class LearnerWorker:
    """One rank: sets the process up for torch.distributed and holds a Learner."""

    def __init__(self, spec: LearnerSpec, rank: int) -> None:
        self._spec, self._rank = spec, rank
        self._learner: Any = None

    def address(self) -> tuple[str, int]:
        """This node's address and a free port for the rendezvous (asked of rank 0)."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, host: str, port: int) -> PolicyVersion:
        import torch

        from learner.learner import Learner

        spec = self._spec
        names = {
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            "RANK": self._rank,
            "WORLD_SIZE": spec.config.workers,
            "LOCAL_RANK": 0,
        }
        os.environ.update({name: str(value) for name, value in names.items()})
        torch.set_num_threads(spec.config.threads)
        self._learner = Learner(
            spec.config,
            spec.objective,
            spec.model_path,
            spec.basis,
            spec.seed,
            spec.temperature,
            self._rank,
            spec.config.workers,
        )
        return self._learner.version

    def step(self, groups: Sequence[TrajectoryGroup]) -> StepReport:
        return self._learner.step(groups)

    def warm_start_step(self, segments: Sequence[Segment], learning_rate: float) -> WarmStartReport:
        return self._learner.warm_start_step(segments, learning_rate)

    def weights(self, trainable_only: bool) -> dict[str, Tensor]:
        """Collective under ZeRO-3; only rank 0 sends the tensors to anyone. Ray writes them to the object store before it runs the next call."""
        weights = self._learner.weights(trainable_only, copy=False)
        return weights if self._rank == 0 else {}

    def save(self, folder: str) -> PolicyVersion:
        self._learner.save(folder)
        return self._learner.version

    def load(self, folder: str) -> PolicyVersion:
        self._learner.load(folder)
        return self._learner.version


@ray.remote(max_restarts=0)
class LearnerActor:
    """One-line methods over LearnerWorker."""

    def __init__(self, spec: LearnerSpec, rank: int) -> None:
        self._worker = LearnerWorker(spec, rank)

    @ray.method
    def address(self) -> tuple[str, int]:
        return self._worker.address()

    @ray.method
    def start(self, host: str, port: int) -> PolicyVersion:
        return self._worker.start(host, port)

    @ray.method
    def hold(self, *groups: TrajectoryGroup) -> None:
        """For its arguments alone: Ray brings them to this rank's node before the call."""

    @ray.method
    def step(self, *groups: TrajectoryGroup) -> StepReport:
        return self._worker.step(groups)

    @ray.method
    def warm_start_step(self, segments: Sequence[Segment], learning_rate: float) -> WarmStartReport:
        return self._worker.warm_start_step(segments, learning_rate)

    @ray.method
    def weights(self, trainable_only: bool) -> dict[str, Tensor]:
        return self._worker.weights(trainable_only)

    @ray.method
    def save(self, folder: str) -> PolicyVersion:
        return self._worker.save(folder)

    @ray.method
    def load(self, folder: str) -> PolicyVersion:
        return self._worker.load(folder)


class LearnerGroup:
    """All ranks as one learner, for the driver. Every call raises LearnerError (ValueError for bad input) with the rank's own message, or after
    ``config.step_timeout_s``.

    ``actor`` is what a rank runs in: LearnerActor, or another class with its methods.
    ``folder`` arguments must be on storage that every rank's node sees, when ranks live on several nodes.
    """

    def __init__(self, spec: LearnerSpec, start_timeout_s: float, actor: Any = LearnerActor) -> None:
        config = spec.config
        self._timeout = config.step_timeout_s
        named = {config.resource: 1} if config.resource else {}
        asked = f"{config.cpus_per_worker} CPUs{', ' if named else ' and '}{config.gpus_per_worker} GPUs{f' and 1 {config.resource}' if named else ''}"
        self._resources = f"{asked} for each of {config.workers} learner ranks"
        # Without the second, Ray pickles tensors, several times as slow on the way out and on the way in. It is read when Ray is imported.
        environment = {"OMP_NUM_THREADS": str(config.threads), "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}
        if config.gpus_per_worker == 0:
            environment["DS_ACCELERATOR"] = "cpu"
        options = actor.options(
            num_cpus=config.cpus_per_worker,
            num_gpus=config.gpus_per_worker,
            resources=named,
            runtime_env={"env_vars": environment},
        )
        reference = ray.put(spec)
        self._actors: list[Any] = [options.remote(reference, rank) for rank in range(config.workers)]
        try:
            host, port = self._get([self._actors[0].address.remote()], "start", start_timeout_s)[0]
            self._version: PolicyVersion = self._get(
                [actor.start.remote(host, port) for actor in self._actors], "start", start_timeout_s
            )[0]
        except LearnerError:
            self.close()
            raise

    @property
    def version(self) -> PolicyVersion:
        return self._version

    def missing(self, groups: Sequence[ray.ObjectRef[TrajectoryGroup]]) -> list[int]:
        """Bring ``groups`` to the ranks' nodes; the places of those that were lost with the node that held them.

        To be asked before ``step``: there, a rank that cannot be given its groups leaves the others waiting for it.
        """
        return (
            [place for place, group in enumerate(groups) if self._lost([group])] if self._lost(groups) else []
        )

    def step(self, groups: Sequence[ray.ObjectRef[TrajectoryGroup]]) -> StepReport:
        """See ``Learner.step``. The groups go from where they are to the ranks' nodes, not through the driver.

        Each is an argument of its own: Ray brings those to the rank before the call, and a list of references would make the rank a co-owner of each.
        """
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

    def weights_ref(self, trainable_only: bool) -> ray.ObjectRef[dict[str, Tensor]]:
        """A reference to rank 0's full weights in the object store, ready when this returns; they never pass through the driver."""
        calls = [actor.weights.remote(trainable_only) for actor in self._actors]
        self._wait(calls, "weights", time.monotonic() + self._timeout, self._timeout)
        reference: ray.ObjectRef[dict[str, Tensor]] = calls[0]
        return reference

    def save(self, folder: str) -> None:
        self._get([actor.save.remote(folder) for actor in self._actors], "save", self._timeout)

    def load(self, folder: str) -> PolicyVersion:
        self._version = self._get(
            [actor.load.remote(folder) for actor in self._actors], "load", self._timeout
        )[0]
        return self._version

    def close(self) -> None:
        """End the ranks' processes. The group cannot be used afterwards."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _lost(self, groups: Sequence[ray.ObjectRef[TrajectoryGroup]]) -> bool:
        """Whether one of ``groups`` is."""
        calls = [actor.hold.remote(*groups) for actor in self._actors]
        self._wait(calls, "hold", time.monotonic() + self._timeout, self._timeout)
        try:
            ray.get(calls, timeout=self._timeout)
        except RayTaskError as error:
            if isinstance(error.cause, ObjectLostError):
                return True
            self._raise_failure(calls, "hold")
        except RayActorError:
            self._raise_failure(calls, "hold")
        return False

    def _wait(self, calls: list[Any], verb: str, deadline: float, timeout: float) -> None:
        _, pending = ray.wait(
            calls, num_returns=len(calls), timeout=max(0.0, deadline - time.monotonic()), fetch_local=False
        )
        if pending:
            late = [rank for rank, call in enumerate(calls) if call in pending]
            raise LearnerError(
                f"learner {verb}: no answer from rank {late} within {timeout:g} s (asked for {self._resources}; the cluster has "
                f"{ray.cluster_resources().get('CPU', 0):g} CPUs, {ray.cluster_resources().get('GPU', 0):g} GPUs): "
                "free resources, or raise the timeout"
            )

    def _get(self, calls: list[Any], verb: str, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        done, _ = ray.wait(calls, num_returns=1, timeout=timeout, fetch_local=False)
        self._raise_failure(
            done, verb
        )  # a rank that failed leaves the others waiting for it: do not wait out the deadline
        self._wait(calls, verb, deadline, timeout)
        self._raise_failure(calls, verb)
        return ray.get(calls, timeout=timeout)

    def _raise_failure(self, calls: list[Any], verb: str) -> None:
        try:
            ray.get(calls, timeout=self._timeout)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, LearnerError | ValueError):
                raise cause from error
            raise LearnerError(f"learner {verb}: a rank failed: {type(cause).__name__}: {cause}") from error
        except RayActorError as error:
            raise LearnerError(
                f"learner {verb}: a rank's process died ({error}); resume from the last checkpoint"
            ) from error
        except GetTimeoutError as error:
            raise LearnerError(
                f"learner {verb}: a result could not be fetched within {self._timeout:g} s"
            ) from error
