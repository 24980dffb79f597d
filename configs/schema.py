"""The configuration, and the only place with defaults: one frozen dataclass per part.

`configs.load` builds a `RunConfig` from YAML and ``key=value`` overrides, once; nothing changes it afterwards. A value is checked where it is
constructed: the message has the value, the bound and the cure. Settings that the paper leaves unpublished say so; their default is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Projection = Literal["gate_proj", "up_proj", "down_proj"]


def _require(condition: bool, key: str, value: object, bound: str, cure: str = "") -> None:
    if not condition:
        raise ValueError(f"{key}={value!r} is not allowed: it must be {bound}{'; ' + cure if cure else ''}")


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, name, value, "greater than 0")


@dataclass(frozen=True)
class ModelConfig:
    """The policy's base model: ``smollm2-135m`` (comes with the install), a local Hugging Face folder, or a hub name."""

    name: str = "smollm2-135m"
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class RecallConfig:
    """Synthetic facts told over several sessions, then questions. Unlimited tasks; train and eval names never overlap."""

    sessions: int = 2
    facts_per_session: int = 2
    questions: int = 2
    filler_sentences: int = 1

    def __post_init__(self) -> None:
        _positive(self, "sessions", "facts_per_session", "questions")
        _require(self.filler_sentences >= 0, "filler_sentences", self.filler_sentences, "0 or more")
        facts = self.sessions * self.facts_per_session
        _require(self.questions <= facts, "questions", self.questions, f"at most sessions * facts_per_session = {facts}")


@dataclass(frozen=True)
class ConversationConfig:
    """Long conversations with questions, in LoCoMo's schema, read from ``path``. ``scorer`` picks what the reward is (both are always reported)."""

    path: str = ""
    scorer: Literal["official", "plain"] = "plain"
    questions_per_episode: int = 1
    max_sessions: int = 0  # 0: all; otherwise the last n sessions up to the evidence, for quick looks
    categories: tuple[int, ...] = (1, 2, 3, 4, 5)
    eval_fraction: float = 0.5

    def __post_init__(self) -> None:
        _positive(self, "questions_per_episode")
        _require(self.max_sessions >= 0, "max_sessions", self.max_sessions, "0 (all) or more")
        _require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "between 0 and 1, both excluded")
        _require(set(self.categories) <= {1, 2, 3, 4, 5} and len(self.categories) > 0, "categories", self.categories, "a non-empty subset of 1..5")


@dataclass(frozen=True)
class EnvironmentConfig:
    name: Literal["recall", "conversation"] = "recall"
    recall: RecallConfig = field(default_factory=RecallConfig)
    conversation: ConversationConfig = field(default_factory=ConversationConfig)


@dataclass(frozen=True)
class FastWeightsConfig:
    """The adapter that an episode writes (method.md 2). The defaults are the paper's."""

    rank: int = 6
    last_layers: int = 4
    projections: tuple[Projection, ...] = ("gate_proj", "up_proj", "down_proj")
    basis: Literal["svd", "random"] = "svd"

    def __post_init__(self) -> None:
        _positive(self, "rank", "last_layers")
        _require(self.rank <= 64, "rank", self.rank, "at most 64", "the engine's adapter slots are that wide")
        _require(len(self.projections) > 0, "projections", self.projections, "a non-empty subset of gate_proj, up_proj, down_proj")


@dataclass(frozen=True)
class WriteConfig:
    """The write operator T: a few SFT steps on the flashcards. The defaults are the paper's; the loss mask (answers only) is our choice.

    A write whose loss is not finite or ends above ``max_loss_ratio`` times its start is rolled back and counted.
    """

    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 5e-4
    epochs: int = 5
    batch_size: int = 16
    max_flashcards: int = 32
    max_example_tokens: int = 256
    max_loss_ratio: float = 1.5
    chunk_tokens: int = 2048  # most padded tokens in one forward and backward pass of the writer: bounds its memory, changes no result

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "epochs", "batch_size", "max_flashcards", "max_example_tokens", "chunk_tokens")
        _require(self.max_loss_ratio >= 1, "max_loss_ratio", self.max_loss_ratio, "1 or more", "1 rolls back every write whose loss rose")


@dataclass(frozen=True)
class MemoryConfig:
    """What happens when the context holds more than ``max_context_tokens`` (L_max)."""

    policy: Literal["parametric", "none"] = "parametric"
    max_context_tokens: int = 4096
    question_blind: bool = False
    max_extract_tokens: int = 1024

    def __post_init__(self) -> None:
        _positive(self, "max_context_tokens", "max_extract_tokens")


@dataclass(frozen=True)
class SamplingConfig:
    """How training episodes act. Evaluation samples with temperature 0."""

    temperature: float = 1.0
    max_answer_tokens: int = 64

    def __post_init__(self) -> None:
        _positive(self, "max_answer_tokens")
        _require(self.temperature > 0, "temperature", self.temperature, "greater than 0", "a group of greedy siblings teaches nothing")


@dataclass(frozen=True)
class EngineConfig:
    """One vLLM engine per rollout worker. ``slots`` is both the adapter slots and the most episodes that run at once on a worker."""

    slots: int = 16
    max_model_tokens: int = 8192
    kv_cache_gib: float = 1.0
    gpu_memory_utilization: float = 0.6
    enforce_eager: bool = False
    receipts: Literal["always", "off"] = "always"
    receipt_tolerance: float = 0.02  # nats per token, float32; bfloat16 needs about 0.3 (the base model's own rounding)

    def __post_init__(self) -> None:
        _positive(self, "slots", "max_model_tokens", "kv_cache_gib", "receipt_tolerance")
        _require(0 < self.gpu_memory_utilization <= 1, "gpu_memory_utilization", self.gpu_memory_utilization, "in (0, 1]")


@dataclass(frozen=True)
class RolloutConfig:
    """Rollout workers. A worker is one process: engine, writer and up to ``engine.slots`` concurrent episodes."""

    workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    threads: int = 1
    max_turns: int = 64
    episode_timeout_s: float = 600

    def __post_init__(self) -> None:
        _positive(self, "workers", "threads", "max_turns", "episode_timeout_s")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The stop-gradient GRPO update (method.md 4). Clip, KL, std division and importance correction are unpublished: our choices."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    normalize_by_std: bool = True
    kl_coefficient: float = 0.0
    importance: Literal["truncated", "none"] = "truncated"
    importance_cap: float = 2.0
    minibatches: int = 1
    aggregate: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        _positive(self, "clip_low", "clip_high", "importance_cap", "minibatches")
        _require(self.kl_coefficient >= 0, "kl_coefficient", self.kl_coefficient, "0 (off) or more")


@dataclass(frozen=True)
class LearnerConfig:
    """The DeepSpeed learner. ``trainable: full`` is the paper's; ``last_layers`` trains the last ``trainable_layers`` decoder layers (cheap on CPU)."""

    learning_rate: float = 1e-6
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    adam_beta2: float = 0.999
    zero_stage: int = 1
    workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    threads: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    microbatch_tokens: int = 2048
    trainable: Literal["full", "last_layers"] = "full"
    trainable_layers: int = 8
    gradient_checkpointing: bool = False
    step_timeout_s: float = 1800

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "max_grad_norm", "workers", "threads", "microbatch_tokens", "trainable_layers", "step_timeout_s")
        _require(self.zero_stage in (0, 1, 2, 3), "zero_stage", self.zero_stage, "0, 1, 2 or 3")


@dataclass(frozen=True)
class WarmStartConfig:
    """A short supervised stage that teaches a small model to write parsable flashcards. ``steps: 0`` leaves it out."""

    steps: int = 0
    tasks_per_step: int = 8
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        _require(self.steps >= 0, "steps", self.steps, "0 (off) or more")
        _positive(self, "tasks_per_step", "learning_rate")


@dataclass(frozen=True)
class TrainConfig:
    """The loop. A group older than ``max_staleness`` policy versions when the learner takes it is dropped and counted; 0 is strictly on-policy."""

    steps: int = 200
    tasks_per_step: int = 64
    group_size: int = 8
    max_staleness: int = 1
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    group_timeout_s: float = 1200

    def __post_init__(self) -> None:
        _require(self.steps >= 0, "steps", self.steps, "0 or more")
        _positive(self, "tasks_per_step", "group_timeout_s", "checkpoint_every", "keep_checkpoints")
        _require(self.group_size >= 2, "group_size", self.group_size, "2 or more", "advantages compare siblings of one task")
        _require(self.max_staleness >= 0, "max_staleness", self.max_staleness, "0 (on-policy) or more")


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out tasks, greedy, before and after training."""

    tasks: int = 64
    bootstrap_samples: int = 2000
    memory_off_row: bool = True

    def __post_init__(self) -> None:
        _positive(self, "tasks", "bootstrap_samples")


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow. An empty ``uri`` means MLFLOW_TRACKING_URI, else sqlite in the output folder."""

    enabled: bool = True
    uri: str = ""
    experiment: str = "engram"


@dataclass(frozen=True)
class RayConfig:
    """``address: ""`` starts a local Ray for this run (also when a cluster runs on the machine); ``auto`` or an address joins a cluster."""

    address: str = ""
    object_store_gib: float = 2.0
    startup_timeout_s: float = 300

    def __post_init__(self) -> None:
        _positive(self, "object_store_gib", "startup_timeout_s")


@dataclass(frozen=True)
class RunConfig:
    """One run. ``resume`` is a checkpoint folder, "auto" (the newest in ``output_dir``) or "" (start anew)."""

    name: str = "engram"
    seed: int = 0
    output_dir: str = "runs"
    resume: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    fast_weights: FastWeightsConfig = field(default_factory=FastWeightsConfig)
    write: WriteConfig = field(default_factory=WriteConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        longest = self.memory.max_context_tokens + self.memory.max_extract_tokens
        _require(
            longest < self.engine.max_model_tokens,
            "engine.max_model_tokens",
            self.engine.max_model_tokens,
            f"more than memory.max_context_tokens + memory.max_extract_tokens = {longest}",
            "raise it, or lower the two",
        )
