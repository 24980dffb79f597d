"""Settings of learning: objective, learner and warm start. `configs.schema` puts them into a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from configs.bounds import custom_resource, home_expanded, not_negative, positive, require
from configs.services import EndpointConfig
from configs.user_code import FORM, is_path

ADVANTAGES = ("grpo", "positive", "rloo")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All linear matrices of a layer (Llama, Mistral, Qwen2, Qwen3)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The stop-gradient GRPO update (TMEM, arXiv 2606.04536).

    The paper does not publish clipping, KL, division by the standard deviation and importance correction:
    their defaults are our choices.
    """

    # grpo, positive (grpo without values below 0), rloo (leave one out), or package.module:name of a function
    # from the siblings' rewards to their advantages
    advantage: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    normalize_by_std: bool = True  # grpo and positive: divide by the standard deviation of a group's rewards
    kl_coefficient: float = 0.0  # of the KL to the policy as RL begins, after the warm start if there is one
    importance: Literal["truncated", "none"] = "truncated"  # corrects engine log-probs to the learner's
    importance_cap: float = 2.0
    minibatches: int = 1  # optimizer steps on one batch
    aggregate: Literal["token", "sequence"] = "token"  # what the loss averages over
    # what RL trains: all that is sampled, the texts for the memory alone (cards), or the answers alone;
    # answers sampled at sampling.answer_temperature=0 are never trained, see there
    tokens: Literal["both", "cards", "answers"] = "both"
    # episode: all that an episode sampled has the advantage of its reward; question: an answer has the
    # advantage of its own question's score among the siblings, and a card the mean of those of the
    # questions that it is about and of those that its context tells and no card is about, as far as the
    # environment can say (Attributor); the rest has the episode's
    credit: Literal["episode", "question"] = "episode"
    # own: a segment is scored under the Delta that it was sampled under; final: under the episode's last
    # Delta (an ablation, biased)
    snapshot: Literal["own", "final"] = "own"

    def __post_init__(self) -> None:
        known = self.advantage in ADVANTAGES or is_path(self.advantage)
        require(known, "advantage", self.advantage, f"{', '.join(ADVANTAGES)} or {FORM}")
        positive(self, "clip_low", "clip_high", "importance_cap", "minibatches")
        not_negative(self, "kl_coefficient")


@dataclass(frozen=True)
class LearnerConfig:
    """The DeepSpeed learner.

    ``trainable: full`` is the paper's. ``last_layers`` trains only the last ``trainable_layers``: cheap on a
    CPU. ``lora`` trains a LoRA on the policy, beside the fast weights: only its factors have gradients and
    optimizer states, and only they travel to the workers. It needs a higher ``learning_rate``, 1e-5 to 1e-4.
    """

    learning_rate: float = 1e-6
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    adam_beta2: float = 0.999
    # what DeepSpeed shards: nothing, optimizer, + gradients, + parameters
    zero_stage: Literal[0, 1, 2, 3] = 1
    workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    resource: str = ""  # each rank takes one unit of this custom resource of the cluster
    threads: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    microbatch_tokens: int = 2048  # in one forward and backward pass
    trainable: Literal["full", "last_layers", "lora"] = "full"
    trainable_layers: int = 8  # with trainable=last_layers
    lora_rank: int = 16  # with trainable=lora; as PEFT's r; its dropout is always 0
    lora_alpha: float = 32.0  # with trainable=lora: the factors' product counts alpha / rank times
    lora_targets: tuple[str, ...] = LORA_TARGETS  # with trainable=lora: the matrices of every layer
    gradient_checkpointing: bool = False
    step_timeout_s: float = 1800.0
    # how new weights come to the workers: through Ray's object store, or broadcast to all at once (NCCL where
    # learner and workers have GPUs, gloo elsewhere), with the object store for those that it does not reach.
    # NCCL has not run on a GPU yet.
    weight_transfer: Literal["object_store", "collective"] = "object_store"

    def __post_init__(self) -> None:
        positive(self, "learning_rate", "max_grad_norm", "workers", "threads", "microbatch_tokens")
        positive(self, "trainable_layers", "lora_rank", "lora_alpha", "step_timeout_s")
        not_negative(self, "warmup_steps", "weight_decay", "cpus_per_worker", "gpus_per_worker")
        custom_resource(self.resource)
        require(0 <= self.adam_beta2 < 1, "adam_beta2", self.adam_beta2, "in [0, 1)")
        known = 0 < len(self.lora_targets) == len(set(self.lora_targets) & set(LORA_TARGETS))
        require(known, "lora_targets", self.lora_targets, f"one or more of {', '.join(LORA_TARGETS)}")

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank


@dataclass(frozen=True)
class CurriculumConfig:
    """Stages of training tasks, for any environment. Held-out tasks and the warm start stay as they are.

    A stage is a mapping. ``environment`` has settings of ``environment.*``, laid over the run's own. The
    stage ends after ``steps`` training steps, or when the mean of ``metric`` over its last ``window`` steps
    is ``at_least`` or ``at_most`` a bound, whichever comes first. The last stage ends with the run. Example:
    ``[{environment: {recall: {sessions: 1}}, metric: reward/mean, at_least: 0.6, window: 5, steps: 40}, {}]``
    """

    stages: tuple[dict[str, Any], ...] = field(default=(), hash=False)  # empty: none

    @property
    def is_on(self) -> bool:
        return len(self.stages) > 0


@dataclass(frozen=True)
class TeacherConfig(EndpointConfig):
    """An LLM behind an OpenAI-compatible endpoint that writes a warm start's flashcards. No url: none.

    Its key is read from the environment variable ``api_key_env``, and never logged. A card whose answer does
    not stand in the text that it comes from is dropped and counted.
    """

    cache_dir: str = ""  # answers are kept here and asked for once; empty: the folder teacher in output_dir

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.url == "" or self.model != "", "model", self.model, "given where there is a url")


@dataclass(frozen=True)
class WarmStartConfig:
    """A short supervised stage that teaches a small model to write parsable flashcards.

    ``steps: 0`` skips it. The flashcards are the environment's own where it knows any. With a file or a
    teacher they come from there, for any environment; with both, from each in turn.
    """

    steps: int = 0
    tasks_per_step: int = 8  # or lines of ``demonstrations``
    learning_rate: float = 1e-4
    # of each step: so many questions that nothing told is answered by "I don't know.", and the same questions
    # answered behind a text that tells the answer; few are enough, with many it says so of what it knows
    unknown: int = 0
    # by_lot: each card asks its own question or one beside it, drawn by lot: the form is taught, and what to
    # ask is left to RL (for an environment with questions beside a card, as recall)
    asking: Literal["gold", "by_lot"] = "gold"
    # a JSON lines file of texts and of the flashcards to write of them (actors/README.md shows the format)
    demonstrations: str = ""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    def __post_init__(self) -> None:
        home_expanded(self, "demonstrations")
        not_negative(self, "steps", "unknown")
        positive(self, "tasks_per_step", "learning_rate")
