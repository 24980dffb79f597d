"""The configuration, and the only place with defaults: one frozen dataclass for each part of a run.

`configs.load` builds a `RunConfig` once, from YAML and ``key=value`` arguments. Nothing changes it
afterwards. A value is checked where it is constructed: the message has the value, the bound and the cure. The
comment beside or above a field is its help text (`configs.reference`). Where the paper does not publish a
setting, the help text says so, and the default is our choice.
"""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass, field
from typing import Literal

from configs.bounds import a_day, custom_resource, folder_name, home_expanded, not_negative, positive, require
from configs.ecosystem import GymnasiumConfig, OpenEnvConfig, TextArenaConfig, VerifiersConfig
from configs.environments import (
    ConversationConfig,
    EnvironmentConfig,
    HarnessConfig,
    JudgeConfig,
    McpConfig,
    RecallConfig,
    RecordsConfig,
    RubricConfig,
    SearchConfig,
)
from configs.learning import (
    CurriculumConfig,
    LearnerConfig,
    ObjectiveConfig,
    TeacherConfig,
    WarmStartConfig,
)
from configs.memory import (
    SUMMARIZING,
    FastWeightsConfig,
    MemoryConfig,
    MemoryPolicy,
    NotesConfig,
    PagingConfig,
    PreserveConfig,
    WriteConfig,
)
from configs.services import (
    AssistantConfig,
    EndpointConfig,
    EpisodesConfig,
    RayConfig,
    StoreConfig,
    TrackingConfig,
)
from configs.store_url import store_url

__all__ = [
    "AssistantConfig",
    "ConversationConfig",
    "CurriculumConfig",
    "EmbedderConfig",
    "EndpointConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "EpisodesConfig",
    "EvaluationConfig",
    "FastWeightsConfig",
    "GymnasiumConfig",
    "HarnessConfig",
    "JudgeConfig",
    "LearnerConfig",
    "McpConfig",
    "MemoryConfig",
    "MemoryPolicy",
    "ModelConfig",
    "NotesConfig",
    "ObjectiveConfig",
    "OpenEnvConfig",
    "PagingConfig",
    "PreserveConfig",
    "RayConfig",
    "RecallConfig",
    "RecordsConfig",
    "RolloutConfig",
    "RubricConfig",
    "RunConfig",
    "SamplingConfig",
    "SearchConfig",
    "StoreConfig",
    "TeacherConfig",
    "TextArenaConfig",
    "TrackingConfig",
    "TrainConfig",
    "VerifiersConfig",
    "WarmStartConfig",
    "WriteConfig",
]


@dataclass(frozen=True)
class ModelConfig:
    """The policy's base model: a local Hugging Face folder, a hub name, or ``smollm2-135m``.

    The last comes with the install.
    """

    name: str = "smollm2-135m"  # smollm2-135m, a folder, or a hub name such as Qwen/Qwen3-4B
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False  # runs code that comes with the model
    # the switch of Qwen3's chat template and others; without it replies have no thoughts where a template can
    # leave them out. A thought needs room: raise sampling.max_answer_tokens and memory.max_extract_tokens
    enable_thinking: bool = False
    # the day that a chat template takes for today (Llama 3.2 writes it into the prompt), e.g. 2026-11-30;
    # empty: the day on which the run starts, which a resumed run keeps
    date: str = ""

    def __post_init__(self) -> None:
        home_expanded(self, "name")
        require(a_day(self.date), "date", self.date, "a day such as 2026-11-30; or empty, for today")

    @property
    def day(self) -> dt.date | None:
        """``date`` as a day; None where it is empty."""
        return dt.date.fromisoformat(self.date) if self.date else None


@dataclass(frozen=True)
class EmbedderConfig:
    """The sentence embedder of dense search and linked notes: a local folder, a hub name, or ``minilm``.

    The last comes with the install.
    """

    name: str = "minilm"  # minilm, a folder, or a hub name such as BAAI/bge-small-en-v1.5

    def __post_init__(self) -> None:
        home_expanded(self, "name")


@dataclass(frozen=True)
class SamplingConfig:
    """How training episodes act. Evaluation has its own temperature.

    With ``answer_temperature: 0`` answers are greedy, so that a card's reward says what the card is worth.
    Greedy answers are not trained, they only count in the reward. Such an answer is no sample of the policy:
    its log-prob gives no policy gradient, and to raise it would only make the policy surer of what it says.
    """

    temperature: float = 1.0  # above 0: a group of greedy siblings teaches nothing
    # of answers to the environment; null: sampling.temperature; 0: greedy, and then not trained (see above)
    answer_temperature: float | None = None
    max_answer_tokens: int = 64  # of one act

    def __post_init__(self) -> None:
        positive(self, "temperature", "max_answer_tokens")
        answers = self.answer_temperature
        require(answers is None or answers >= 0, "answer_temperature", answers, "null, 0 (greedy) or more")

    @property
    def of_answers(self) -> float:
        """The temperature of answers."""
        return self.temperature if self.answer_temperature is None else self.answer_temperature


CPU_KV_CACHE_GIB = 1.0


@dataclass(frozen=True)
class EngineConfig:
    """The vLLM engine of each rollout worker.

    ``slots`` is the number of adapter slots, and so the most episodes that run at once on a worker.
    """

    slots: int = 16  # episodes at once
    max_model_tokens: int = 8192  # prompt + answer
    # null: 1 on a CPU, and on a GPU what gpu_memory_utilization leaves; a number is safer where a learner
    # shares the GPU: vLLM then measures nothing
    kv_cache_gib: float | None = None
    gpu_memory_utilization: float = 0.6  # of the whole GPU, without engine.kv_cache_gib
    enforce_eager: bool = False
    # check every installed revision against the writer's own forward pass
    receipts: Literal["always", "off"] = "always"
    # nats per token; null: what the rounding of model.dtype needs, see configs/tolerances.py
    receipt_tolerance: float | None = None

    def __post_init__(self) -> None:
        positive(self, "slots", "max_model_tokens")
        positive(
            self, *(key for key in ("kv_cache_gib", "receipt_tolerance") if getattr(self, key) is not None)
        )
        used = self.gpu_memory_utilization
        require(0 < used <= 1, "gpu_memory_utilization", used, "in (0, 1]")


@dataclass(frozen=True)
class RolloutConfig:
    """Rollout workers.

    A worker is one process: engine, writer and up to ``engine.slots`` concurrent episodes.

    ``refresh: in_flight`` pauses no worker: its episodes go on under the new weights, between two engine
    steps. Each token keeps its version and log-prob, so its ratio is right. An episode is as stale as its
    oldest token. This gives up a rule of the paper, that theta is fixed within a rollout: A and the B of
    earlier writes were made for older weights. The prefix cache is emptied, and the new weights read the
    running contexts again.
    """

    workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    # each worker takes one unit of this custom resource of the cluster, so that an autoscaler adds the right
    # nodes
    resource: str = ""
    threads: int = 1
    max_turns: int = 64  # acts of one episode
    episode_timeout_s: float = 600.0
    # of one call of the environment: start, observe, act; a late one fails its episode, and is named
    environment_timeout_s: float = 300.0
    # "step:workers", e.g. ["10:4","50:2"]: how many workers from a training step on; the command scale
    # overrules it
    schedule: tuple[str, ...] = ()
    health_s: float = 30.0  # between health checks; a worker that misses two is replaced
    # when new weights come: wait for the running episodes, or go on with them (see above)
    refresh: Literal["drain", "in_flight"] = "drain"
    # after a lost worker, episodes go on from their last write, on a worker with the same weights; without
    # such a worker they start again
    recover_episodes: bool = False

    def __post_init__(self) -> None:
        positive(self, "workers", "threads", "max_turns", "health_s")
        positive(self, "episode_timeout_s", "environment_timeout_s")
        bound, cure = "step:workers, two whole numbers", "e.g. rollout.schedule=[10:4,50:2]"
        for entry in self.schedule:
            require(re.fullmatch(r"\d+:[1-9]\d*", entry) is not None, "schedule", entry, bound, cure)
        custom_resource(self.resource)
        not_negative(self, "cpus_per_worker", "gpus_per_worker")
        single_version = self.refresh == "drain" or not self.recover_episodes
        bound, cure = "false with rollout.refresh=in_flight", "a write log is replayed on one policy version"
        require(single_version, "recover_episodes", True, bound, cure)


@dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    The learner drops and counts a group that is more than ``max_staleness`` policy versions old when it takes
    the group. 0 is strictly on-policy.
    """

    steps: int = 200
    tasks_per_step: int = 64  # groups
    group_size: int = 8  # sibling episodes of one task
    max_staleness: int = 1
    checkpoint_every: int = 50
    keep_checkpoints: int = 2  # the newest; the best by evaluate_every is kept too
    evaluate_every: int = 0  # steps between held-out evaluations, each at a checkpoint; 0: none
    evaluate_tasks: int = 16  # of each such evaluation: the first of the eval split
    # a worker that takes longer for a group is replaced; keep it above rollout.episode_timeout_s
    group_timeout_s: float = 1200.0
    # restarts of a lost learner from one checkpoint; the rollout workers stay up. 0: it ends the run
    learner_retries: int = 2
    # what a training is compared with: RL whose siblings exchange their rewards by lot, or as many steps more
    # of the warm start (with its settings, on fresh tasks) in the place of RL
    control: Literal["none", "shuffled_rewards", "supervised"] = "none"

    def __post_init__(self) -> None:
        not_negative(self, "steps", "max_staleness", "evaluate_every", "learner_retries")
        positive(self, "tasks_per_step", "group_timeout_s", "checkpoint_every", "keep_checkpoints")
        positive(self, "evaluate_tasks")
        every, saved = self.evaluate_every, self.checkpoint_every
        bound, cure = f"0 or a multiple of train.checkpoint_every={saved}", "only what is saved can be kept"
        require(every % saved == 0, "evaluate_every", every, bound, cure)
        size, cure = self.group_size, "advantages compare siblings of one task"
        require(size >= 2, "group_size", size, "2 or more", cure)


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out tasks, before and after training."""

    tasks: int = 64
    temperature: float = 0.0  # 0: greedy; the value of sampling.temperature measures what training raises
    bootstrap_samples: int = 2000  # 100 or more
    memory_off_row: bool = True  # also evaluate with memory.policy=truncation
    # a training also evaluates its last policy with gold flashcards, and with its own under other
    # questions (memory.control), where its environment can make these
    control_rows: bool = False

    def __post_init__(self) -> None:
        positive(self, "tasks")
        not_negative(self, "temperature")
        samples, cure = self.bootstrap_samples, "a 95 % interval needs so many resamples"
        require(samples >= 100, "bootstrap_samples", samples, "100 or more", cure)


@dataclass(frozen=True)
class RunConfig:
    """One run.

    ``resume``: a checkpoint folder, "auto" (the newest unfinished run of ``name``) or "" (a new run).
    """

    name: str = "engram"
    seed: int = 0
    # checkpoints, tables, plots; one folder for each run. Also the address of a store (s3://, gs://, file://)
    # so that a run outlives its machine (store.*)
    output_dir: str = "runs"
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
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    episodes: EpisodesConfig = field(default_factory=EpisodesConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    assistant: AssistantConfig = field(default_factory=AssistantConfig)

    def __post_init__(self) -> None:
        store_url(self, "output_dir", "resume")
        home_expanded(self, "output_dir", "resume")
        not_negative(self, "seed")
        folder_name(self, "name")
        importance = self.objective.importance
        corrected = self.rollout.refresh == "drain" or importance == "truncated"
        bound = "truncated with rollout.refresh=in_flight"
        cure = "tokens of older weights need their ratio corrected"
        require(corrected, "objective.importance", importance, bound, cure)
        by_reward = self.objective.credit == "episode" or not self.environment.makes_reward
        bound, cure = "episode with environment.reward or reward_weights", "that reward is of whole episodes"
        require(by_reward, "objective.credit", self.objective.credit, bound, cure)
        trains = self.objective.tokens != "answers" or self.sampling.of_answers > 0
        bound, cure = "both or cards with sampling.answer_temperature=0", "greedy answers are not trained"
        require(trains, "objective.tokens", self.objective.tokens, bound, cure)
        rank = self.fast_weights.sensitivity_rank
        measured = (self.write.optimizer != "natural" and self.write.null_space == 0) or rank > 0
        bound, cure = "1 or more with write.optimizer=natural or write.null_space", "64 is a good value"
        require(measured, "fast_weights.sensitivity_rank", rank, bound, cure)
        kept, most = self.write.null_space, self.fast_weights.rank
        require(kept <= most, "write.null_space", kept, f"at most fast_weights.rank={most}")
        setting, acts = self.environment.acts
        most = self.rollout.max_turns
        cure = "what is asked later would never be answered and score 0: raise that, or lower this"
        require(acts <= most, f"environment.{setting}", acts, f"at most rollout.max_turns={most}", cure)
        self._require_gpus()
        self._require_room()

    @property
    def shares_gpus(self) -> bool:
        """Whether a learner's rank may stand on an engine's GPU: both ask for a part of one."""
        return 0 < self.rollout.gpus_per_worker < 1 and 0 < self.learner.gpus_per_worker < 1

    @property
    def transfer_backend(self) -> Literal["gloo", "nccl"]:
        """Of learner.weight_transfer=collective."""
        on_gpus = self.rollout.gpus_per_worker > 0 and self.learner.gpus_per_worker > 0
        return "nccl" if on_gpus else "gloo"

    def _require_gpus(self) -> None:
        """What vLLM and the learner can do with GPUs."""
        for section, process in (("rollout", "an engine"), ("learner", "a rank of the learner")):
            asked = getattr(self, section).gpus_per_worker
            cure = f"{process} runs on one GPU (no tensor parallelism): raise {section}.workers"
            require(asked <= 1, f"{section}.gpus_per_worker", asked, "at most 1", cure)
        share, alone = self.learner.gpus_per_worker, self.learner.workers == 1
        bound, cure = "0 or 1 with several learner.workers", "NCCL takes one rank a GPU"
        require(alone or share in (0, 1), "learner.gpus_per_worker", share, bound, cure)
        broadcasts = self.learner.weight_transfer == "collective" and self.transfer_backend == "nccl"
        whole = self.rollout.gpus_per_worker == self.learner.gpus_per_worker == 1
        bound, cure = "object_store where processes share a GPU", "NCCL takes one process a GPU"
        require(whole or not broadcasts, "learner.weight_transfer", "collective", bound, cure)
        fits = self.rollout.gpus_per_worker == 0 or self.model.dtype != "float32"
        cure = "vLLM's adapters on a GPU take 16-bit numbers only"
        require(fits, "model.dtype", self.model.dtype, "bfloat16 with rollout.gpus_per_worker above 0", cure)

    def _require_room(self) -> None:
        """A full context, one extraction and a summary must fit into the engine's window."""
        memory, room = self.memory, self.engine.max_model_tokens
        parts = ["max_context_tokens", "max_extract_tokens"]
        if memory.policy in SUMMARIZING:
            parts.append("max_summary_tokens")
        least = 1 + sum(getattr(memory, part) for part in parts)
        bound = f"{least} or more ({' + '.join(f'memory.{part}' for part in parts)} + 1)"
        require(room >= least, "engine.max_model_tokens", room, bound, "raise it, or lower the others")
