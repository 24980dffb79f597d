"""Settings of what an agent remembers with: the fast weights, their write, and the memory policies. `configs.schema` puts them into a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from configs.bounds import positive, require
from configs.extensions import FORM, is_path


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
    basis: Literal["svd", "unit_svd", "random", "data"] = (
        "svd"  # A: W's top singular directions, the same at unit length, random, or the inputs' own
    )
    calibration_path: str = (
        ""  # a text file, needed by basis=data: A spans what the layers read when the model reads it
    )
    train_a: bool = False  # a write also moves A (an ablation: the paper's A is frozen)
    sensitivity_rank: int = 0  # for write.optimizer=natural: directions of each matrix' output measured on the model's own text at a run's start

    def __post_init__(self) -> None:
        positive(self, "rank", "last_layers")
        require(self.rank <= 64, "rank", self.rank, "at most 64", "the engine's adapter slots are that wide")
        require(
            self.sensitivity_rank >= 0,
            "sensitivity_rank",
            self.sensitivity_rank,
            "0 (not measured) or more",
            "64 is a good value",
        )
        require(
            not (self.sensitivity_rank and self.train_a),
            "train_a",
            self.train_a,
            "false where fast_weights.sensitivity_rank is above 0",
        )
        wants_text = self.basis == "data" and not self.calibration_path
        require(
            not wants_text,
            "calibration_path",
            self.calibration_path,
            "a text file where fast_weights.basis is data",
        )
        require(
            len(set(self.projections)) == len(self.projections) > 0,
            "projections",
            self.projections,
            "one projection or more, each once",
        )


@dataclass(frozen=True)
class WriteConfig:
    """The write operator T: SFT on the flashcards' answers. A loss not finite, or over ``max_loss_ratio`` times its start (and 0.01 nats), is rolled
    back."""

    optimizer: Literal["sgd", "adam", "natural"] = (
        "sgd"  # natural: the natural gradient of B, each step of a given predicted harm (Engram's own)
    )
    learning_rate: float = 5e-4  # of sgd and adam
    step_kl: float = (
        0.02  # of natural: most harm of a step to the model's own text, predicted, in nats per token
    )
    epochs: int = 5  # 0: T is the identity, nothing is asked for and nothing written
    batch_size: int = 16
    rehearsal: int = 0  # earlier flashcards of the episode mixed into each write, newest first, against forgetting; the paper's has none
    max_flashcards: int = 32  # more than this in one extraction are dropped and counted
    max_example_tokens: int = 256
    max_loss_ratio: float = 1.5
    chunk_tokens: int = 2048  # most tokens in one forward and backward pass of the writer: bounds its memory, changes no result

    def __post_init__(self) -> None:
        positive(
            self,
            "learning_rate",
            "step_kl",
            "batch_size",
            "max_flashcards",
            "max_example_tokens",
            "chunk_tokens",
        )
        require(
            self.max_loss_ratio >= 1,
            "max_loss_ratio",
            self.max_loss_ratio,
            "1 or more",
            "1 rolls back every write whose loss rose",
        )
        require(self.epochs >= 0, "epochs", self.epochs, "0 (T is the identity) or more")
        require(self.rehearsal >= 0, "rehearsal", self.rehearsal, "0 (off) or more")


@dataclass(frozen=True)
class PagingConfig:
    """MemGPT (arXiv 2310.08560): core memory in the prompt, a recursive summary of what was evicted, and recall and archival storage with search."""

    warn_fraction: float = 0.75  # of max_context_tokens: the agent is told to save what matters
    flush_fraction: float = 0.5  # of the room for turns: what stays of the newest when the context is full
    core_characters: int = 1000  # of each block of core memory
    max_calls: int = 4  # tool calls before a reply is taken as it is
    max_call_tokens: int = (
        128  # of a reply that may be a tool call; of an answer sampling.max_answer_tokens count
    )
    results: int = 3  # that a search shows

    def __post_init__(self) -> None:
        positive(self, "core_characters", "max_calls", "max_call_tokens", "results")
        require(0 < self.warn_fraction <= 1, "warn_fraction", self.warn_fraction, "in (0, 1]")
        require(
            0 < self.flush_fraction < 1,
            "flush_fraction",
            self.flush_fraction,
            "between 0 and 1, both excluded",
        )


@dataclass(frozen=True)
class NotesConfig:
    """A-MEM (arXiv 2502.12110): each turn becomes a note with keywords and tags, linked to near ones, which may evolve; found again by embedding."""

    retrieved: int = 10  # notes shown with a question, their links besides
    neighbours: int = 5  # near notes that a new one may be linked to, and may change
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
SUMMARIZING = ("paging", "summary", "state", "summary_write", "hybrid")


@dataclass(frozen=True)
class MemoryConfig:
    """What happens when the context holds more than ``max_context_tokens`` (L_max). The policies are the rows of the comparison, see configs/rows."""

    policy: MemoryPolicy = "parametric"
    max_context_tokens: int = 4096
    question_blind: bool = False  # hide the question from the memory-writing prompts
    max_extract_tokens: int = 1024  # flashcards or implications of one extraction
    max_summary_tokens: int = 1024  # a summary or a state
    custom: str = ""  # with memory.policy=custom: package.module:name of a function from MemoryConfig, WriteConfig and Surroundings to a Memory
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # for the custom memory to read
    paging: PagingConfig = field(default_factory=PagingConfig)
    notes: NotesConfig = field(default_factory=NotesConfig)

    def __post_init__(self) -> None:
        positive(self, "max_context_tokens", "max_extract_tokens", "max_summary_tokens")
        require(
            self.policy != "custom" or is_path(self.custom),
            "custom",
            self.custom,
            f"{FORM} where memory.policy is custom",
        )
        fits = self.policy not in SUMMARIZING or self.max_summary_tokens < self.max_context_tokens
        require(
            fits,
            "max_summary_tokens",
            self.max_summary_tokens,
            f"less than memory.max_context_tokens={self.max_context_tokens}",
        )
