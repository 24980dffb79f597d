"""Settings of remembering: the fast weights, their write and the memory policies.

`configs.schema` puts them into a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from configs.bounds import fraction, home_expanded, not_negative, positive, require
from configs.user_code import FORM, is_path


@dataclass(frozen=True)
class FastWeightsConfig:
    """The adapter that an episode writes (TMEM, arXiv 2606.04536). The defaults are the paper's."""

    rank: int = 6  # of A and B
    last_layers: int = 4  # how many decoder layers, from the end
    projections: tuple[Literal["gate_proj", "up_proj", "down_proj"], ...] = (
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    # A: W's top singular directions, the same at unit length, random, or directions of the layers' own inputs
    basis: Literal["svd", "unit_svd", "random", "data"] = "svd"
    # a text file, required with basis=data: A spans what the layers read when the model reads this text
    calibration_path: str = ""
    train_a: bool = False  # a write also moves A (an ablation: the paper's A is frozen)
    # for write.optimizer=natural: how many output directions of each matrix are measured on the model's own
    # text when the run starts
    sensitivity_rank: int = 0

    def __post_init__(self) -> None:
        home_expanded(self, "calibration_path")
        positive(self, "rank", "last_layers")
        require(self.rank <= 64, "rank", self.rank, "at most 64", "the engine's adapter slots are that wide")
        measured = self.sensitivity_rank
        require(measured >= 0, "sensitivity_rank", measured, "0 (not measured) or more", "64 is a good value")
        bound = "false where fast_weights.sensitivity_rank is above 0"
        require(not (measured and self.train_a), "train_a", self.train_a, bound)
        given = self.basis != "data" or self.calibration_path != ""
        bound = "a text file where fast_weights.basis is data"
        require(given, "calibration_path", self.calibration_path, bound)
        unique = len(set(self.projections)) == len(self.projections) > 0
        require(unique, "projections", self.projections, "one projection or more, each once")


@dataclass(frozen=True)
class PreserveConfig:
    """Replies that a write leaves as they were, so that a card answers its own question only (Engram's own).

    Each step also lowers ``weight`` x KL(policy without Delta || policy now), on questions that the cards do
    not answer. Its pool is made once a policy version: the environment's questions or shipped ones, each with
    the beginning of the policy's own reply.
    """

    weight: float = 0.0  # 0: off, the paper's write
    questions: int = 24  # of the pool
    # memory-writing prompts of the pool, so that a write spares the next extraction
    extractions: int = 2
    # requests of the pool that no memory is needed for, so that a write spares ordinary conversation
    everyday: int = 4
    # for each card: questions on its subject that the text does not answer, where the environment knows some
    beside: int = 1
    per_step: int = 3  # of the pool, in turn
    reply_tokens: int = 3  # from the beginning of a reply
    extraction_tokens: int = 24  # from the beginning of an extraction, or of the reply to an everyday request

    def __post_init__(self) -> None:
        not_negative(self, "weight", "extractions", "everyday", "beside")
        positive(self, "questions", "per_step", "reply_tokens", "extraction_tokens")


@dataclass(frozen=True)
class WriteConfig:
    """The write operator T: supervised fine-tuning on the flashcards' answers.

    A write is rolled back when its loss is not finite, or ends above ``max_loss_ratio`` times its start (and
    above 0.01 nats).
    """

    # natural: the natural gradient of B; each step does a chosen predicted harm (Engram's own)
    optimizer: Literal["sgd", "adam", "natural"] = "sgd"
    learning_rate: float = 5e-4  # of sgd and adam
    # of natural: the most predicted harm of a step to the model's own text, in nats per token
    step_kl: float = 0.02
    epochs: int = 5  # 0: T is the identity; no flashcards are asked for and nothing is written
    batch_size: int = 16
    # earlier flashcards of the episode that each write trains again, newest first; the paper has none
    rehearsal: int = 0
    max_flashcards: int = 32  # of one extraction; the others are dropped and counted
    max_example_tokens: int = 256
    max_loss_ratio: float = 1.5
    # nats per token below which an example is known: the write ends where all are, and the natural optimizer
    # aims at it; 0 (the paper): every write takes all its steps
    known_loss: float = 0.0
    # only answer tokens of at most this probability are trained; 1: all of them. 0.5 is the rule of MemFT
    hard_below: float = 1.0
    # of sgd and adam: B moves only in so many directions of A's outputs, those that the model's own text uses
    # least; 0: in all of them. AlphaEdit's idea (arXiv 2410.02355), in the coordinates of the basis
    null_space: int = 0
    # each card is also learnt behind so many other cards and their answers: a list such as [1, 3]
    depths: tuple[int, ...] = ()
    preserve: PreserveConfig = field(default_factory=PreserveConfig)
    # in one forward and backward pass of the writer; bounds its memory and changes no result
    chunk_tokens: int = 2048

    def __post_init__(self) -> None:
        positive(self, "learning_rate", "step_kl", "batch_size", "max_flashcards", "max_example_tokens")
        positive(self, "chunk_tokens")
        ratio, cure = self.max_loss_ratio, "1 rolls back every write whose loss rose"
        require(ratio >= 1, "max_loss_ratio", ratio, "1 or more", cure)
        require(self.epochs >= 0, "epochs", self.epochs, "0 (T is the identity) or more")
        require(self.rehearsal >= 0, "rehearsal", self.rehearsal, "0 (off) or more")
        not_negative(self, "known_loss", "null_space")
        require(0 < self.hard_below <= 1, "hard_below", self.hard_below, "in (0, 1]", "1 trains every token")
        apart = self.null_space == 0 or self.optimizer != "natural"
        bound = "0 with write.optimizer=natural"
        require(apart, "null_space", self.null_space, bound, "that weighs all directions by their use")
        ordered = sorted(set(self.depths)) == list(self.depths) and all(depth > 0 for depth in self.depths)
        require(ordered, "depths", list(self.depths), "numbers of cards from 1 on, each larger than the last")


@dataclass(frozen=True)
class PagingConfig:
    """MemGPT (arXiv 2310.08560).

    Core memory stands in the prompt. A recursive summary keeps what was evicted. Recall and archival storage
    are searched.
    """

    warn_fraction: float = 0.75  # of max_context_tokens: from here the agent is told to save what matters
    # of the room for turns: how much of the newest stays when the context is full
    flush_fraction: float = 0.5
    core_characters: int = 1000  # of each block of core memory
    max_calls: int = 4  # tool calls before a reply is taken as it is
    max_call_tokens: int = 128  # of a reply that may be a tool call; answers have sampling.max_answer_tokens
    results: int = 3  # that a search shows

    def __post_init__(self) -> None:
        positive(self, "core_characters", "max_calls", "max_call_tokens", "results")
        require(0 < self.warn_fraction <= 1, "warn_fraction", self.warn_fraction, "in (0, 1]")
        fraction(self, "flush_fraction")


@dataclass(frozen=True)
class NotesConfig:
    """A-MEM (arXiv 2502.12110).

    Each turn becomes a note with keywords and tags. Near notes are linked and may change. Questions find
    notes by embedding.
    """

    retrieved: int = 10  # notes shown with a question, beside the notes that they link to
    neighbours: int = 5  # near notes that a new note may be linked to, and may change
    max_note_tokens: int = 192  # of each answer about a note, and of each near note that is shown for linking

    def __post_init__(self) -> None:
        positive(self, "retrieved", "neighbours", "max_note_tokens")


MemoryPolicy = Literal[
    "full",
    "truncation",
    "paging",
    "summary",
    "state",
    "notes",
    "raw",
    "summary_write",
    "implications",
    "parametric",
    "hybrid",
    "custom",
]
CARD_WRITING = ("parametric", "hybrid")
"""Policies that write flashcards."""

SUMMARIZING = ("paging", "summary", "state", "summary_write", "hybrid")


@dataclass(frozen=True)
class MemoryConfig:
    """What happens when the context holds more than ``max_context_tokens`` (L_max).

    The policies are the rows of the comparison, see configs/rows.
    """

    policy: MemoryPolicy = "parametric"
    max_context_tokens: int = 4096
    question_blind: bool = False  # hide the question from the memory-writing prompts
    max_extract_tokens: int = 1024  # flashcards or implications of one extraction
    wordings: Literal[1, 2] = 1  # of each fact: 2 asks the agent for two cards, with different questions
    # drop a flashcard whose answer has a word that nobody said since the last extraction: it repeats what was
    # saved, or was made up
    grounded: bool = False
    max_summary_tokens: int = 1024  # a summary or a state
    # what is written instead of the agent's flashcards, for evaluation only: gold ones, the same answers
    # under questions about other people, or both
    control: Literal["none", "oracle", "other_cards", "oracle_other_cards"] = "none"
    # with memory.policy=custom: package.module:name of a function from MemoryConfig, WriteConfig and
    # Surroundings to a Memory
    custom: str = ""
    # for the custom memory to read
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    paging: PagingConfig = field(default_factory=PagingConfig)
    notes: NotesConfig = field(default_factory=NotesConfig)

    def __post_init__(self) -> None:
        positive(self, "max_context_tokens", "max_extract_tokens", "max_summary_tokens")
        known = self.policy != "custom" or is_path(self.custom)
        require(known, "custom", self.custom, f"{FORM} where memory.policy is custom")
        written = self.control == "none" or self.policy in CARD_WRITING
        bound = f"none where memory.policy is none of {', '.join(CARD_WRITING)}"
        require(written, "control", self.control, bound, "only flashcards can be replaced")
        summary, room = self.max_summary_tokens, self.max_context_tokens
        fits = self.policy not in SUMMARIZING or summary < room
        require(fits, "max_summary_tokens", summary, f"less than memory.max_context_tokens={room}")
