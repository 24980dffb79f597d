"""The learner: groups of trajectories in, a new policy version out. No Ray inside; one instance per rank.

    groups -> advantages -> rows -> microbatches of this rank
                for each minibatch:  for each microbatch:  forward under its Deltas -> objective -> backward
                                     one optimizer step
    -> StepReport

Collective over ranks: every rank gets the same groups and takes its own share. Waits: ranks wait for each other inside torch.distributed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.fast_weights.delta import Basis, DeltaInjector, StackedWeights, stack
from actors.types import PolicyVersion, Segment, Trajectory, TrajectoryGroup
from configs.schema import LearnerConfig, ObjectiveConfig
from learner import checkpoint
from learner.ablation import as_objective_sees
from learner.advantage import estimator, score
from learner.batch import RowSet, pack, pad, rows_of, split, supervised_rows
from learner.engine import TrainingEngine
from learner.model import PolicyModel, load_model, load_reference
from learner.objective import TokenBatch, TokenStatistics, policy_objective
from learner.types import LearnerError, Microbatch, Row, ScoredTrajectory, StepReport, WarmStartReport
from learner.weights import full_tensors, named_parameters


@dataclass(frozen=True, slots=True, eq=False)
class Minibatch:
    """What one optimizer step consumes: the rows of all ranks, and the microbatches of each rank."""

    rows: RowSet
    ranks: list[list[Microbatch]]


@dataclass(frozen=True, slots=True)
class _Reference:
    model: PolicyModel
    injector: DeltaInjector


class Learner:
    """theta, its optimizer and its version. ``temperature`` is that of the sampled log-probs (``sampling.temperature``).

    With one minibatch the old log-probs of the PPO ratio are the current ones, detached (one step per batch, ratio 1); with more, they come from
    a pass without gradient at the start of the step. The KL reference is ``model_path``, loaded a second time when ``kl_coefficient > 0``.
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
    ) -> None:
        self._config, self._objective, self._basis, self._estimate = (
            config,
            objective,
            basis,
            estimator(objective),
        )
        self._model_path, self._seed, self._temperature = model_path, seed, temperature
        self._model = load_model(model_path, config)
        self._injector = DeltaInjector(self._model.base, basis)
        self._engine = TrainingEngine(self._model, config, rank, world_size)
        self._reference: _Reference | None = None
        if objective.kl_coefficient > 0:
            reference = load_reference(model_path, config).to(self._engine.device)
            self._reference = _Reference(reference, DeltaInjector(reference.base, basis))
        self._counters = checkpoint.Counters(version=0, rl_steps=0, adam_steps=0, warm=False)

    @property
    def version(self) -> PolicyVersion:
        """Steps behind the weights: each ``step`` (whatever its minibatches) and each ``warm_start_step`` adds one."""
        return self._counters.version

    def step(self, groups: Sequence[TrajectoryGroup]) -> StepReport:
        """One RL step on ``groups``. Raises ValueError for a reward that is not finite, and LearnerError, weights and version as before.

        Except: when minibatch k > 1 has a gradient that is not finite, the k - 1 before it stay applied under the old version. The message says so:
        the weights are then no version's, and the run must resume from a checkpoint (undoing would need a second copy of theta and Adam).
        """
        started = time.perf_counter()
        scored_groups = [score(group, self._estimate) for group in groups]
        scored = [one for group in scored_groups for one in group]
        if not any(segment.action_mask.any() for one in scored for segment in one.trajectory.segments):
            raise LearnerError(
                f"nothing to learn from: {len(groups)} groups hold {len(scored)} finished episodes and no sampled token"
            )
        minibatches = self._plan(scored)
        self._begin_rl()
        rate = self._learning_rate()
        old = [self._old_logprobs(minibatch) if len(minibatches) > 1 else None for minibatch in minibatches]
        norms, statistics = [], TokenStatistics.none()
        for place, (minibatch, old_logprobs) in enumerate(zip(minibatches, old, strict=True)):
            statistics = statistics.merge(self._accumulate(minibatch, old_logprobs))
            norms.append(self._optimize(rate, place, len(minibatches)))
        self._count(version=1, rl_steps=1)
        statistics = TokenStatistics.of(
            self._engine.sums(statistics.sums), self._engine.maxima(statistics.maxima)
        )
        return self._report(
            scored_groups,
            minibatches,
            statistics,
            sum(norms) / len(norms),
            rate,
            time.perf_counter() - started,
        )

    def warm_start_step(self, segments: Sequence[Segment], learning_rate: float) -> WarmStartReport:
        """One supervised step: mean cross-entropy on the masked tokens, Delta = 0, temperature 1. Log-probs in the segments are not looked at.

        The stage has an optimizer of its own: the first RL step after it starts with fresh moments, as supervised gradients are orders of
        magnitude larger and would freeze Adam's second moment for a long time.
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
        for microbatch in self._share(
            pack(rows, self._config.microbatch_tokens, self._engine.world_size, 1.0)
        ):
            with self._delta(microbatch):
                logp, _ = self._forward(microbatch)
                term = -(self._per_token(microbatch, microbatch.scales) * logp).sum()
                self._engine.backward(term)
            loss += float(term.detach())
        norm = self._engine.step(learning_rate)
        self._count(version=1, adam_steps=1)
        tokens = sum(int(row.segment.action_mask.sum()) for row in rows)
        return WarmStartReport(
            self.version, self._engine.sums((loss,))[0], norm, tokens, time.perf_counter() - started
        )

    def logprobs(self, trajectory: Trajectory) -> tuple[NDArray[np.float32], ...]:
        """What the learner makes of each segment under its own revision: float32 [T], laid out like ``Segment.logprobs``. For checks."""
        result = []
        for segment in trajectory.segments:
            microbatch = pad([Row(segment, trajectory.weights_of(segment), 0.0, 0.0)], self._temperature)
            values = np.zeros(len(segment.token_ids), dtype=np.float32)
            with torch.no_grad(), self._delta(microbatch):
                values[segment.action_mask] = self._forward(microbatch)[0].cpu().numpy()
            result.append(values)
        return tuple(result)

    def weights(self, trainable_only: bool, copy: bool = True) -> dict[str, Tensor]:
        """Full weights by name, on the CPU, in ``config.dtype``; without ``copy`` maybe the learner's own memory, which its next step overwrites."""
        return dict(full_tensors(self._engine, named_parameters(self._model, trainable_only), copy))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Everything, by rename; see ``learner.checkpoint``."""
        checkpoint.save(folder, self._engine, self._model, self._counters, self._model_path)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Go on from what ``save`` wrote. Raises LearnerError."""
        self._counters = checkpoint.load(folder, self._engine, self._model)

    # --- one step --------------------------------------------------------------------------------------------------------------------------------

    def _plan(self, scored: Sequence[ScoredTrajectory]) -> list[Minibatch]:
        objective, config, plan = self._objective, self._config, list[Minibatch]()
        for part in split(scored, objective.minibatches, (self._seed, self.version)):
            rows = rows_of(
                as_objective_sees(part, objective),
                objective.aggregate,
                skip_zero_advantage=objective.kl_coefficient == 0,
            )
            plan.append(
                Minibatch(
                    rows,
                    pack(rows.rows, config.microbatch_tokens, self._engine.world_size, self._temperature),
                )
            )
        return plan

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
                    advantage=self._per_token(microbatch, microbatch.advantages),
                    scale=self._per_token(microbatch, microbatch.scales),
                )
                loss, part = policy_objective(batch, self._objective)
                self._engine.backward(loss)
            statistics = statistics.merge(part)
        return statistics

    def _optimize(self, rate: float, place: int, minibatches: int) -> float:
        try:
            norm = self._engine.step(rate)
        except LearnerError as error:
            if place == 0:
                raise
            applied = f"minibatches 1 to {place} of {minibatches} of this batch are already applied, though the version is still {self.version}"
            raise LearnerError(
                f"minibatch {place + 1}: {error}. But {applied}: resume from the last checkpoint"
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
        return self._engine.forward(*self._inputs(microbatch))

    @contextmanager
    def _delta(self, microbatch: Microbatch) -> Iterator[None]:
        with self._injector.use(self._stacked(microbatch)):
            yield

    def _stacked(self, microbatch: Microbatch) -> StackedWeights | None:
        if all(one is None or one.revision == 0 for one in microbatch.weights):
            return None
        return stack(microbatch.weights, self._basis, self._model.base.dtype, self._engine.device)

    def _inputs(self, microbatch: Microbatch) -> tuple[Tensor, Tensor, float]:
        return self._tensor(microbatch.token_ids), self._tensor(microbatch.loss_mask), microbatch.temperature

    def _per_token(self, microbatch: Microbatch, per_row: NDArray[np.float32]) -> Tensor:
        return self._tensor(per_row[microbatch.row_of_token])

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._engine.device)

    def _share(self, ranks: list[list[Microbatch]]) -> list[Microbatch]:
        return ranks[self._engine.rank]

    # --- counters and report ---------------------------------------------------------------------------------------------------------------------

    def _begin_rl(self) -> None:
        if self._counters.warm:
            self._reset_optimizer(warm=False)

    def _reset_optimizer(self, warm: bool) -> None:
        self._engine.reset_optimizer()
        self._counters = checkpoint.Counters(
            self._counters.version, self._counters.rl_steps, adam_steps=0, warm=warm
        )

    def _count(self, version: int = 0, rl_steps: int = 0, adam_steps: int = 0) -> None:
        old = self._counters
        self._counters = checkpoint.Counters(
            old.version + version, old.rl_steps + rl_steps, old.adam_steps + adam_steps, old.warm
        )

    def _learning_rate(self) -> float:
        """Linear warm-up over ``warmup_steps`` RL steps, constant afterwards."""
        if self._config.warmup_steps == 0:
            return self._config.learning_rate
        return self._config.learning_rate * min(
            1.0, (self._counters.rl_steps + 1) / self._config.warmup_steps
        )

    def _report(
        self,
        scored_groups: Sequence[Sequence[ScoredTrajectory]],
        minibatches: Sequence[Minibatch],
        statistics: TokenStatistics,
        grad_norm: float,
        rate: float,
        seconds: float,
    ) -> StepReport:
        rows = [row for minibatch in minibatches for row in minibatch.rows.rows]
        microbatches = [one for minibatch in minibatches for rank in minibatch.ranks for one in rank]
        used = sum(any(one.advantage != 0 for one in group) for group in scored_groups)
        advantages = [abs(one.advantage) for group in scored_groups for one in group]
        tokens, places = (
            sum(len(row.segment.token_ids) for row in rows),
            sum(one.token_ids.size for one in microbatches),
        )
        policy_loss, kl = statistics.policy_loss / len(minibatches), statistics.kl / len(minibatches)
        return StepReport(
            version=self.version,
            loss=policy_loss + self._objective.kl_coefficient * kl,
            policy_loss=policy_loss,
            kl=kl,
            ratio_mean=statistics.mean(statistics.ratio),
            ratio_min=statistics.ratio_min if statistics.tokens else math.nan,
            ratio_max=statistics.ratio_max if statistics.tokens else math.nan,
            clip_fraction=statistics.mean(statistics.clipped),
            truncated_fraction=statistics.mean(statistics.truncated),
            entropy=statistics.mean(statistics.entropy),
            engine_logprob_diff_mean=statistics.mean(statistics.difference),
            engine_logprob_diff_max=statistics.difference_max if statistics.tokens else math.nan,
            grad_norm=grad_norm,
            learning_rate=rate,
            tokens=tokens,
            action_tokens=sum(int(row.segment.action_mask.sum()) for row in rows),
            extract_tokens=sum(minibatch.rows.extract_tokens for minibatch in minibatches),
            padding_fraction=1 - tokens / places,
            microbatches=len(microbatches),
            segments_without_actions=sum(
                minibatch.rows.segments_without_actions for minibatch in minibatches
            ),
            trajectories=len(advantages),
            trajectories_skipped=sum(minibatch.rows.trajectories_skipped for minibatch in minibatches),
            groups_used=used,
            groups_without_signal=len(scored_groups) - used,
            mean_advantage_abs=sum(advantages) / len(advantages),
            seconds=seconds,
        )
