"""The learner: groups of trajectories in, a new policy version out. No Ray inside; one instance per rank.

    groups -> advantages -> rows -> microbatches of this rank
                for each minibatch:  for each microbatch:  forward under its Deltas -> objective -> backward
                                     one optimizer step
    -> StepReport

Collective over ranks: every rank gets the same groups and takes its own share. The only wait is that of ranks
for each other, inside torch.distributed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.fast_weights.delta import Basis, DeltaInjector, StackedWeights, stack
from actors.types import PolicyVersion, Segment, Trajectory, TrajectoryGroup
from actors.weight_transfer import Sender
from configs.schema import LearnerConfig, ObjectiveConfig
from learner import checkpoint
from learner.advantage import estimator, score, shuffled
from learner.batch import Minibatch, as_objective_sees, has_signal, pack, pad, rows_of, split, supervised_rows
from learner.engine import TrainingEngine
from learner.frozen_layers import FrozenLayers
from learner.lora import whole_policy
from learner.model import Inputs, PolicyModel, load_model, load_reference
from learner.objective import TokenBatch, TokenStatistics, policy_objective
from learner.report import Done, step_report
from learner.types import LearnerError, Microbatch, Row, ScoredTrajectory, StepReport, WarmStartReport


@dataclass(frozen=True, slots=True)
class _Reference:
    """The policy that the KL term pulls back to."""

    model: PolicyModel
    injector: DeltaInjector


class Learner:
    """theta, its optimizer and its version.

    ``temperature`` is that of the sampled log-probs (``sampling.temperature``), ``answer_temperature`` that
    of answers where it differs. With one minibatch the old log-probs of PPO's ratio are the current ones,
    detached: one step per batch, ratio 1. With more, a pass without gradient computes those of the others at
    the start of the step. The KL reference is the policy as RL begins: ``model_path``, loaded a second time
    when ``kl_coefficient > 0``, or what the warm start made of it. ``shuffle_rewards``: a control, see
    ``advantage.shuffled``.
    """

    def __init__(
        self,
        config: LearnerConfig,
        objective: ObjectiveConfig,
        model_path: str,
        basis: Basis,
        seed: int,
        temperature: float,
        rank: int,
        world_size: int,
        answer_temperature: float | None = None,
        shuffle_rewards: bool = False,
        lost_versions: int = 0,
    ) -> None:
        self._config, self._objective, self._basis = config, objective, basis
        self._estimate = estimator(objective)
        self._model_path, self._seed = model_path, seed
        self._shuffle_rewards = shuffle_rewards
        self._temperature, self._answer_temperature = temperature, answer_temperature
        self._model = load_model(model_path, config, seed)
        self._injector = DeltaInjector(self._model.base, basis)
        self._engine = TrainingEngine(self._model, config, rank, world_size)
        self._frozen = FrozenLayers(self._model, config, basis)
        self._reference: _Reference | None = None
        if objective.kl_coefficient > 0:
            reference = load_reference(model_path, config).to(self._engine.device)
            self._reference = _Reference(reference, DeltaInjector(reference.base, basis))
        self._counters = checkpoint.Counters(version=0, rl_steps=0, adam_steps=0, warm=False)
        self._lost_versions = lost_versions

    @property
    def version(self) -> PolicyVersion:
        """Steps behind the weights, and the versions that were lost with an earlier learner of the run.

        Each ``warm_start_step`` adds one, and each ``step`` that moved the weights.
        """
        return self._counters.version + self._lost_versions

    def step(self, groups: Sequence[TrajectoryGroup]) -> StepReport:
        """Make one RL step on ``groups``.

        Where no trained token has an advantage, there is nothing to learn: weights, Adam's state and version
        stay, with a KL term too. A step of Adam would move the weights by its momentum more than by that
        term. The same holds for each minibatch.

        Raises ValueError for a reward that is not finite, and LearnerError. Weights and version are then as
        before, with one exception: when minibatch k > 1 has a gradient that is not finite, the k - 1 before
        it stay applied under the old version. The message says so. Such weights belong to no version, and the
        run must resume from a checkpoint; undoing would need a second copy of theta and Adam.
        """
        started = time.perf_counter()
        paid = [shuffled(group, self._seed) for group in groups] if self._shuffle_rewards else groups
        finished = [score(group, self._estimate, self._objective.credit) for group in paid]
        scored = [episode for group in finished for episode in group]
        segments = (segment for episode in scored for segment in episode.trajectory.segments)
        if not any(segment.action_mask.any() for segment in segments):
            raise LearnerError(
                f"nothing to learn from: {len(groups)} groups hold {len(scored)} finished episodes "
                "and no sampled token"
            )
        greedy = self._answer_temperature == 0
        scored_groups = [as_objective_sees(group, self._objective, greedy) for group in finished]
        minibatches = self._plan([episode for group in scored_groups for episode in group])
        if all(minibatch.is_idle for minibatch in minibatches):
            seconds = time.perf_counter() - started
            done = Done(TokenStatistics.none(), [], 0.0, seconds)
            return step_report(self.version, self._objective, scored_groups, minibatches, done)
        self._begin_rl()
        rate = self._learning_rate()
        statistics, norms = self._minibatches(minibatches, rate)
        self._count(version=1, rl_steps=1)
        sums, maxima = self._engine.sums(statistics.sums), self._engine.maxima(statistics.maxima)
        done = Done(TokenStatistics.of(sums, maxima), norms, rate, time.perf_counter() - started)
        return step_report(self.version, self._objective, scored_groups, minibatches, done)

    def warm_start_step(self, segments: Sequence[Segment], learning_rate: float) -> WarmStartReport:
        """Make one supervised step: mean cross-entropy on the masked tokens, Delta = 0, temperature 1.

        The log-probs in the segments are not used. The warm start has moments of its own, and the first RL
        step after it starts with fresh ones. Supervised gradients are orders of magnitude larger, and would
        keep Adam's steps small for a long time. Raises LearnerError.
        """
        started = time.perf_counter()
        rows = supervised_rows(segments)
        if not rows:
            raise LearnerError(
                f"nothing to learn from: {len(segments)} warm-start segments hold no target token"
            )
        if not self._counters.warm:
            self._reset_optimizer(warm=True)
        loss = 0.0
        plan = pack(rows, self._config.microbatch_tokens, self._engine.world_size, temperature=1.0)
        for microbatch in self._share(plan):
            with self._delta(microbatch):
                logp, _ = self._forward(microbatch)
                term = -(self._per_token(microbatch, microbatch.scales) * logp).sum()
                self._engine.backward(term)
            loss += float(term.detach())
        norm = self._engine.step(learning_rate)
        self._count(version=1, adam_steps=1)
        (loss,) = self._engine.sums((loss,))
        tokens = sum(int(row.segment.action_mask.sum()) for row in rows)
        return WarmStartReport(self.version, loss, norm, tokens, time.perf_counter() - started)

    def logprobs(self, trajectory: Trajectory) -> tuple[NDArray[np.float32], ...]:
        """Return the learner's own log-probs of each segment under its revision, for checks.

        float32 [T] each, laid out like ``Segment.logprobs``.
        """
        result = []
        for segment in trajectory.segments:
            row = Row(segment, trajectory.weights_of(segment), 0.0, 0.0)
            microbatch = pad([row], self._temperature, self._answer_temperature)
            values = np.zeros(len(segment.token_ids), dtype=np.float32)
            with torch.no_grad(), self._delta(microbatch):
                values[segment.action_mask] = self._forward(microbatch)[0].cpu().numpy()
            result.append(values)
        return tuple(result)

    def weights(self, trainable_only: bool, copy: bool = True, wanted: bool = True) -> dict[str, Tensor]:
        """Return full weights by name, on the CPU, in ``config.dtype``; {} where they are not ``wanted``.

        ``trainable_only``: those that training changes; of a LoRA the factors (learner.lora).
        Without ``copy`` they may be the learner's own memory, which its next step overwrites.
        """
        if trainable_only:
            return dict(self._engine.full_tensors(self._model.by_name(trainable_only=True), copy, wanted))
        return dict(whole_policy(self._engine, self._model, copy, wanted=wanted))

    def send(self, sender: Sender | None, transfer: str, trainable_only: bool, deadline_s: float) -> str:
        """Broadcast what ``weights`` would return. Return "", or how that failed. Collective.

        ``sender``: None on a rank that only helps to gather.
        """
        named = self._model.by_name(trainable_only)
        tensors = self._engine.full_values(named)
        if sender is None:
            for _ in tensors:
                pass
            return ""
        manifest = [(name, one.dtype, tuple(getattr(one, "ds_shape", one.shape))) for name, one in named]
        return sender.send(transfer, manifest, tensors, deadline_s)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save everything; see ``learner.checkpoint``. Raises LearnerError."""
        reference = None if self._reference is None else self._reference.model
        kept = reference if self._counters.has_own_reference else None
        checkpoint.save(folder, self._engine, self._model, kept, self._counters, self._model_path)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Go on from what ``save`` wrote. Raises LearnerError."""
        reference = None if self._reference is None else self._reference.model
        self._counters = checkpoint.load(folder, self._engine, self._model, reference)

    # --- one step ------------------------------------------------------------------------------------------

    def _plan(self, scored: Sequence[ScoredTrajectory]) -> list[Minibatch]:
        objective, ranks, budget = self._objective, self._engine.world_size, self._config.microbatch_tokens
        plan = []
        for part in split(scored, objective.minibatches, (self._seed, self._counters.version)):
            # with a KL term an episode of advantage 0 has a gradient too, beside one that teaches
            skip = objective.kl_coefficient == 0 or not any(map(has_signal, part))
            rows = rows_of(part, objective.aggregate, skip_zero_advantage=skip)
            packed = pack(rows.rows, budget, ranks, self._temperature, self._answer_temperature)
            plan.append(Minibatch(rows, packed))
        return plan

    def _minibatches(
        self, minibatches: Sequence[Minibatch], rate: float
    ) -> tuple[TokenStatistics, list[float]]:
        """Make an optimizer step on each that is not idle. Return statistics, and the norms of gradients."""
        busy = [(place, minibatch) for place, minibatch in enumerate(minibatches) if not minibatch.is_idle]
        # All of them before the first optimizer step: they are of the weights before it. The first
        # minibatch trains at these weights, so its own pass shows them.
        norms: list[float] = []
        statistics = TokenStatistics.none()
        with self._frozen.remembered(len(busy) > 1 or self._reference is not None):
            old = [None, *(self._old_logprobs(minibatch) for _, minibatch in busy[1:])]
            for (place, minibatch), old_logprobs in zip(busy, old, strict=True):
                statistics = statistics.merge(self._accumulate(minibatch, old_logprobs))
                norms.append(self._optimize(rate, place, len(minibatches), applied=len(norms)))
        return statistics, norms

    def _accumulate(self, minibatch: Minibatch, old_logprobs: list[Tensor] | None) -> TokenStatistics:
        """Forward and backward of this rank's microbatches."""
        statistics = TokenStatistics.none()
        for place, microbatch in enumerate(self._share(minibatch.ranks)):
            with self._delta(microbatch):  # around the backward too: checkpointing runs layers again there
                logp, entropy = self._forward(microbatch)
                batch = TokenBatch(
                    logp=logp,
                    old_logp=logp.detach() if old_logprobs is None else old_logprobs[place],
                    engine_logp=self._tensor(microbatch.engine_logprobs[microbatch.loss_mask]),
                    reference_logp=self._reference_logprobs(microbatch),
                    entropy=entropy,
                    advantage=self._tensor(microbatch.advantages[microbatch.loss_mask]),
                    scale=self._per_token(microbatch, microbatch.scales),
                )
                loss, part = policy_objective(batch, self._objective)
                self._engine.backward(loss)
            statistics = statistics.merge(part)
        return statistics

    def _optimize(self, rate: float, place: int, minibatches: int, applied: int) -> float:
        try:
            norm = self._engine.step(rate)
        except LearnerError as error:
            if applied == 0:
                raise
            raise LearnerError(
                f"minibatch {place + 1}: {error}. "
                f"But {applied} of the {minibatches} minibatches of this batch are already applied, "
                f"though the version is still {self.version}: resume from the last checkpoint"
            ) from error
        self._count(adam_steps=1)
        return norm

    @torch.no_grad()
    def _old_logprobs(self, minibatch: Minibatch) -> list[Tensor]:
        result = []
        for microbatch in self._share(minibatch.ranks):
            with self._delta(microbatch):
                result.append(self._forward(microbatch)[0])
        return result

    @torch.no_grad()
    def _reference_logprobs(self, microbatch: Microbatch) -> Tensor | None:
        if self._reference is None:
            return None
        with self._reference.injector.use(self._stacked(microbatch)):
            logp: Tensor = self._reference.model(*self._inputs(microbatch))[0]
        return logp

    def _forward(self, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
        return self._engine.forward(self._inputs(microbatch))

    @contextmanager
    def _delta(self, microbatch: Microbatch) -> Iterator[None]:
        with self._injector.use(self._stacked(microbatch)):
            yield

    def _stacked(self, microbatch: Microbatch) -> StackedWeights | None:
        if all(weights is None or weights.revision == 0 for weights in microbatch.weights):
            return None  # Delta = 0 costs nothing
        return stack(microbatch.weights, self._basis, self._model.base.dtype, self._engine.device)

    def _inputs(self, microbatch: Microbatch) -> Inputs:
        sampled_at = microbatch.temperature
        heat = self._tensor(sampled_at) if isinstance(sampled_at, np.ndarray) else sampled_at
        token_ids = self._tensor(microbatch.token_ids)
        below = self._frozen.states(microbatch, token_ids)
        return Inputs(token_ids, self._tensor(microbatch.loss_mask), heat, below, self._frozen.count)

    def _per_token(self, microbatch: Microbatch, per_row: NDArray[np.float32]) -> Tensor:
        return self._tensor(per_row[microbatch.row_of_token])

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._engine.device)

    def _share(self, ranks: list[list[Microbatch]]) -> list[Microbatch]:
        return ranks[self._engine.rank]

    # --- counters ----------------------------------------------------------------------------------------

    def _begin_rl(self) -> None:
        """After a warm start: fresh moments, and the present weights as the KL term's reference."""
        if self._reference is not None and self._counters.rl_steps == 0 and self._counters.version > 0:
            trained = self._model.by_name(trainable_only=True)
            self._reference.model.set_by_name(dict(self._engine.full_tensors(trained, copy=False)))
        if self._counters.warm:
            self._reset_optimizer(warm=False)

    def _reset_optimizer(self, warm: bool) -> None:
        self._engine.reset_optimizer()
        self._counters = replace(self._counters, adam_steps=0, warm=warm)

    def _count(self, version: int = 0, rl_steps: int = 0, adam_steps: int = 0) -> None:
        old = self._counters
        self._counters = replace(
            old,
            version=old.version + version,
            rl_steps=old.rl_steps + rl_steps,
            adam_steps=old.adam_steps + adam_steps,
        )

    def _learning_rate(self) -> float:
        """Return the rate of this step: linear warm-up over ``warmup_steps`` RL steps, then constant."""
        rate, warmup = self._config.learning_rate, self._config.warmup_steps
        return rate if warmup == 0 else rate * min(1.0, (self._counters.rl_steps + 1) / warmup)
