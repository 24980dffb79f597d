"""Every value that crosses a room. Read this file first.

An *episode* works on one task. Its context is cut into *segments*: a segment starts with an empty context
and ends when the context is full, or with the episode. At the end of a full context the agent writes
flashcards. A few gradient steps turn them into the next *revision* of the fast weights, and the context is
cleared. A finished episode is a *trajectory*. The episodes of one task are *siblings*; those that finished
are a *trajectory group*, and the learner trains on groups.

    Task --> Sampling -> Generation --> Segment ------------------------+
             Flashcard -> WriteExample -> WriteRequest -> WriteResult --+--> Trajectory --> TrajectoryGroup
                                                 FastWeights, WriteRecord

Worked example. An episode reads two sessions, each of which fills the context, and answers one question:

    segments[0]  revision 0  [session 1 | flashcards]  action_mask True on the flashcards  span "extract"
    segments[1]  revision 1  [session 2 | flashcards]  action_mask True on the flashcards  span "extract"
    segments[2]  revision 2  [question  | answer]      action_mask True on the answer      span "act"
    revisions    (revision 1, revision 2)
    writes       (record 1, record 2)

Values are frozen, complete at construction, and picklable. Imports: the standard library and numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

PolicyVersion = int  # optimizer steps behind the weights theta; a run starts from version 0
SpanKind = Literal["act", "extract"]  # an answer to the environment, or a text written for the memory
WriteOutcome = Literal["accepted", "empty", "rolled_back"]
FinishReason = Literal["stop", "length"]
StopReason = Literal["done", "max_turns"]
Boundary = Literal["environment", "memory", "engine", "receipt", "writer", "timeout", "worker"]

# --- what is asked -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Task:
    """One problem. ``payload`` is plain JSON-like data that only the environment ``environment`` understands.
    ``system_prompt``, where not empty, takes the place of the environment's. A task that the environment
    could not make has a ``fault``, and its episodes fail with it.
    Example: Task("recall-train-0-17", "recall", {"sessions": [...], "questions": [...]}, seed=17)
    """

    id: str
    environment: str
    payload: Mapping[str, Any]
    seed: int
    system_prompt: str = ""
    fault: str = ""
    member: str = ""  # of environment.mix: the environment that made it, and plays it
    stage: int = 0  # k: of the k-th stage of the curriculum, whose environment plays it; 0: of environment.*


# --- one action --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one action is sampled. Temperature 0 is greedy.
    Log-probs are those of softmax(z / temperature), or of softmax(z) when greedy. ``kind`` does not change
    what is sampled; the engine accounts its time by it. Example: Sampling(1.0, max_tokens=64, seed=5, "act")
    """

    temperature: float
    max_tokens: int
    seed: int
    kind: SpanKind


@dataclass(frozen=True, slots=True)
class Generation:
    """What the engine sampled, with one log-prob per token. A "stop" generation includes its stop token.

    ``versions`` has the policy version of each token, or is empty: then all are of the episode's version.
    Example: Generation((504, 2), (-0.3, -0.1), "stop")
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    versions: tuple[PolicyVersion, ...] = ()

    def __post_init__(self) -> None:
        tokens = len(self.token_ids)
        if tokens != len(self.logprobs) or len(self.versions) not in (0, tokens):
            raise ValueError(
                f"{tokens} tokens came with {len(self.logprobs)} log-probs and {len(self.versions)} versions"
            )


# --- the fast weights and their adapters -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class FastWeights:
    """The B matrices of one revision (TMEM, arXiv 2606.04536). W + B A acts; A is the basis ``basis_id``.

    Revision 0 is Delta = 0 and has no matrices. Example with rank 6 on SmolLM2-135M:
    FastWeights("svd-1f0c", 1, {"model.layers.29.mlp.down_proj": float32 [576, 6], ...})
    """

    basis_id: str
    revision: int
    b: Mapping[str, NDArray[np.float32]]  # full module name -> float32 [d_out, rank]
    a: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Empty where A is the frozen basis. Where writes train A too: module name -> float32 [rank, d_in]."""

    def __post_init__(self) -> None:
        if (self.revision == 0) != (len(self.b) == 0):
            raise ValueError(
                f"revision {self.revision} came with {len(self.b)} matrices: "
                "revision 0, and only it, has none"
            )


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """Identity of an adapter inside an engine. A name is never reused: it would hit the old prefix cache.

    Episodes of a policy version share revision 0 (Delta = 0), and with it the prefix cache of their prompts.
    Example: AdapterKey(3, "g12.0", 2).name == "v3/g12.0@2", AdapterKey(3, "g12.0", 0).name == "v3/base"
    """

    policy_version: PolicyVersion
    episode_id: str
    revision: int

    @property
    def name(self) -> str:
        adapter = "base" if self.revision == 0 else f"{self.episode_id}@{self.revision}"
        return f"v{self.policy_version}/{adapter}"


# --- one write ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flashcard:
    """A question-answer pair written by the agent. Example: Flashcard("Where does Nora live?", "Lisbon")"""

    question: str
    answer: str

    def __post_init__(self) -> None:
        if not self.question.strip() or not self.answer.strip():
            raise ValueError(
                "a flashcard needs a question and an answer, "
                f"got question={self.question!r} answer={self.answer!r}"
            )


@dataclass(frozen=True, slots=True)
class CardUse:
    """What the environment says of a flashcard that was written, see ``Attributor``.

    Example, about the second question of the episode, with a wrong answer: CardUse((1,), right=False)
    """

    questions: tuple[int, ...]  # places in ``Outcome.answers`` of the questions that it is about
    right: bool  # its question and its answer are a fact of the task


@dataclass(frozen=True, slots=True)
class WriteExample:
    """One supervised example: loss on ``answer_ids`` given ``prompt_ids``.

    ``answer_ids`` has at least one token; it includes the end-of-turn token.
    Example: the flashcard above as tokens, ([<system> ... <user> Where does Nora live? ...], [Lisbon <end>])
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class WriteRequest:
    """Asks the writer for the revision after ``weights``, trained on ``examples`` (at least one).

    ``preserved``: replies of the policy without Delta that the write must leave as they are, to the first
    tokens of each. ``seed`` orders the minibatches, and says which replies come first.
    """

    episode_id: str
    weights: FastWeights
    examples: tuple[WriteExample, ...]
    preserved: tuple[WriteExample, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Probe:
    """What a receipt checks: the writer's log-probs of the last n tokens, before and after the write."""

    # n = 2: Probe((12, 7, 504, 2), before=(-6.1, -2.0), after=(-0.4, -0.1))
    token_ids: tuple[int, ...]
    before: tuple[float, ...]  # n values
    after: tuple[float, ...]  # n values


@dataclass(frozen=True, slots=True, eq=False)
class WriteResult:
    """What the writer answers. ``weights`` is the new revision, or the request's own after a roll-back.
    ``probe`` is None unless the write was accepted. Losses are mean nats per answer token. preserved_kl: mean
    nats a token from the replies that the last step preserved; preserved_used: how many all steps came to.
    """

    weights: FastWeights
    probe: Probe | None
    loss_before: float
    loss_after: float
    steps: int
    seconds: float
    outcome: WriteOutcome
    reason: str  # empty for an accepted write, else why it was not accepted
    preserved_kl: float = 0.0
    preserved_used: int = 0
    shared: bool = False  # a sibling asked for the same write before, and it was computed once


@dataclass(frozen=True, slots=True)
class WriteRecord:
    """One line of an episode's write log. Replaying the accepted records on the same base rebuilds Delta.
    Example: one flashcard was written and one was malformed. The write took 5 steps from 5.4 to 3.9 nats:
    revision 1, examples (1 new, 2 rehearsed), flashcards (1), rejected_flashcards 1, outcome "accepted"
    """

    revision: int  # in force after the write; unchanged by an empty or rolled-back write
    examples: tuple[WriteExample, ...]  # what was trained on, to the token
    flashcards: tuple[Flashcard, ...]  # the new cards; none where a memory writes other text
    extraction: str  # the text that the agent wrote
    rejected_flashcards: int
    prompt_tokens: int
    answer_tokens: int
    loss_before: float
    loss_after: float
    steps: int
    seconds: float
    outcome: WriteOutcome
    reason: str
    preserved: tuple[WriteExample, ...] = ()  # what the write was to leave as it is, see WriteRequest
    seed: int = 0  # of the order of minibatches and preserved replies
    preserved_kl: float = 0.0  # see WriteResult
    uses: tuple[CardUse, ...] = ()  # of each of ``flashcards``; empty where the environment cannot say
    repaired_flashcards: int = 0  # read from the extraction although they were no JSON, or had other keys
    preserved_used: int = 0  # see WriteResult; 0 in older records
    shared: bool = False  # see WriteResult


# --- one episode -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ActionSpan:
    """Sampled tokens [start, end) of a segment.
    ``version`` is the policy version that sampled them. None means the version of the segment; other versions
    occur only when a refresh comes in mid-episode (actors/episodes/in_flight.py). ``serves``: places in
    ``Outcome.answers`` of the questions that they answered or prepared; None where nobody can say, so that
    they serve the whole episode (actors/episodes/attribution.py).
    """

    start: int
    end: int
    kind: SpanKind
    version: PolicyVersion | None = None
    serves: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One stretch of context under one revision of the fast weights. The three arrays have one length T.

    Example, T = 5: the prompt 9 200 31 and the reply 77 2, sampled on version 3 under revision 1:

        token_ids    9   200    31     77     2
        action_mask  F     F     F      T     T      spans (ActionSpan(3, 5, "act"),)
        logprobs     0     0     0   -0.4  -0.1
    """

    token_ids: NDArray[np.int32]  # [T], what the engine saw and sampled; never re-tokenised
    action_mask: NDArray[np.bool_]  # [T], True where the engine sampled the token
    logprobs: NDArray[np.float32]  # [T], under theta + Delta at sampling temperature; else 0
    policy_version: PolicyVersion  # of the oldest sampled token
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
    """One question of an episode, scored. ``scores`` are named values in 0..1, at least f1 and em.

    Example: Answer("Where does Nora live?", ("Lisbon",), "in Lisbon", "recall", {"f1": 0.67, "em": 0.0})
    """

    question: str
    gold: tuple[str, ...]
    prediction: str
    category: str
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an episode ended, as the environment saw it. Example: Outcome(0.67, {"f1": 0.67}, (answer,))"""

    reward: float
    reward_parts: Mapping[str, float]
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of an episode by phase, waiting included. The phases sum to ``total``, the wall time.

    Example: Timings(total=9.0, act=3.0, extract=4.0, write=1.0, install=0.5, environment=0.5)
    """

    total: float
    act: float  # sampling answers
    extract: float  # sampling texts for the memory
    write: float  # from flashcards to new weights
    install: float  # from new weights to an adapter that acts, with its receipt
    environment: float  # all else: the environment's work, chat templates, contexts


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """A finished episode; the worked example at the top of this file shows one.

    ``memory_events`` counts what the memory policy did, by its own names, e.g. {"summaries": 3}, and as
    "cleaned_texts" the environment's texts that could not be encoded.
    """

    task: Task
    episode_id: str
    policy_version: PolicyVersion
    segments: tuple[Segment, ...]
    revisions: tuple[FastWeights, ...]  # each written revision once: revision k >= 1 is revisions[k - 1]
    writes: tuple[WriteRecord, ...]
    memory_events: Mapping[str, int]
    outcome: Outcome
    stop_reason: StopReason
    timings: Timings

    def __post_init__(self) -> None:
        where = f"trajectory {self.episode_id}"
        for number, weights in enumerate(self.revisions, start=1):
            if weights.revision != number:
                raise ValueError(f"{where}: revision {weights.revision} is stored at place {number}")
        written = len(self.revisions)
        for segment in self.segments:
            if not 0 <= segment.revision <= written:
                raise ValueError(f"{where}: a segment names revision {segment.revision} of {written}")

    def weights_of(self, segment: Segment) -> FastWeights | None:
        """Return the fast weights in force when ``segment`` was sampled, or None for Delta = 0."""
        return None if segment.revision == 0 else self.revisions[segment.revision - 1]


@dataclass(frozen=True, slots=True)
class FailedEpisode:
    """An episode that did not finish. It is counted and shown, but is never a trajectory with reward 0.

    Example: FailedEpisode("recall-train-0-17", "g12.3", "engine", "the prompt has 9000 tokens, at most 4096")
    """

    task_id: str
    episode_id: str
    boundary: Boundary
    message: str


@dataclass(frozen=True, slots=True, eq=False)
class TrajectoryGroup:
    """The siblings of one task, finished and failed. All lived on one policy version.

    Example with four siblings, one of them too late: trajectories (g12.0, g12.1, g12.3), failed (g12.2,)
    """

    task: Task
    policy_version: PolicyVersion
    trajectories: tuple[Trajectory, ...]
    failed: tuple[FailedEpisode, ...]
    worker: str
