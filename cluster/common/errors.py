"""Failures of cluster/, each named by the boundary that it crosses.

The message is one line for the user: who was waited for or what is wrong, and what to do.
"""

from __future__ import annotations

from pathlib import Path


class ClusterError(RuntimeError):
    """The run cannot go on."""


class StartupError(ClusterError):
    """Ray, a rollout worker or the learner did not start. Names what was asked for, and what there is."""


class MachineError(StartupError):
    """The run asks for more than this machine has, and will ask for it again."""


class WorkerLost(ClusterError):
    """A rollout worker died, or did not answer within its deadline."""


class WorkerDied(WorkerLost):
    """The process of the worker ``whom`` is gone: killed, or out of memory. Another one may live."""

    def __init__(self, message: str, whom: str) -> None:
        super().__init__(message)
        self.whom = whom


class WeightsLost(ClusterError):
    """The weights of ``version`` were lost with the learner's node. Nothing else has them."""

    def __init__(self, version: int) -> None:
        super().__init__(f"the weights of version {version} were lost with the learner's node")
        self.version = version


class FleetError(ClusterError):
    """Rollout workers die as fast as they start. Holds the last causes."""


class StreamError(ClusterError):
    """No usable group arrives any more. Holds the failures of the last groups."""


class AllFailed(ClusterError):
    """Every episode failed by one line of the user's code. Another worker would meet it too."""


class CheckpointError(ClusterError):
    """A checkpoint is missing, incomplete, or belongs to another configuration."""


class UnloadableError(CheckpointError):
    """The learner cannot load a checkpoint whose files are as they were written. ``folder`` is that one."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"{folder} cannot be loaded: {reason}")
        self.folder = folder


class AllFinished(ClusterError):
    """``resume=auto`` finds only runs that are done. No failure: a script that restarts runs ends here."""


class InUseError(ClusterError):
    """Another process works in the run's folder."""


class SaveError(ClusterError):
    """A checkpoint or a file of an evaluation cannot be written: a full disk. Earlier files are whole."""


class TrackingError(ClusterError):
    """MLflow does not answer at the start, or its outbox cannot be kept."""
