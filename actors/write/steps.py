"""The steps of a write: which rows each step takes, and when an episode has ended.

    a step of an episode:  a minibatch of its examples   mean cross-entropy of the answer tokens
                           some preserved replies        + write.preserve.weight x KL(without Delta || now)

Minibatches are drawn anew at every epoch, in an order of the episode's seed. Preserved replies come in turn,
from a place of that seed: a write has few steps, and all of the pool must come in some writes.
An episode ends after its epochs, when it diverges, or when all it learns is known (``write.known_loss``).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.fast_weights.delta import StackedWeights
from actors.fast_weights.sensitivity import Sensitivity
from actors.types import WriteExample, WriteRequest
from actors.write.lower_layers import Row
from actors.write.optimizers import make_optimizer
from actors.write.upper_layers import Chunk, UpperLayers
from configs.schema import WriteConfig

Selection = Sequence[Sequence[int]]  # numbers of rows, a list for each episode
OnStep = Callable[[StackedWeights], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one episode learns: numbers of rows. ``seed`` orders its minibatches.

    ``preserved``: as many for each step, in the order of steps (``preserved_in_turn``).
    """

    taught: Sequence[int]
    preserved: Sequence[int]
    seed: int


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one step of one episode."""

    taught: Sequence[int]
    preserved: Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class StepScores:
    """What a step measured before it moved anything. kl: mean nats a token over the preserved replies."""

    logprobs: list[Tensor]
    kl: float

    @property
    def loss(self) -> float:
        return mean_loss(self.logprobs)


@dataclass(frozen=True, eq=False)
class Trained:
    """What the steps did, by episode.

    before: log-probs of each example under the request's weights. final: the new fast weights. failures: why
    the steps of that episode were stopped, "" if they were not; then its ``final`` is its start.
    kls: of the replies that the last step preserved.
    """

    before: list[list[Tensor]]
    final: StackedWeights
    steps: list[int]
    failures: list[str]
    kls: list[float]


class Rows:
    """The rows of one write, which all begin with the same ``prefix`` tokens."""

    def __init__(self, layers: UpperLayers, prefix: int, rows: Sequence[Row], preserve_weight: float) -> None:
        self._layers, self._prefix, self._rows, self._weight = layers, prefix, rows, preserve_weight
        self._selection: Selection = ()
        self._chunks: tuple[Chunk, ...] = ()

    def score(self, steps: Sequence[Step], weights: StackedWeights) -> list[StepScores]:
        """The scores of each episode's step. Adds the gradient of its loss to ``weights``."""
        selection = [(*step.taught, *step.preserved) for step in steps]
        loss_weights = [weight for step in steps for weight in self._loss_weights(step)]
        scores = by_episode(self._layers.score(self.prepared(selection), weights, loss_weights), selection)
        return [
            _step_scores(of_episode[: len(step.taught)], of_episode[len(step.taught) :])
            for step, of_episode in zip(steps, scores, strict=True)
        ]

    def measure(self, selection: Selection, weights: StackedWeights) -> list[list[Tensor]]:
        """The log-probs alone, of taught rows."""
        (flat,) = self._layers.measure((self.prepared(selection), weights))
        return by_episode(flat, selection)

    def prepared(self, selection: Selection) -> tuple[Chunk, ...]:
        """What the selected rows need. Steps without preserved replies often select the same rows again."""
        if selection != self._selection:
            rows = [self._rows[i] for of_episode in selection for i in of_episode]
            self._selection, self._chunks = selection, self._layers.prepare(self._prefix, rows)
        return self._chunks

    def _loss_weights(self, step: Step) -> list[float]:
        """Of cards the mean over tokens; of preserved replies the mean over replies of that of each."""
        tokens = sum(len(self._rows[i].targets) for i in step.taught)
        replies = len(step.preserved)
        kept = [self._weight / (replies * len(self._rows[i].targets)) for i in step.preserved]
        return [1 / tokens] * len(step.taught) + kept


def _step_scores(logprobs: list[Tensor], kls: list[Tensor]) -> StepScores:
    return StepScores(logprobs, sum(float(row.mean()) for row in kls) / max(1, len(kls)))


def by_episode(flat: Iterable[Tensor], selection: Selection) -> list[list[Tensor]]:
    """Part the rows' values, a list for each episode of ``selection``."""
    values = iter(flat)
    return [[next(values) for _ in of_episode] for of_episode in selection]


def mean_loss(logprobs: Sequence[Tensor]) -> float:
    """Mean nats per answer token."""
    return -float(torch.cat(list(logprobs)).double().mean())


def minibatches(taught: Sequence[int], size: int, seed: int, epoch: int) -> list[Sequence[int]]:
    """The minibatches of one epoch, drawn by the seed. A single one keeps the order of ``taught``."""
    if len(taught) > size:
        taught = random.Random(f"{seed}/{epoch}").sample(taught, len(taught))
    return [taught[start : start + size] for start in range(0, len(taught), size)]


def step_count(examples: int, config: WriteConfig) -> int:
    """How many steps a write of so many examples takes, unless it ends early."""
    return config.epochs * math.ceil(examples / config.batch_size)


def preserved_in_turn(request: WriteRequest, config: WriteConfig) -> list[WriteExample]:
    """The replies that the steps of a write preserve, step by step, as many each.

    A step begins where the one before it ended. The first begins at a place of the request's seed that is a
    multiple of a step's size: the order of the replies may say what belongs into one step.
    """
    count, steps = len(request.preserved), step_count(len(request.examples), config)
    if not count:
        return []
    size = min(config.preserve.per_step, count)
    start = request.seed % (count // size) * size
    return [request.preserved[(start + i) % count] for i in range(steps * size)]


def preserved_by(plan: Plan, steps: int, config: WriteConfig) -> int:
    """How many different replies the first ``steps`` steps of a plan preserve."""
    size = len(plan.preserved) // step_count(len(plan.taught), config)
    return len({*plan.preserved[: steps * size]})


class _Schedule:
    """The steps of one episode, one after the other."""

    def __init__(self, plan: Plan, config: WriteConfig) -> None:
        self._plan, self._config = plan, config
        self.steps = step_count(len(plan.taught), config)
        self.batches = self.steps // config.epochs

    def step(self, number: int) -> Step:
        plan, config = self._plan, self._config
        epoch, place = divmod(number, self.batches)
        batch = minibatches(plan.taught, config.batch_size, plan.seed, epoch)[place]
        size = len(plan.preserved) // self.steps
        return Step(batch, plan.preserved[number * size : (number + 1) * size])


def train(
    rows: Rows,
    plans: Sequence[Plan],
    start: StackedWeights,
    sensitivities: Sequence[Sensitivity],
    config: WriteConfig,
    on_step: OnStep,
) -> Trained:
    """Step all episodes together.

    An episode that has ended or diverged is left out of the next steps. ``on_step`` is shown the fast weights
    of all episodes after each step: it must copy what it keeps.
    """
    episodes = range(len(plans))
    trained, final = start.map(torch.clone), start.map(torch.clone)
    schedules = [_Schedule(plan, config) for plan in plans]
    optimizer = make_optimizer(trained, sensitivities, config)
    steps, failures, known_steps = [0] * len(plans), [""] * len(plans), [0] * len(plans)
    kls = [0.0] * len(plans)
    # One minibatch holds all examples of the other episodes: their first step is the measurement.
    several = [e for e in episodes if schedules[e].batches > 1]
    measured = rows.measure([plans[e].taught for e in several], start) if several else []
    before = dict(zip(several, measured, strict=True))
    active = list(episodes)
    for number in range(max(schedule.steps for schedule in schedules)):
        optimizer.zero_grad()
        scores = dict(
            zip(active, rows.score([schedules[e].step(number) for e in active], trained), strict=True)
        )
        for e, score in scores.items():
            if number == 0:
                before.setdefault(e, score.logprobs)
            is_known = score.loss <= config.known_loss and _harm(score, config) <= config.known_loss
            known_steps[e] = known_steps[e] + 1 if is_known else 0
            kls[e] = score.kl
        # Where a whole epoch is known, this step would move nothing that is worth it.
        ended = [e for e in active if config.known_loss > 0 and known_steps[e] >= schedules[e].batches]
        _keep(final, trained, ended)
        active = [e for e in active if e not in ended]
        if not active:
            break
        aims = [_aim(scores[e], config) if e in active else 0.0 for e in episodes]
        optimizer.step(torch.tensor(aims, device=trained.matrices[0].device))
        on_step(trained)
        for e in active:
            steps[e] += 1
            if not math.isfinite(loss := scores[e].loss):
                failures[e] = f"the loss became {loss} at step {steps[e]} of {schedules[e].steps}"
        # Taken now: while companions go on, Adam's momentum would still move an episode without a gradient.
        _keep(final, trained, [e for e in active if steps[e] == schedules[e].steps and not failures[e]])
        active = [e for e in active if steps[e] < schedules[e].steps and not failures[e]]
        if not active:
            break
    return Trained([before[e] for e in episodes], final, steps, failures, kls)


def _harm(score: StepScores, config: WriteConfig) -> float:
    return config.preserve.weight * score.kl


def _aim(score: StepScores, config: WriteConfig) -> float:
    """By how much a step should lower the loss: nothing is learnt harder than ``known_loss``."""
    if not math.isfinite(score.loss):
        return score.loss
    return max(0.0, score.loss - config.known_loss) + _harm(score, config)


def _keep(final: StackedWeights, trained: StackedWeights, episodes: Sequence[int]) -> None:
    for result, matrix in zip(final.matrices, trained.matrices, strict=True):
        for e in episodes:
            result[e] = matrix.detach()[e]
