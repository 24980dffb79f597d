"""Failures of the cluster room, each named by the boundary it crosses. Every message says who was waited for and what to do."""

from __future__ import annotations


class ClusterError(RuntimeError):
    """The run cannot go on. The message is one line for the user."""


class StartupError(ClusterError):
    """Ray, a rollout worker or the learner did not start; the message names what was asked for and what the cluster has."""


class WorkerLost(ClusterError):
    """A rollout worker died or did not answer within its deadline."""


class FleetError(ClusterError):
    """Rollout workers die as fast as they are started; the message holds the last causes."""


class StreamError(ClusterError):
    """No usable group arrives any more; the message holds the failures of the last groups."""


class CheckpointError(ClusterError):
    """A checkpoint is missing, incomplete, or belongs to another configuration."""


class InUseError(ClusterError):
    """Another process works in the run's folder."""


class SaveError(ClusterError):
    """A checkpoint or a file of an evaluation could not be written (a full disk). What was saved before is whole."""


class TrackingError(ClusterError):
    """The MLflow store cannot be reached or written."""
