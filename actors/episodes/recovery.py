"""An episode whose worker died goes on elsewhere: what it has done so far is kept outside of its worker, and played again on another.

    worker that dies    RecordedPolicy, RecordedWriter --each write, and the end--> Journal.note     (held where it outlives the worker)
    worker that goes on the episode is played again from its start: what was sampled comes from its progress, without the engine; each accepted write
                        is computed again on the same policy version; where the progress ends the last revision is installed, with a receipt

Playing again needs no environment or memory that can be entered in the middle, only ones that do the same when they hear the same (recall,
conversations, search, every memory of the comparison). Digests of all prompts and examples find out one that does not (its session has a state of
its own), and the losses of the writes (below) another base: LostTrack, and the episode is restarted. Replies have seeds of their own, so
what follows is what would have followed, up to the engine's own rounding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from actors.protocols import AsyncWriter, FastWeightWriter, Policy, WriterError
from actors.types import (
    AdapterKey,
    FastWeights,
    FinishReason,
    Generation,
    PolicyVersion,
    Probe,
    Sampling,
    WriteExample,
    WriteOutcome,
    WriteRecord,
    WriteRequest,
    WriteResult,
)

LOSS_TOLERANCE = 1e-2
"""Nats per answer token by which a replayed write's loss may differ: float32 sums in another order move it by 1e-5, another base by tenths."""


class LostTrack(RuntimeError):
    """The episode does not go the way that its progress says: it is restarted. The message says where they part."""


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """A reply to the prompt with this digest. token_ids int32 [n], logprobs float32 [n]: 8 bytes a token, log-probs as a Segment holds them."""

    prompt: bytes
    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Written:
    """A write's line in the log. Its examples follow from what was sampled before it, so a digest is enough to know them again."""

    examples: bytes
    outcome: WriteOutcome
    loss_before: float
    loss_after: float
    steps: int
    seconds: float
    reason: str


Event = Sampled | Written


@dataclass(frozen=True, slots=True, eq=False)
class Progress:
    """What an episode did up to its last write, on ``version``: its position, segments and fast weights follow from it."""

    version: PolicyVersion
    events: tuple[Event, ...]

    @property
    def tokens(self) -> int:
        return sum(len(event.token_ids) for event in self.events if isinstance(event, Sampled))


class Journal(Protocol):
    """Where progress goes: a handle that travels with a request. Never blocks and never raises: a lost note costs a restart, not the episode."""

    def note(
        self, group_id: str, sibling: int, version: PolicyVersion, start: int, events: tuple[Event, ...]
    ) -> None:
        """``events`` follow on the first ``start`` of this sibling's; 0 begins anew."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Recovery:
    """What a worker needs for one group: where its progress goes, and, when the group was issued before (``reissued``), what is known, by sibling."""

    journal: Journal
    reissued: bool
    progress: Mapping[int, Progress]


@dataclass(frozen=True, slots=True)
class Recovered:
    """Of the finished episodes of a group that was issued again: those continued, and those played from the start."""

    continued: int
    restarted: int


class NoJournal:
    """Recovery switched off."""

    def note(
        self, group_id: str, sibling: int, version: PolicyVersion, start: int, events: tuple[Event, ...]
    ) -> None:
        pass


NO_RECOVERY = Recovery(NoJournal(), reissued=False, progress={})


class EpisodeLog:
    """One episode's events: those of its progress are given out first, new ones are noted by ``flush``."""

    def __init__(self, note: Callable[[int, tuple[Event, ...]], None], past: Sequence[Event]) -> None:
        self._note = note
        self._past = past
        self._next = 0
        self._noted = len(past)
        self._new: list[Event] = []

    @property
    def recalling(self) -> bool:
        return self._next < len(self._past)

    def recall(self) -> Event:
        self._next += 1
        return self._past[self._next - 1]

    def add(self, event: Event) -> None:
        self._new.append(event)

    def flush(self) -> None:
        if self._new:
            self._note(self._noted, tuple(self._new))
            self._noted += len(self._new)
            self._new = []


class RecordedPolicy:
    """actors.protocols.Policy of one episode. A revision of the past is installed when the first new reply is sampled under it, if one ever is."""

    def __init__(self, policy: Policy, log: EpisodeLog) -> None:
        self._policy, self._log = policy, log
        self._waiting: dict[str, tuple[AdapterKey, FastWeights, Probe | None]] = {}

    @property
    def version(self) -> PolicyVersion:
        return self._policy.version

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey
    ) -> Generation:
        """Raises LostTrack, and what the policy raises."""
        prompt = _digest(prompt_ids)
        if self._log.recalling:
            event = self._log.recall()
            if not isinstance(event, Sampled) or event.prompt != prompt:
                raise LostTrack(f"a reply to {len(prompt_ids)} tokens was not sampled there before")
            return Generation(
                tuple(event.token_ids.tolist()), tuple(event.logprobs.tolist()), event.finish_reason
            )
        if (waiting := self._waiting.pop(adapter.name, None)) is not None:
            await self._policy.install(*waiting)
        generation = await self._policy.generate(prompt_ids, sampling, adapter)
        ids, logprobs = (
            np.asarray(generation.token_ids, np.int32),
            np.asarray(generation.logprobs, np.float32),
        )
        self._log.add(Sampled(prompt, ids, logprobs, generation.finish_reason))
        return generation

    async def install(self, key: AdapterKey, weights: FastWeights, probe: Probe | None) -> None:
        if self._log.recalling:
            self._waiting[key.name] = (key, weights, probe)
        else:
            await self._policy.install(key, weights, probe)

    async def release(self, keys: Sequence[AdapterKey]) -> None:
        installed = [key for key in keys if self._waiting.pop(key.name, None) is None]
        if installed:
            await self._policy.release(installed)


class RecordedWriter:
    """actors.protocols.AsyncWriter of one episode."""

    def __init__(self, writer: AsyncWriter, log: EpisodeLog) -> None:
        self._writer, self._log = writer, log

    async def write(self, request: WriteRequest) -> WriteResult:
        """Raises LostTrack, and what the writer raises."""
        examples = _digest_of(request.examples)
        if self._log.recalling:
            return await self._again(request, examples)
        result = await self._writer.write(request)
        self._log.add(
            Written(
                examples,
                result.outcome,
                result.loss_before,
                result.loss_after,
                result.steps,
                result.seconds,
                result.reason,
            )
        )
        self._log.flush()
        return result

    async def _again(self, request: WriteRequest, examples: bytes) -> WriteResult:
        logged = self._log.recall()
        where = f"the write after revision {request.weights.revision} of episode {request.episode_id}"
        if not isinstance(logged, Written) or logged.examples != examples:
            raise LostTrack(f"{where} was not made there before, or of other examples")
        if logged.outcome != "accepted":
            losses = (logged.loss_before, logged.loss_after)
            return WriteResult(
                request.weights, None, *losses, logged.steps, logged.seconds, logged.outcome, logged.reason
            )
        result = await self._writer.write(request)
        try:
            check_replay(where, logged, result, LOSS_TOLERANCE)
        except ReplayError as error:
            raise LostTrack(str(error)) from error
        return result


def _digest(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=16).digest()


def _digest_of(examples: Sequence[WriteExample]) -> bytes:
    return hashlib.blake2b(
        b"".join(_digest(example.prompt_ids) + _digest(example.answer_ids) for example in examples),
        digest_size=16,
    ).digest()


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


def replay(
    writer: FastWeightWriter, episode_id: str, basis_id: str, records: Sequence[WriteRecord], tolerance: float
) -> tuple[FastWeights, ...]:
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
            raise ReplayError(
                f"{where} left revision {record.revision} in force, the replay is at {expected}: an earlier record is missing"
            )
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
        raise ReplayError(
            f"{where} was accepted and its replay is {result.outcome} ({result.reason}): {cure}"
        )
    if result.steps != record.steps:
        raise ReplayError(f"{where} took {record.steps} steps and its replay {result.steps}: {cure}")
    for name, logged, found in (
        ("before", record.loss_before, result.loss_before),
        ("after", record.loss_after, result.loss_after),
    ):
        if not math.isclose(logged, found, rel_tol=0, abs_tol=tolerance):
            raise ReplayError(
                f"{where} logged a loss of {logged:.5f} {name} it, its replay has {found:.5f} (tolerance {tolerance:g}): {cure}"
            )
