"""Starts or joins Ray for a run, and waits for actors with a deadline.

A local Ray has its own namespace and ports, so that it neither joins nor disturbs another Ray on the machine.
Every wait has a deadline, because nobody reports an actor that cannot be placed, or that hangs.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import signal
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import configs
from actors.protocols import TaskError
from cluster.common.errors import MachineError, StartupError, WorkerDied, WorkerLost
from cluster.common.patience import within
from cluster.common.ray_job import current_job
from cluster.fleet.ray_watch import RayDied, watched
from cluster.sizing.machine import packed
from cluster.sizing.memory import object_store_gib
from configs.models import model_shape
from configs.schema import RunConfig
from configs.user_code import ExtensionError

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
    # A call may have two results, of which we wait for one: the other's failure would print a traceback.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}


@dataclass(frozen=True, slots=True)
class Demand:
    """Logical resources that the run's actors ask of Ray."""

    cpus: float
    gpus: float  # whole ones, as no share is split over two
    custom: tuple[tuple[str, int], ...] = ()  # by name, sorted

    def __str__(self) -> str:
        listed = [
            f"{self.cpus:g} CPU",
            f"{self.gpus:g} GPU",
            *(f"{count} {name}" for name, count in self.custom),
        ]
        return f"{', '.join(listed[:-1])} and {listed[-1]}"


def demand(config: RunConfig, learner: bool) -> Demand:
    """The demand of all rollout workers and, with ``learner``, of the learner's ranks."""
    rollout, trainer = config.rollout, config.learner
    ranks = trainer.workers if learner else 0
    cpus = rollout.workers * rollout.cpus_per_worker + ranks * trainer.cpus_per_worker
    gpus = len(packed([trainer.gpus_per_worker] * ranks + [rollout.gpus_per_worker] * rollout.workers))
    custom = Counter({rollout.resource: rollout.workers})
    custom[trainer.resource] += ranks
    return Demand(
        cpus, gpus, tuple(sorted((name, count) for name, count in custom.items() if name and count))
    )


def require_gpus(config: RunConfig, needed: Demand) -> None:
    """Raise MachineError when this machine has too few GPUs for a local Ray, which never grows.

    A cluster may scale up; there the start-up deadline decides.
    """
    if config.ray.address or not needed.gpus:
        return
    import torch

    if needed.gpus > (gpus := torch.cuda.device_count()):
        raise _too_few(needed, gpus)


@contextmanager
def ray_runtime(config: RunConfig, needed: Demand) -> Iterator[None]:
    """Start or join Ray for the duration of the block. Raises StartupError, and RayDied where it dies.

    A local Ray is told of at least as many CPUs as the actors ask for: on a smaller machine they share the
    cores and run slower. It gets plenty of the custom resources, which only say what kind of node is wanted.
    """
    import ray

    os.environ.update(_ENVIRONMENT)
    logging.getLogger("ray").setLevel(logging.ERROR)
    # What the learner publishes is detached and contiguous, so Ray's warning says nothing new.
    warnings.filterwarnings("ignore", message="Zero-copy tensor serialization is enabled")
    namespace = f"engram-{uuid.uuid4().hex[:8]}"
    try:
        if config.ray.address:
            ray.init(
                address=_cluster_address(config.ray.address),
                namespace=namespace,
                job_config=_job_config(),
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            # At 15, Ray's own, any other program on the machine starves the engines.
            os.environ.setdefault("RAY_worker_niceness", "0")
            _lock_local()
            ray.init(
                address="local",
                namespace=namespace,
                job_config=_job_config(),
                num_cpus=max(os.cpu_count() or 1, math.ceil(needed.cpus)),
                resources=dict.fromkeys((name for name, _ in needed.custom), _PLENTY),
                object_store_memory=int(object_store_gib(config, model_shape(config.model)) * _GIB),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except StartupError:
        raise
    except Exception as error:  # Ray raises the plain class, too: for a node that is slow to start, say
        address = config.ray.address
        where = f"join Ray at ray.address={address!r}" if address else "start a local Ray"
        raise StartupError(f"cannot {where}: {_first_line(error)}") from error
    try:
        with watched(local=not config.ray.address):
            _check_resources(config, needed)
            yield
    except RayDied:
        if not config.ray.address:
            _end_local()
        raise
    finally:
        ray.shutdown()


def _lock_local() -> None:
    """Let nobody into the local Ray who lacks this process's random token.

    GCS, raylet and workers listen on every interface, and would run anybody's code. Processes that Ray starts
    inherit the token; it is in no file and no command line. One for each process: Ray reads it once.
    """
    from ray import _raylet

    raylet: Any = _raylet
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    raylet.Config.initialize("")  # as Ray's own code does after a change of the mode (2.60)


def _cluster_address(address: str) -> str:
    """What ``auto`` means: $RAY_ADDRESS, which a Ray job has, else the cluster of ``ray start``.

    Ray itself would also join any local Ray that it finds on the machine: another run's, or a stranger's.
    Raises StartupError.
    """
    if address != "auto":
        return address
    from ray._private.utils import read_ray_address  # the file that ``ray start`` writes has no public reader

    started: str | None = os.environ.get("RAY_ADDRESS") or read_ray_address()
    if not started:
        raise StartupError(
            "ray.address=auto finds no cluster on this machine: begin one with `ray start --head`, set "
            "RAY_ADDRESS, or name it with ray.address=HOST:PORT (empty: a local Ray for this run)"
        )
    return started


def driver_folder() -> str:
    """The folder that workers work in, as the driver does. "" in a Ray job: Ray gives it a folder."""
    return "" if current_job(os.environ) is not None else str(Path.cwd())


def _job_config() -> Any:
    """A JobConfig: workers look for modules in this installation of Engram, then in the current folder.

    Why: Ray puts the driver's current folder in front of the workers' sys.path, and a user's cluster.py there
    would hide ours. Ray 2.60 has no public switch for this. In a Ray job the working directory is the code,
    and Ray decides. tests/integration/test_bring_your_own.py fails when Ray changes these fields.
    """
    from ray.job_config import JobConfig

    if current_job(os.environ) is not None:
        return None
    installation = Path(configs.__file__).parents[1]
    # Each is put in front of those before it. _client_job: Ray does not add the current folder itself.
    return JobConfig(_client_job=True, _py_driver_sys_path=[driver_folder(), str(installation)])


def cancel_on_sigterm() -> None:
    """Let SIGTERM, a job's stop, end the current task as Ctrl-C does.

    Call it once Ray is up: Ray installs a handler of its own, which aborts the process. A second SIGTERM does
    nothing: it would cut off what the first one lets the task save.
    """
    task = asyncio.current_task()
    assert task is not None

    def stop() -> None:
        if not task.cancelling():
            task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)


def cluster_resources() -> str:
    """Describe the cluster for messages: "2 CPU, 0 GPU on 1 node (free: 1 CPU, 0 GPU)"."""
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
    """Wait for the value behind ``ref``.

    Raises WorkerLost, naming ``whom`` and what it was ``doing``, when the actor died, raised, or is late.
    A fault of the user's code (TaskError, ExtensionError) is raised as it is: another worker would meet it.
    """
    from ray.exceptions import RayActorError, RayError, RayTaskError

    try:
        return await within(deadline_s, _value(ref))
    except TimeoutError:
        raise WorkerLost(f"{whom} did not finish {doing} within {deadline_s:.0f} s") from None
    except RayTaskError as error:
        if isinstance(cause := getattr(error, "cause", None), TaskError | ExtensionError):
            raise cause from None
        raise WorkerLost(f"{whom} failed in {doing}: {_cause(error)}") from error
    except RayActorError as error:
        raise WorkerDied(f"{whom} died during {doing}: {_first_line(error)}", whom) from error
    except RayError as error:
        raise WorkerLost(f"{whom} was lost during {doing}: {_first_line(error)}") from error


async def all_ready(waits: dict[str, ObjectRef[Any]], deadline_s: float, needed: Demand) -> None:
    """Wait until every actor of ``waits`` (by name) is up.

    Raises StartupError naming those that are not, what was asked for and what the cluster has. Raises the
    fault of a user's code as it is.
    """

    async def wait_for(name: str, ref: ObjectRef[Any]) -> None:
        await answer(ref, deadline_s, name, "starting")

    tasks = {name: asyncio.create_task(wait_for(name, ref)) for name, ref in waits.items()}
    try:
        await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_EXCEPTION, timeout=deadline_s)
        for task in tasks.values():
            error = task.exception() if task.done() else None
            if isinstance(error, TaskError | ExtensionError):
                raise error
            if error is not None:
                raise StartupError(str(error)) from error
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
    """Raise MachineError when a local Ray found fewer GPUs than ``require_gpus``."""
    import ray

    gpus = ray.cluster_resources().get("GPU", 0)
    if not config.ray.address and needed.gpus > gpus:
        raise _too_few(needed, gpus)


def _too_few(needed: Demand, gpus: float) -> MachineError:
    return MachineError(
        f"the run asks for {needed}, this machine has {gpus:g} GPU: "
        "lower rollout.gpus_per_worker, learner.gpus_per_worker or their workers; no share is split over two"
    )


def _cause(error: Exception) -> str:
    """The exception that the actor raised, in one line, without Ray's copy of the traceback."""
    cause = getattr(error, "cause", None)
    return _first_line(error) if cause is None else f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _end_local() -> None:
    """End what is left of a local Ray: its own shutdown would ask the processes that died first."""
    from ray._private import worker  # nothing public ends them without asking

    if (node := getattr(worker, "_global_node", None)) is not None:
        node.kill_all_processes(check_alive=False, allow_graceful=False)
