"""Plays an episode again: from its write log, or on another worker after its own worker died.

    replay      write log --accepted records--> writer --> the revisions that the episode had
    recovery    on a worker that dies:    RecordedPolicy, RecordedWriter --each write, and the end--> Journal
                on another worker:        Progress --> EpisodeLog --> RecordedPolicy, RecordedWriter

Recovery plays the episode from its start. What was sampled comes from its progress, without the engine. Each
accepted write is computed again, on the same policy version. Where the progress ends, the last revision is
installed, with a receipt, and the episode goes on. Replies have seeds of their own, so what follows is what
would have followed, up to the engine's own rounding.

Environment and memory only need to do the same when they hear the same, as recall, conversations, search and
every memory of the comparison do. Where one does not, the digests of prompts and examples show it. The losses
of the writes show another base. Both raise Diverged, and the episode is restarted.

The journal (cluster/fleet/episode_journal.py) is held where it outlives the worker.
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
from configs.tolerances import REPLAY


class ReplayError(WriterError):
    """The log does not lead to its weights: another base, basis or write settings, or a record is missing."""


class Diverged(RuntimeError):
    """The episode does not follow its progress and must be restarted. The message says where they part."""


# --- replay of a write log ---------------------------------------------------------------------------------


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
    """Return the revisions that ``records`` left behind, one for each accepted record. Raises ReplayError.

    ``records`` is a whole log, in order. ``tolerance`` is in nats per answer token: the most by which a loss
    may differ from the logged one. With a fresh writer on the same machine in float32, the revisions equal
    those of an episode that wrote alone, bit for bit. Where its writes were batched with others', they equal
    up to float rounding: a batched matmul adds in another order.
    """
    weights = FastWeights(basis_id=basis_id, revision=0, b={})
    revisions: list[FastWeights] = []
    for number, record in enumerate(records, start=1):
        where = f"write {number} of episode {episode_id}"
        expected = weights.revision + (record.outcome == "accepted")
        if record.revision != expected:
            raise ReplayError(
                f"{where} left revision {record.revision} in force, the replay is at {expected}: "
                "an earlier record is missing"
            )
        if record.outcome == "accepted":
            request = WriteRequest(episode_id, weights, record.examples, record.preserved, record.seed)
            (result,) = writer.write([request])
            check_replay(where, record, result, tolerance)
            weights = result.weights
            revisions.append(weights)
    return tuple(revisions)


def check_replay(where: str, record: LoggedWrite, result: WriteResult, tolerance: float) -> None:
    """Check that ``result`` is that of the logged, accepted write. Raises ReplayError, ``where`` in front."""
    cure = "replay on the policy version, basis and write settings that it was written with"
    if result.outcome != "accepted":
        raise ReplayError(
            f"{where} was accepted and its replay is {result.outcome} ({result.reason}): {cure}"
        )
    if result.steps != record.steps:
        raise ReplayError(f"{where} took {record.steps} steps and its replay {result.steps}: {cure}")
    for name, logged, replayed in (
        ("before", record.loss_before, result.loss_before),
        ("after", record.loss_after, result.loss_after),
    ):
        if not math.isclose(logged, replayed, rel_tol=0, abs_tol=tolerance):
            raise ReplayError(
                f"{where} logged a loss of {logged:.5f} {name} it, its replay has {replayed:.5f} "
                f"(tolerance {tolerance:g}): {cure}"
            )


# --- progress, and where it is kept ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """A reply. 8 bytes a token: log-probs are float32, as a Segment holds them."""

    prompt: bytes  # digest of the prompt's tokens
    token_ids: NDArray[np.int32]  # [n]
    logprobs: NDArray[np.float32]  # [n]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Written:
    """A write. A digest of its examples is enough: they follow from what was sampled before."""

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
    """What an episode did up to its last write. Its position, segments and fast weights follow from it."""

    version: PolicyVersion
    events: tuple[Event, ...]

    @property
    def tokens(self) -> int:
        return sum(len(event.token_ids) for event in self.events if isinstance(event, Sampled))


class Journal(Protocol):
    """Keeps progress: a handle that travels with a request.

    It never blocks and never raises. A lost note costs a restart, not the episode.
    """

    def note(
        self, group_id: str, sibling: int, version: PolicyVersion, start: int, events: tuple[Event, ...]
    ) -> None:
        """Append ``events`` to the first ``start`` events of this sibling; 0 begins anew."""
        ...


class NoJournal:
    """Recovery switched off."""

    def note(
        self, group_id: str, sibling: int, version: PolicyVersion, start: int, events: tuple[Event, ...]
    ) -> None:
        pass


@dataclass(frozen=True, slots=True, eq=False)
class Recovery:
    """What a worker needs to recover the episodes of one group, and to keep their progress."""

    journal: Journal
    reissued: bool  # the group was issued to another worker before
    progress: Mapping[int, Progress]  # by sibling
    # nats per answer token by which the loss of a write made again may differ
    tolerance: float = REPLAY["float32"]


NO_RECOVERY = Recovery(NoJournal(), reissued=False, progress={})


@dataclass(frozen=True, slots=True)
class Recovered:
    """How the finished episodes of a group that was issued again were played."""

    continued: int  # from their progress
    restarted: int


NONE_RECOVERED = Recovered(0, 0)


# --- an episode that records its progress, or follows it ---------------------------------------------------


class EpisodeLog:
    """One episode's events. ``recall`` gives out those of the past, ``flush`` notes the new ones."""

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
    """The Policy (actors/protocols.py) of one episode, with its log in between.

    Invariant: a revision of the past costs no install, unless a new reply is sampled under it.
    """

    def __init__(self, policy: Policy, log: EpisodeLog) -> None:
        self._policy, self._log = policy, log
        self._waiting: dict[str, tuple[AdapterKey, FastWeights, Probe | None]] = {}

    @property
    def version(self) -> PolicyVersion:
        return self._policy.version

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey
    ) -> Generation:
        """Return the reply of the log, or sample a new one. Raises Diverged, and what the policy raises."""
        prompt = _digest(prompt_ids)
        if self._log.recalling:
            event = self._log.recall()
            if not isinstance(event, Sampled) or event.prompt != prompt:
                raise Diverged(f"a reply to {len(prompt_ids)} tokens was not sampled there before")
            ids, logprobs = tuple(event.token_ids.tolist()), tuple(event.logprobs.tolist())
            return Generation(ids, logprobs, event.finish_reason)
        if (waiting := self._waiting.pop(adapter.name, None)) is not None:
            await self._policy.install(*waiting)
        generation = await self._policy.generate(prompt_ids, sampling, adapter)
        token_ids = np.asarray(generation.token_ids, np.int32)
        log_probs = np.asarray(generation.logprobs, np.float32)
        self._log.add(Sampled(prompt, token_ids, log_probs, generation.finish_reason))
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
    """The AsyncWriter (actors/protocols.py) of one episode, with its log in between."""

    def __init__(self, writer: AsyncWriter, log: EpisodeLog, tolerance: float) -> None:
        self._writer, self._log, self._tolerance = writer, log, tolerance

    async def write(self, request: WriteRequest) -> WriteResult:
        """Write, or write again. Raises Diverged, and what the writer raises."""
        examples = _digest_of((*request.examples, *request.preserved))
        if self._log.recalling:
            return await self._again(request, examples)
        result = await self._writer.write(request)
        losses = (result.loss_before, result.loss_after)
        self._log.add(Written(examples, result.outcome, *losses, result.steps, result.seconds, result.reason))
        self._log.flush()
        return result

    async def _again(self, request: WriteRequest, examples: bytes) -> WriteResult:
        """Return what the logged write returned. Only an accepted write is computed again."""
        logged = self._log.recall()
        where = f"the write after revision {request.weights.revision} of episode {request.episode_id}"
        if not isinstance(logged, Written) or logged.examples != examples:
            raise Diverged(f"{where} was not made there before, or of other examples")
        if logged.outcome != "accepted":
            losses = (logged.loss_before, logged.loss_after)
            return WriteResult(
                request.weights, None, *losses, logged.steps, logged.seconds, logged.outcome, logged.reason
            )
        result = await self._writer.write(request)
        try:
            check_replay(where, logged, result, self._tolerance)
        except ReplayError as error:
            raise Diverged(str(error)) from error
        return result


def _digest(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=16).digest()


def _digest_of(examples: Sequence[WriteExample]) -> bytes:
    sides = (side for example in examples for side in (example.prompt_ids, example.answer_ids))
    return hashlib.blake2b(b"".join(map(_digest, sides)), digest_size=16).digest()
