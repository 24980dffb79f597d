"""Every value that crosses a room: the first file to read.

A *task* is put to a group of sibling *episodes*. An episode runs in *segments*: a segment is one stretch of context, from empty to full (or to the
end of the episode). Between two segments the agent writes flashcards, a few gradient steps turn them into the next *revision* of its fast weights,
and the context is cleared. A finished episode is a *trajectory*; the siblings that finished are a *trajectory group*.

Worked example. An episode with two full contexts and then a question:

    segments[0]  revision 0   [session 1 | flashcards]      mask 1 on the flashcards   kind "extract"
    segments[1]  revision 1   [session 2 | flashcards]      mask 1 on the flashcards   kind "extract"
    segments[2]  revision 2   [question  | answer]          mask 1 on the answer       kind "act"
    revisions    (revision 1, revision 2)                   writes  (record 1, record 2)

Values are frozen and complete at construction, and picklable. This module imports the standard library and numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

PolicyVersion = (
    int  # optimizer steps behind the policy's weights theta; version 0 is what the run started from
)
SpanKind = Literal["act", "extract"]
WriteOutcome = Literal["accepted", "empty", "rolled_back"]
FinishReason = Literal["stop", "length"]
StopReason = Literal["done", "max_turns"]
Boundary = Literal["environment", "memory", "engine", "receipt", "writer", "timeout", "worker"]


@dataclass(frozen=True, slots=True)
class Task:
    """One problem. ``payload`` is plain JSON-like data that only the environment named here understands."""

    id: str
    environment: str
    payload: Mapping[str, Any]
    seed: int


@dataclass(frozen=True, slots=True)
class Flashcard:
    """A question-answer pair written by the agent. Both sides are non-empty."""

    question: str
    answer: str

    def __post_init__(self) -> None:
        if not self.question.strip() or not self.answer.strip():
            raise ValueError(
                f"a flashcard needs a question and an answer, got question={self.question!r} answer={self.answer!r}"
            )


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """Identity of an adapter inside an engine. Never reused: a name that comes back would hit the old adapter's prefix cache.

    Revision 0 means Delta = 0 and is shared by all episodes of a policy version, so siblings share the prompt's prefix cache.
    """

    policy_version: PolicyVersion
    episode_id: str
    revision: int

    @property
    def name(self) -> str:
        return (
            f"v{self.policy_version}/base"
            if self.revision == 0
            else f"v{self.policy_version}/{self.episode_id}@{self.revision}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class FastWeights:
    """The B matrices of one revision (TMEM, arXiv 2606.04536): W + B A acts, A is the basis named ``basis_id``.

    ``b`` maps a full module name ("model.layers.26.mlp.gate_proj") to float32 [d_out, rank]. Revision 0 is Delta = 0 and has an empty ``b``.
    ``a`` is empty where A is the basis, as in the paper; where a write trains A too it is the float32 [rank, d_in] of each module instead.
    """

    basis_id: str
    revision: int
    b: Mapping[str, NDArray[np.float32]]
    a: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.revision == 0) != (len(self.b) == 0):
            raise ValueError(
                f"revision {self.revision} came with {len(self.b)} matrices: revision 0, and only it, has none"
            )


@dataclass(frozen=True, slots=True)
class WriteRecord:
    """One line of an episode's write log. Replaying ``examples`` of the accepted records on the same base rebuilds Delta.

    ``examples`` is what was trained on, to the token; ``flashcards`` those that it was made of (none where a memory writes other text) without the
    rehearsed ones. ``revision`` is the one in force after the write (unchanged when it was empty or rolled back). Losses are mean nats per answer
    token. ``reason`` is empty for an accepted write, else says why not. ``extraction`` is the text that the agent wrote.
    """

    revision: int
    examples: tuple[WriteExample, ...]
    flashcards: tuple[Flashcard, ...]
    extraction: str
    rejected_flashcards: int
    prompt_tokens: int
    answer_tokens: int
    loss_before: float
    loss_after: float
    steps: int
    seconds: float
    outcome: WriteOutcome
    reason: str


@dataclass(frozen=True, slots=True)
class ActionSpan:
    """Sampled tokens [start, end) of a segment. ``version``: of the policy that sampled them, None for the segment's own (in_flight.py)."""

    start: int
    end: int
    kind: SpanKind
    version: PolicyVersion | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One stretch of context under one revision of the fast weights, dated by its oldest sampled token. The three arrays have one length T.

    token_ids int32 [T]: what the engine saw and sampled, never re-tokenised. action_mask bool [T]: True where the engine sampled the token.
    logprobs float32 [T]: the engine's log-probability of each sampled token under theta + Delta at sampling temperature, 0 elsewhere.
    """

    token_ids: NDArray[np.int32]
    action_mask: NDArray[np.bool_]
    logprobs: NDArray[np.float32]
    policy_version: PolicyVersion
    revision: int
    spans: tuple[ActionSpan, ...]

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.action_mask), len(self.logprobs)}
        if len(lengths) != 1:
            raise ValueError(f"a segment's arrays must have one length, got {sorted(lengths)}")
        covered = np.zeros(len(self.action_mask), dtype=bool)
        for span in self.spans:
            covered[span.start : span.end] = True
        if not np.array_equal(covered, self.action_mask):
            raise ValueError("a segment's action spans must cover exactly its masked tokens")


@dataclass(frozen=True, slots=True)
class Answer:
    """One question of an episode as scored. ``scores`` holds the scorer's named values in 0..1 (at least f1 and em)."""

    question: str
    gold: tuple[str, ...]
    prediction: str
    category: str
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an episode ended, as the environment saw it."""

    reward: float
    reward_parts: Mapping[str, float]
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of an episode by phase, waiting included; they sum to ``total``, wall time. ``act`` and ``extract`` are sampling, ``write`` and
    ``install`` (with its receipt) the way from flashcards to an adapter that acts, ``environment`` the rest: its work, chat templates, contexts."""

    total: float
    act: float
    extract: float
    write: float
    install: float
    environment: float


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """A finished episode. ``revisions`` holds each written revision once: revision k >= 1 is ``revisions[k - 1]``.

    ``memory_events`` counts what the memory policy did (summaries, searches, malformed calls, ...), by its own names.
    """

    task: Task
    episode_id: str
    policy_version: PolicyVersion
    segments: tuple[Segment, ...]
    revisions: tuple[FastWeights, ...]
    writes: tuple[WriteRecord, ...]
    memory_events: Mapping[str, int]
    outcome: Outcome
    stop_reason: StopReason
    timings: Timings

    def __post_init__(self) -> None:
        for number, weights in enumerate(self.revisions, start=1):
            if weights.revision != number:
                raise ValueError(
                    f"trajectory {self.episode_id}: revision {weights.revision} is stored at place {number}"
                )
        for segment in self.segments:
            if not 0 <= segment.revision <= len(self.revisions):
                raise ValueError(
                    f"trajectory {self.episode_id}: a segment names revision {segment.revision} of {len(self.revisions)}"
                )

    def weights_of(self, segment: Segment) -> FastWeights | None:
        """The fast weights in force when ``segment`` was sampled, or None for Delta = 0."""
        return None if segment.revision == 0 else self.revisions[segment.revision - 1]


@dataclass(frozen=True, slots=True)
class FailedEpisode:
    """An episode that did not finish: counted and shown, never a trajectory with reward 0."""

    task_id: str
    episode_id: str
    boundary: Boundary
    message: str


@dataclass(frozen=True, slots=True, eq=False)
class TrajectoryGroup:
    """The siblings of one task that finished, and those that failed. All lived on one policy version."""

    task: Task
    policy_version: PolicyVersion
    trajectories: tuple[Trajectory, ...]
    failed: tuple[FailedEpisode, ...]
    worker: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one action is sampled. Temperature 0 is greedy. Log-probs are those of softmax(z / temperature); of softmax(z) when greedy.

    ``kind`` changes nothing about what is sampled: the engine accounts its time by it.
    """

    temperature: float
    max_tokens: int
    seed: int
    kind: SpanKind


@dataclass(frozen=True, slots=True)
class Generation:
    """What the engine sampled. ``token_ids`` includes the stop token when ``finish_reason`` is "stop"; one log-prob per token, and one policy version
    (or none at all: then it was the episode's)."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    versions: tuple[PolicyVersion, ...] = ()

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs) or len(self.versions) not in (0, len(self.token_ids)):
            raise ValueError(
                f"{len(self.token_ids)} tokens came with {len(self.logprobs)} log-probs and {len(self.versions)} versions"
            )


@dataclass(frozen=True, slots=True)
class WriteExample:
    """One supervised example of a write: loss on ``answer_ids`` (at least one; the end-of-turn token included) given ``prompt_ids``."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class WriteRequest:
    """Ask the writer for the revision after ``weights``, trained on ``examples`` (at least one)."""

    episode_id: str
    weights: FastWeights
    examples: tuple[WriteExample, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """What a receipt checks: ``token_ids`` with the writer's own log-probs of the last ``len(after)`` tokens before and after the write."""

    token_ids: tuple[int, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class WriteResult:
    """``weights`` is the new revision when accepted, the request's own when rolled back. ``probe`` is None unless accepted."""

    weights: FastWeights
    probe: Probe | None
    loss_before: float
    loss_after: float
    steps: int
    seconds: float
    outcome: WriteOutcome
    reason: str
