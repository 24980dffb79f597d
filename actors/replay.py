"""An episode's fast weights again, from its write log: for an episode whose worker is lost and that goes on elsewhere.

    WriteRecord 1 (accepted), 2 (rolled back), 3 (accepted) --writer of the same base--> revision 1, revision 2

A log is a thousandth of the B that it rebuilds, and the write is deterministic: no B has to be shipped or stored while an episode runs. The base
is the same when policy version, basis and write settings are; a log that was written on another one is found out by its losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from actors.protocols import FastWeightWriter, WriterError
from actors.types import FastWeights, WriteRecord, WriteRequest, WriteResult


class ReplayError(WriterError):
    """The log does not lead to the weights that it speaks of: another base, basis or write settings, or a record is missing."""


class LoggedWrite(Protocol):
    """What a log keeps of an accepted write's result."""

    @property
    def steps(self) -> int: ...

    @property
    def loss_before(self) -> float: ...

    @property
    def loss_after(self) -> float: ...


def replay(writer: FastWeightWriter, episode_id: str, basis_id: str, records: Sequence[WriteRecord], tolerance: float) -> tuple[FastWeights, ...]:
    """The revisions that ``records`` (a whole log, in order) left behind: one for each accepted record, each from a call of its own.

    With a fresh writer on the same machine in float32 they equal, bit for bit, those of an episode that wrote alone; those of one whose writes
    were batched with others' up to float rounding (a matmul of other companions adds in another order). ``tolerance`` is the most nats per answer
    token by which a loss may differ from the logged one. Raises ReplayError.
    """
    weights = FastWeights(basis_id=basis_id, revision=0, b={})
    revisions: list[FastWeights] = []
    for number, record in enumerate(records, start=1):
        where = f"write {number} of episode {episode_id}"
        expected = weights.revision + (record.outcome == "accepted")
        if record.revision != expected:
            raise ReplayError(f"{where} left revision {record.revision} in force, the replay is at {expected}: an earlier record is missing")
        if record.outcome == "accepted":
            (result,) = writer.write([WriteRequest(episode_id, weights, record.examples)])
            check_replay(where, record, result, tolerance)
            weights = result.weights
            revisions.append(weights)
    return tuple(revisions)


def check_replay(where: str, record: LoggedWrite, result: WriteResult, tolerance: float) -> None:
    """Whether ``result`` is what an accepted write led to before. Raises ReplayError, ``where`` in front."""
    cure = "replay on the policy version, basis and write settings that it was written with"
    if result.outcome != "accepted":
        raise ReplayError(f"{where} was accepted and its replay is {result.outcome} ({result.reason}): {cure}")
    if result.steps != record.steps:
        raise ReplayError(f"{where} took {record.steps} steps and its replay {result.steps}: {cure}")
    for name, logged, found in (("before", record.loss_before, result.loss_before), ("after", record.loss_after, result.loss_after)):
        if not math.isclose(logged, found, rel_tol=0, abs_tol=tolerance):
            raise ReplayError(f"{where} logged a loss of {logged:.5f} {name} it, its replay has {found:.5f} (tolerance {tolerance:g}): {cure}")
