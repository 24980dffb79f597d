"""The configuration, and the only place with defaults: one frozen dataclass per part.

`configs.load` builds a `RunConfig` from YAML and ``key=value`` overrides, once; nothing changes it afterwards. A value is checked where it is
constructed: the message has the value, the bound and the cure. Settings that the paper leaves unpublished say so; their default is our choice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from configs.assistant import AssistantConfig
from configs.bounds import custom_resource, not_negative, positive, require
from configs.environments import (
    ConversationConfig,
    EnvironmentConfig,
    JudgeConfig,
    RecallConfig,
    RecordsConfig,
    RubricConfig,
    SearchConfig,
)
from configs.learning import LearnerConfig, ObjectiveConfig, WarmStartConfig
from configs.memory import (
    SUMMARIZING,
    FastWeightsConfig,
    MemoryConfig,
    MemoryPolicy,
    NotesConfig,
    PagingConfig,
    WriteConfig,
)

__all__ = [
    "AssistantConfig",
    "ConversationConfig",
    "EmbedderConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "EpisodesConfig",
    "EvaluationConfig",
    "FastWeightsConfig",
    "JudgeConfig",
    "LearnerConfig",
    "MemoryConfig",
    "MemoryPolicy",
    "ModelConfig",
    "NotesConfig",
    "ObjectiveConfig",
    "PagingConfig",
    "RayConfig",
    "RecallConfig",
    "RecordsConfig",
    "RolloutConfig",
    "RubricConfig",
    "RunConfig",
    "SamplingConfig",
    "SearchConfig",
    "TrackingConfig",
    "TrainConfig",
    "WarmStartConfig",
    "WriteConfig",
]


@dataclass(frozen=True)
class ModelConfig:
    """The policy's base model: ``smollm2-135m`` (comes with the install), a local Hugging Face folder, or a hub name."""

    name: str = "smollm2-135m"  # smollm2-135m, a folder, or a hub name such as Qwen/Qwen3-4B
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False  # runs code that comes with the model


@dataclass(frozen=True)
class EmbedderConfig:
    """The sentence embedder of dense search and of linked notes: ``minilm`` (comes with the install), a local folder, or a hub name."""

    name: str = "minilm"  # minilm, a folder, or a hub name such as BAAI/bge-small-en-v1.5


@dataclass(frozen=True)
class SamplingConfig:
    """How training episodes act. Evaluation has its own temperature."""

    temperature: float = 1.0  # never 0: a group of greedy siblings teaches nothing
    max_answer_tokens: int = 64  # per act

    def __post_init__(self) -> None:
        positive(self, "temperature", "max_answer_tokens")


@dataclass(frozen=True)
class EngineConfig:
    """One vLLM engine per rollout worker. ``slots`` is both the adapter slots and the most episodes that run at once on a worker."""

    slots: int = 16  # episodes at once
    max_model_tokens: int = 8192  # prompt + answer
    kv_cache_gib: float = 1.0  # CPU
    gpu_memory_utilization: float = 0.6  # GPU
    enforce_eager: bool = False
    receipts: Literal["always", "off"] = (
        "always"  # check every installed revision against the writer's own forward pass
    )
    receipt_tolerance: float = (
        0.02  # nats per token, float32; bfloat16 needs about 0.3 (the base model's own rounding)
    )

    def __post_init__(self) -> None:
        positive(self, "slots", "max_model_tokens", "kv_cache_gib", "receipt_tolerance")
        require(
            0 < self.gpu_memory_utilization <= 1,
            "gpu_memory_utilization",
            self.gpu_memory_utilization,
            "in (0, 1]",
        )


@dataclass(frozen=True)
class RolloutConfig:
    """Rollout workers. A worker is one process: engine, writer and up to ``engine.slots`` concurrent episodes.

    ``refresh: in_flight`` pauses no worker: its episodes go on under the new weights, between two engine steps. Each token keeps its version and
    log-prob, so its ratio is right, and an episode is as stale as its oldest token. Given up: the paper fixes theta within a rollout, and here A and
    the B of earlier writes were made for older weights. The prefix cache is emptied and what runs is read again by the new weights.
    """

    workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    resource: str = ""  # of a cluster: one unit of this custom resource a worker, so that an autoscaler adds the right kind of node
    threads: int = 1
    max_turns: int = 64  # acts of one episode
    episode_timeout_s: float = 600
    schedule: tuple[
        str, ...
    ] = ()  # "step:workers", e.g. ["10:4","50:2"]: how many workers from a training step on; `scale` overrules it
    health_s: float = 30  # between health checks; a worker that misses two is replaced
    refresh: Literal["drain", "in_flight"] = (
        "drain"  # new weights: end the episodes first, or go on with them (see above)
    )
    recover_episodes: bool = False  # after a loss, go on from each episode's last write on a worker with the same weights (elsewhere: from the start)

    def __post_init__(self) -> None:
        positive(self, "workers", "threads", "max_turns", "episode_timeout_s", "health_s")
        for entry in self.schedule:
            known = re.fullmatch(r"\d+:[1-9]\d*", entry) is not None
            require(
                known,
                "schedule",
                entry,
                "step:workers, two whole numbers",
                "e.g. rollout.schedule=[10:4,50:2]",
            )
        custom_resource(self.resource)
        not_negative(self, "cpus_per_worker", "gpus_per_worker")
        one = self.refresh == "drain" or not self.recover_episodes
        require(
            one,
            "recover_episodes",
            True,
            "false with rollout.refresh=in_flight",
            "a write log is replayed on one policy version",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The loop. A group older than ``max_staleness`` policy versions when the learner takes it is dropped and counted; 0 is strictly on-policy."""

    steps: int = 200
    tasks_per_step: int = 64  # groups
    group_size: int = 8  # sibling episodes of one task
    max_staleness: int = 1
    checkpoint_every: int = 50
    keep_checkpoints: int = 2  # the newest; the best by evaluate_every is kept besides
    evaluate_every: int = 0  # steps between held-out evaluations, each at a checkpoint; 0 is none
    evaluate_tasks: int = 16  # of each: the first of the eval split
    group_timeout_s: float = (
        1200  # a worker that takes longer is replaced: keep it above rollout.episode_timeout_s
    )

    def __post_init__(self) -> None:
        not_negative(self, "steps", "max_staleness", "evaluate_every")
        positive(
            self,
            "tasks_per_step",
            "group_timeout_s",
            "checkpoint_every",
            "keep_checkpoints",
            "evaluate_tasks",
        )
        at_checkpoints = self.evaluate_every % self.checkpoint_every == 0
        allowed = f"0 or a multiple of train.checkpoint_every={self.checkpoint_every}"
        require(
            at_checkpoints,
            "evaluate_every",
            self.evaluate_every,
            allowed,
            "only what is saved can be kept as the best",
        )
        require(
            self.group_size >= 2,
            "group_size",
            self.group_size,
            "2 or more",
            "advantages compare siblings of one task",
        )


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out tasks, before and after training."""

    tasks: int = 64
    temperature: float = 0.0  # 0 is greedy; sampling.temperature: the reward that training raises
    bootstrap_samples: int = 2000  # 100 or more
    memory_off_row: bool = True  # also evaluate with memory.policy=truncation

    def __post_init__(self) -> None:
        positive(self, "tasks")
        not_negative(self, "temperature")
        require(
            self.bootstrap_samples >= 100,
            "bootstrap_samples",
            self.bootstrap_samples,
            "100 or more",
            "a 95 % interval needs so many resamples",
        )


@dataclass(frozen=True)
class EpisodesConfig:
    """Which episodes are kept to be looked into (``python -m cluster inspect``): a file each in the run's folder."""

    per_step: int = 1  # of the episodes that a training step learned from, drawn by lot
    per_evaluation: int = 2  # of each held-out evaluation: its first tasks, so that rows show the same ones
    failed: int = 100  # of a run; those that fail after them are only counted
    traces: bool = True  # the same as MLflow traces of the run

    def __post_init__(self) -> None:
        not_negative(self, "per_step", "per_evaluation", "failed")


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow. An empty ``uri`` means MLFLOW_TRACKING_URI, else sqlite in the output folder."""

    enabled: bool = True
    uri: str = ""
    experiment: str = "engram"
    timeout_s: float = 20.0  # of one request to a server
    finish_timeout_s: float = 30.0  # the end of a run waits so long for a store that is away; what is left by then stays in the run's folder
    system_metrics_s: float = (
        10.0  # between looks at the driver's machine (processor, memory, disk, network, GPUs); 0 is never
    )
    models: Literal["reference", "upload", "off"] = (
        "reference"  # kept checkpoints as registered models: where they lie, or all their files
    )

    def __post_init__(self) -> None:
        positive(self, "timeout_s")
        not_negative(self, "finish_timeout_s", "system_metrics_s")


@dataclass(frozen=True)
class RayConfig:
    """``address: ""`` starts a local Ray for this run (also when a cluster runs on the machine); ``auto`` or an address joins a cluster.

    In a Ray job it is ``auto`` unless an argument says otherwise.
    """

    address: str = ""
    object_store_gib: float = 2.0  # of a local Ray
    startup_timeout_s: float = 300

    def __post_init__(self) -> None:
        positive(self, "object_store_gib", "startup_timeout_s")


@dataclass(frozen=True)
class RunConfig:
    """One run. ``resume`` is a checkpoint folder, "auto" (the newest in ``output_dir``) or "" (start anew)."""

    name: str = "engram"
    seed: int = 0
    output_dir: str = "runs"  # checkpoints, tables, plots; one folder a run
    resume: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    fast_weights: FastWeightsConfig = field(default_factory=FastWeightsConfig)
    write: WriteConfig = field(default_factory=WriteConfig)
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    episodes: EpisodesConfig = field(default_factory=EpisodesConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    assistant: AssistantConfig = field(default_factory=AssistantConfig)

    def __post_init__(self) -> None:
        not_negative(self, "seed")
        corrected = self.rollout.refresh == "drain" or self.objective.importance == "truncated"
        cure = "tokens of older weights need their ratio corrected"
        require(
            corrected,
            "objective.importance",
            self.objective.importance,
            "truncated with rollout.refresh=in_flight",
            cure,
        )
        measured = self.write.optimizer != "natural" or self.fast_weights.sensitivity_rank > 0
        rank = self.fast_weights.sensitivity_rank
        require(
            measured,
            "fast_weights.sensitivity_rank",
            rank,
            "1 or more with write.optimizer=natural",
            "64 is a good value",
        )
        setting, acts = self.environment.acts
        most = self.rollout.max_turns
        cure = "what is asked later would never be answered and score 0: raise that, or lower this"
        require(acts <= most, f"environment.{setting}", acts, f"at most rollout.max_turns={most}", cure)
        memory, have = self.memory, self.engine.max_model_tokens
        summary = memory.max_summary_tokens if memory.policy in SUMMARIZING else 0
        least = 1 + memory.max_context_tokens + memory.max_extract_tokens + summary
        sum_of = f"memory.max_context_tokens + memory.max_extract_tokens{' + memory.max_summary_tokens' if summary else ''} + 1"
        require(
            have >= least,
            "engine.max_model_tokens",
            have,
            f"{least} or more ({sum_of})",
            "raise it, or lower the others",
        )
