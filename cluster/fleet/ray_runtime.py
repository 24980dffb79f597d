"""Ray for one run: a private local Ray, or a cluster to join; and the one way to wait for an actor.

A local Ray has its own namespace and ports, so that it neither joins nor disturbs another one on the machine. Every wait has a deadline, because an
actor that cannot be placed, or that hangs, is reported by nobody.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.common.errors import StartupError, WorkerLost
from configs.schema import RunConfig

if TYPE_CHECKING:
    from ray import ObjectRef

T = TypeVar("T")
_GIB = 1024**3
_PLENTY = 1_000_000

# Read by Ray when it starts, in the driver and in every process that it starts.
_ENVIRONMENT = {
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TQDM": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of a call with two results one is waited for; the other's failure would come as a traceback
}


@dataclass(frozen=True, slots=True)
class Demand:
    """Logical resources that the run's actors ask of Ray."""

    cpus: float
    gpus: float
    custom: tuple[tuple[str, int], ...] = ()  # by name, sorted

    def __str__(self) -> str:
        listed = [
            f"{self.cpus:g} CPU",
            f"{self.gpus:g} GPU",
            *(f"{count} {name}" for name, count in self.custom),
        ]
        return f"{', '.join(listed[:-1])} and {listed[-1]}"


def demand(config: RunConfig, learner: bool) -> Demand:
    """All rollout workers together and, if one is started, the learner."""
    rollout, trainer = config.rollout, config.learner
    cpus = rollout.workers * rollout.cpus_per_worker + (
        trainer.workers * trainer.cpus_per_worker if learner else 0
    )
    gpus = rollout.workers * rollout.gpus_per_worker + (
        trainer.workers * trainer.gpus_per_worker if learner else 0
    )
    custom = Counter({rollout.resource: rollout.workers})
    if learner:
        custom[trainer.resource] += trainer.workers
    return Demand(cpus, gpus, tuple(sorted((name, count) for name, count in custom.items() if name)))


@contextmanager
def ray_runtime(config: RunConfig, needed: Demand) -> Iterator[None]:
    """Ray, started or joined, for the duration of the block. Raises StartupError.

    A local Ray is told of at least as many CPUs as the actors ask for: on a smaller machine they share the cores, slower but running. Of custom
    resources, which say what kind of node is wanted, it has plenty.
    """
    import ray

    os.environ.update(_ENVIRONMENT)
    logging.getLogger("ray").setLevel(logging.ERROR)
    namespace = f"engram-{uuid.uuid4().hex[:8]}"
    try:
        if config.ray.address:
            ray.init(
                address=config.ray.address,
                namespace=namespace,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            os.environ["RAY_AUTH_MODE"] = (
                "disabled"  # loopback only; a token left by another Ray of this user would be asked for otherwise
            )
            ray.init(
                address="local",
                namespace=namespace,
                num_cpus=max(os.cpu_count() or 1, math.ceil(needed.cpus)),
                resources=dict.fromkeys((name for name, _ in needed.custom), _PLENTY),
                object_store_memory=int(config.ray.object_store_gib * _GIB),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:  # Ray raises the plain class, too: for a node that is slow to start, say
        where = (
            f"join Ray at ray.address={config.ray.address!r}" if config.ray.address else "start a local Ray"
        )
        raise StartupError(f"cannot {where}: {_first_line(error)}") from error
    try:
        _check_resources(config, needed)
        yield
    finally:
        ray.shutdown()


def cancel_on_sigterm() -> None:
    """A job's stop ends the current task as Ctrl-C does. Called once Ray is up: Ray puts a handler of its own there, which aborts the process."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def cluster_resources() -> str:
    """For messages: "2 CPU, 0 GPU on 1 node (free: 1 CPU, 0 GPU)"."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    nodes = sum(node["Alive"] for node in ray.nodes())
    custom = sorted(
        name
        for name in total
        if ":" not in name and name not in ("CPU", "GPU", "memory", "object_store_memory")
    )
    figures = [
        ", ".join(f"{values.get(name, 0):g} {name}" for name in ("CPU", "GPU", *custom))
        for values in (total, free)
    ]
    return f"{figures[0]} on {nodes} node{'s' if nodes != 1 else ''} (free: {figures[1]})"


async def answer(ref: ObjectRef[T], deadline_s: float, whom: str, doing: str) -> T:
    """The value behind ``ref``. Raises WorkerLost, naming ``whom`` and what it was ``doing``, when the actor died, raised, or is late."""
    from ray.exceptions import RayActorError, RayError, RayTaskError

    try:
        return await asyncio.wait_for(_value(ref), deadline_s)
    except TimeoutError:
        raise WorkerLost(f"{whom} did not finish {doing} within {deadline_s:.0f} s") from None
    except RayTaskError as error:
        raise WorkerLost(f"{whom} failed in {doing}: {_cause(error)}") from error
    except RayActorError as error:
        raise WorkerLost(f"{whom} died during {doing}: {_first_line(error)}") from error
    except RayError as error:
        raise WorkerLost(f"{whom} was lost during {doing}: {_first_line(error)}") from error


async def all_ready(waits: dict[str, ObjectRef[Any]], deadline_s: float, needed: Demand) -> None:
    """Every actor of ``waits`` (by name) is up. Raises StartupError naming those that are not, what was asked for and what the cluster has."""

    async def one(name: str, ref: ObjectRef[Any]) -> None:
        await answer(ref, deadline_s, name, "starting")

    tasks = {name: asyncio.create_task(one(name, ref)) for name, ref in waits.items()}
    try:
        await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_EXCEPTION, timeout=deadline_s)
        for task in tasks.values():
            if task.done() and task.exception() is not None:
                raise StartupError(str(task.exception())) from task.exception()
        late = [name for name, task in tasks.items() if not task.done()]
        if late:
            asked = f"the run asks for {needed}, Ray has {cluster_resources()}"
            raise StartupError(
                f"{', '.join(late)} did not start within ray.startup_timeout_s={deadline_s:.0f} s; {asked}"
            )
    finally:
        for task in tasks.values():
            task.cancel()


async def _value(ref: ObjectRef[T]) -> T:
    return await ref


def _check_resources(config: RunConfig, needed: Demand) -> None:
    """A local Ray never grows: what does not fit now never will. (A cluster may scale up; there the start-up deadline decides.)"""
    import ray

    gpus = ray.cluster_resources().get("GPU", 0)
    if not config.ray.address and needed.gpus > gpus:
        raise StartupError(
            f"the run asks for {needed}, this machine has {gpus:g} GPU: lower rollout.gpus_per_worker, learner.gpus_per_worker or their workers"
        )


def _cause(error: Exception) -> str:
    """The exception that the actor raised, in one line, without Ray's copy of the traceback."""
    cause = getattr(error, "cause", None)
    return _first_line(error) if cause is None else f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
