"""Small models and trajectories for the learner's tests, and their reference in plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis
from actors.types import (
    ActionSpan,
    FastWeights,
    Outcome,
    Segment,
    SpanKind,
    Task,
    Timings,
    Trajectory,
    TrajectoryGroup,
)
from configs.schema import FastWeightsConfig, LearnerConfig, ObjectiveConfig
from learner.advantage import grpo
from learner.learner import Learner

VOCABULARY = 256
UNWEIGHTED = ObjectiveConfig(importance="none")
TASK = Task("task-0", "recall", {}, 0)


def write_model(folder: Path) -> Basis:
    """Write a random Llama of three layers (float32, tied head) to ``folder``.

    Returns a basis of rank 3 for its last two layers.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        dtype="float32",
    )
    model = LlamaForCausalLM(config).float()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.15, generator=draw)
    model.save_pretrained(folder)
    return compute_basis_from_checkpoint(folder, FastWeightsConfig(rank=3, last_layers=2), 0)


def fast_weights(basis: Basis, revision: int, seed: int, size: float = 0.05) -> FastWeights:
    rng = np.random.default_rng([seed, revision])
    return FastWeights(
        basis.id,
        revision,
        {
            name: rng.normal(0, size, (rows, basis.rank)).astype(np.float32)
            for name, rows in basis.d_out.items()
        },
    )


def segment(rng: np.random.Generator, length: int, revision: int, kind: SpanKind) -> Segment:
    """Random ids; the last third was sampled, with engine log-probs near those of a flat distribution."""
    start = length - max(1, length // 3)
    mask = np.arange(length) >= start
    logprobs = np.where(mask, rng.normal(-5.5, 0.3, length), 0).astype(np.float32)
    return Segment(
        rng.integers(0, VOCABULARY, length).astype(np.int32),
        mask,
        logprobs,
        0,
        revision,
        (ActionSpan(start, length, kind),),
    )


def trajectory(basis: Basis, seed: int, reward: float, lengths: Sequence[int] = (19, 11, 14)) -> Trajectory:
    """Segments of ``lengths`` under revisions 0, 1, 2...; all but the last are extractions."""
    rng = np.random.default_rng(seed)
    last = len(lengths) - 1
    segments = tuple(
        segment(rng, length + seed % 3, place, "act" if place == last else "extract")
        for place, length in enumerate(lengths)
    )
    revisions = tuple(fast_weights(basis, revision, seed) for revision in range(1, len(lengths)))
    return Trajectory(
        TASK,
        f"episode-{seed}",
        0,
        segments,
        revisions,
        (),
        {},
        Outcome(reward, {}, ()),
        "done",
        Timings(0, 0, 0, 0, 0, 0),
    )


def group(basis: Basis, rewards: Sequence[float], first_seed: int = 1) -> TrajectoryGroup:
    return TrajectoryGroup(
        TASK,
        0,
        tuple(trajectory(basis, first_seed + place, reward) for place, reward in enumerate(rewards)),
        (),
        "worker-0",
    )


def learner(
    model_path: Path,
    basis: Basis,
    config: LearnerConfig,
    objective: ObjectiveConfig = UNWEIGHTED,
    temperature: float = 1.0,
    rank: int = 0,
    world_size: int = 1,
    answer_temperature: float | None = None,
    shuffle_rewards: bool = False,
) -> Learner:
    return Learner(
        config,
        objective,
        str(model_path),
        basis,
        0,
        temperature,
        rank,
        world_size,
        answer_temperature,
        shuffle_rewards,
    )


def free(
    learning_rate: float = 1e-3, zero_stage: int = 0, microbatch_tokens: int = 60, **changes: object
) -> LearnerConfig:
    """A config whose clipping never acts, so that gradients can be compared."""
    return LearnerConfig(
        learning_rate=learning_rate,
        zero_stage=zero_stage,
        microbatch_tokens=microbatch_tokens,
        max_grad_norm=1e9,
        **changes,
    )  # type: ignore[arg-type]


def gradient_of_step(
    made: Learner, groups: Sequence[TrajectoryGroup], folder: Path
) -> dict[str, torch.Tensor]:
    """Return the gradient of a first step, by name: Adam's first moment after it is 0.1 times that."""
    made.step(groups)
    made.save(folder)
    moments = safetensors.torch.load_file(folder / "optimizer" / "exp_avg.safetensors")
    return {name: moment / 0.1 for name, moment in moments.items()}


def merged_model(model_path: Path, basis: Basis, weights: FastWeights | None) -> LlamaForCausalLM:
    """A fresh copy of the model with W + B A written into its matrices."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    if weights is not None:
        with torch.no_grad():
            for name, b in weights.b.items():
                a = torch.from_numpy(weights.a[name]) if weights.a else basis.a[name]
                model.get_submodule(name).weight += torch.from_numpy(b) @ a
    return model


def sampled_logprobs(model: torch.nn.Module, part: Segment, temperature: float = 1.0) -> torch.Tensor:
    """Plain log-softmax of one unpadded sequence at its sampled tokens, [K]."""
    ids = torch.from_numpy(part.token_ids.astype(np.int64))[None]
    logp = (model(input_ids=ids, use_cache=False).logits[0, :-1] / temperature).log_softmax(-1)
    return logp.gather(-1, ids[0, 1:, None]).squeeze(-1)[torch.from_numpy(part.action_mask[1:])]


def segments_of(groups: Sequence[TrajectoryGroup]) -> Iterator[tuple[Trajectory, Segment]]:
    for siblings in groups:
        for episode in siblings.trajectories:
            for part in episode.segments:
                yield episode, part


def largest_relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Over tensors: norm of the difference over norm of the expected."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-12))
        for name in expected
    )


def reference_steps(
    folder: Path, basis: Basis, groups: list[TrajectoryGroup], config: LearnerConfig, steps: int
) -> dict[str, torch.Tensor]:
    """Make the same steps in plain torch: one model, and clipped AdamW.

    Delta is added to the weights around each sequence, and taken away again.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.weight_decay,
    )
    episodes = groups[0].trajectories
    advantages = grpo([episode.outcome.reward for episode in episodes], True)
    by_episode = dict(zip((episode.episode_id for episode in episodes), advantages, strict=True))
    tokens = sum(int(part.action_mask.sum()) for _, part in segments_of(groups))
    for _ in range(steps):
        optimizer.zero_grad()
        for episode, part in segments_of(groups):
            weights = episode.weights_of(part)
            deltas = weights.b if weights else {}
            matrices = {name: model.get_submodule(name).weight for name in deltas}
            saved = {name: matrix.detach().clone() for name, matrix in matrices.items()}
            for name, matrix in matrices.items():
                matrix.data += torch.from_numpy(deltas[name]) @ basis.a[name]
            (-by_episode[episode.episode_id] * sampled_logprobs(model, part).sum() / tokens).backward()
            for name, matrix in matrices.items():
                matrix.data.copy_(saved[name])
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal_updates(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    start: dict[str, torch.Tensor],
    tolerance: float,
) -> None:
    """Weights must agree within ``tolerance`` (relative, per tensor), and updates within 100 times that.

    Only norms can be compared: Adam divides by |gradient|, so an element whose gradient is rounding may move
    either way.
    """
    assert largest_relative_difference(found, expected) < tolerance
    updates = [{name: weights[name] - start[name] for name in expected} for weights in (found, expected)]
    assert min(float(update.norm()) for update in updates[1].values()) > 0
    assert largest_relative_difference(*updates) < 100 * tolerance
