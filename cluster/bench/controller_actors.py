"""Virtual rollout workers and a virtual learner rank, which only wait. Values and sizes are real.

One async actor stands for many rollout workers, because each process costs 60 MB and half a second to start.
What it returns is pickled, stored and sent anew for each group, as from a real worker.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from actors.episodes.group_summary import GroupSummary
from actors.types import (
    ActionSpan,
    Answer,
    FastWeights,
    Flashcard,
    Outcome,
    PolicyVersion,
    Segment,
    Task,
    Timings,
    Trajectory,
    TrajectoryGroup,
    WriteRecord,
)
from actors.worker import PublishedWeights, WorkerReport, WorkerSpec
from configs.schema import FastWeightsConfig
from learner.types import StepReport

if TYPE_CHECKING:
    from actors.episodes.rollout import RolloutRequest
    from learner.worker import LearnerSpec

# An episode of the quickstart: two told sessions and the questions.
SEGMENTS, SEGMENT_TOKENS, SAMPLED_TOKENS = 3, 185, 40


@dataclass(frozen=True, slots=True, eq=False)
class EpisodeParts:
    """The tokens and fast weights of one episode."""

    segments: tuple[Segment, ...]
    revisions: tuple[FastWeights, ...]

    @staticmethod
    def draw(model_path: Path, shape: FastWeightsConfig, seed: int) -> EpisodeParts:
        """Draw random parts. B has the shapes of this model's: float32 [d_out, rank]."""
        config = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
        rows = {
            "gate_proj": config["intermediate_size"],
            "up_proj": config["intermediate_size"],
            "down_proj": config["hidden_size"],
        }
        layers = range(config["num_hidden_layers"] - shape.last_layers, config["num_hidden_layers"])
        sizes = {
            f"model.layers.{layer}.mlp.{name}": rows[name] for layer in layers for name in shape.projections
        }
        draw = np.random.default_rng(seed)

        def revision(number: int) -> FastWeights:
            b = {
                name: draw.standard_normal((size, shape.rank), dtype=np.float32)
                for name, size in sizes.items()
            }
            return FastWeights("virtual", number, b)

        def segment(number: int) -> Segment:
            mask = np.arange(SEGMENT_TOKENS) >= SEGMENT_TOKENS - SAMPLED_TOKENS
            return Segment(
                token_ids=draw.integers(0, config["vocab_size"], SEGMENT_TOKENS, dtype=np.int32),
                action_mask=mask,
                logprobs=-draw.random(SEGMENT_TOKENS, dtype=np.float32) * mask,
                policy_version=0,
                revision=number,
                spans=(
                    ActionSpan(
                        SEGMENT_TOKENS - SAMPLED_TOKENS,
                        SEGMENT_TOKENS,
                        "act" if number == SEGMENTS - 1 else "extract",
                    ),
                ),
            )

        return EpisodeParts(
            tuple(segment(number) for number in range(SEGMENTS)),
            tuple(revision(number) for number in range(1, SEGMENTS)),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """The parts of every virtual group. Siblings share no array: a shared array would travel only once."""

    siblings: tuple[EpisodeParts, ...]

    def group(self, task: Task, version: PolicyVersion, worker: str) -> TrajectoryGroup:
        """A group with a different reward for each sibling."""
        trajectories = tuple(
            _trajectory(task, version, number, parts) for number, parts in enumerate(self.siblings)
        )
        return TrajectoryGroup(task, version, trajectories, (), worker)


def _trajectory(task: Task, version: PolicyVersion, number: int, parts: EpisodeParts) -> Trajectory:
    cards = tuple(
        Flashcard(f"Where does the person number {person} of {task.id}.{number} live?", "in Lisbon")
        for person in range(2)
    )
    extraction = " ".join(f"Q: {card.question} A: {card.answer}" for card in cards)
    writes = tuple(
        WriteRecord(weights.revision, (), cards, extraction, 0, 40, 8, 2.0, 1.0, 3, 0.5, "accepted", "")
        for weights in parts.revisions
    )
    reward = 1 / (1 + number)
    scores = {"f1": reward, "em": reward}
    answers = tuple(
        Answer(f"Where does number {person} live?", ("Lisbon",), "Lisbon", "home", scores)
        for person in range(2)
    )
    return Trajectory(
        task=task,
        episode_id=f"{task.id}.{number}",
        policy_version=version,
        segments=tuple(replace(segment, policy_version=version) for segment in parts.segments),
        revisions=parts.revisions,
        writes=writes,
        memory_events={},
        outcome=Outcome(reward, scores, answers),
        stop_reason="done",
        timings=Timings(**{field.name: 1.0 for field in fields(Timings)}),
    )


@dataclass(slots=True, eq=False)
class _Worker:
    """One virtual worker. ``first_s`` shortens its first group, so that the workers do not march in step."""

    spec: WorkerSpec
    first_s: float
    version: PolicyVersion
    idle: asyncio.Event
    running: int = 0
    groups: int = 0
    refreshes: int = 0


class _VirtualWorkers:
    """The methods of actors.worker.RolloutActor with the worker's number in front.

    A group takes ``group_s`` and no computing.
    """

    def __init__(self, template: Template, group_s: float) -> None:
        self._template, self._group_s = template, group_s
        self._workers: dict[int, _Worker] = {}

    async def start(self, number: int, first_s: float, spec: WorkerSpec) -> str:
        idle = asyncio.Event()
        idle.set()
        self._workers[number] = _Worker(spec, first_s, spec.version, idle)
        return spec.name

    @ray.method(num_returns=2)
    async def group(self, number: int, request: RolloutRequest) -> tuple[GroupSummary, TrajectoryGroup]:
        worker = self._workers[number]
        worker.running += 1
        worker.idle.clear()
        seconds, worker.first_s = worker.first_s or self._group_s, 0.0
        version = worker.version
        await asyncio.sleep(seconds)
        worker.running -= 1
        worker.groups += 1
        if worker.running == 0:
            worker.idle.set()
        group = self._template.group(request.task, version, worker.spec.name)
        return GroupSummary.of(group), group

    async def report(self, number: int) -> WorkerReport:
        return self._report(self._workers[number])

    async def drain(self, number: int, drain_s: float) -> None:
        await asyncio.wait_for(self._workers[number].idle.wait(), drain_s)

    async def refresh(self, number: int, weights: PublishedWeights, drain_s: float) -> WorkerReport:
        worker = self._workers[number]
        worker.version = weights.version
        worker.refreshes += 1
        return self._report(worker)

    def _report(self, worker: _Worker) -> WorkerReport:
        from actors.engine.policy import EngineStats
        from actors.engine.step_loop import PHASES

        nothing: dict[str, Any] = dict.fromkeys((field.name for field in fields(EngineStats)), 0)
        stats = nothing | {"seconds": dict.fromkeys(PHASES, 0.0)}
        counts = dict.fromkeys((field.name for field in fields(WorkerReport)), 0.0) | {
            "groups": worker.groups,
            "refreshes": worker.refreshes,
        }
        values: dict[str, Any] = counts | {
            "name": worker.spec.name,
            "version": worker.version,
            "engine": EngineStats(**stats),
        }
        return WorkerReport(**values)


VirtualWorkers = ray.remote(num_cpus=0, max_restarts=0)(_VirtualWorkers)


@dataclass(frozen=True, slots=True)
class _Method:
    """A method of one virtual worker, called as a method of a Ray actor."""

    method: Any
    arguments: tuple[Any, ...]

    def remote(self, *arguments: Any) -> Any:
        return self.method.remote(*self.arguments, *arguments)


class VirtualHandle:
    """One virtual worker, with the methods of an actor handle that RemoteWorker calls."""

    def __init__(self, actor: Any, number: int, first_s: float) -> None:
        self.start = _Method(actor.start, (number, first_s))
        self.group = _Method(actor.group, (number,))
        self.report = _Method(actor.report, (number,))
        self.drain = _Method(actor.drain, (number,))
        self.refresh = _Method(actor.refresh, (number,))


@ray.remote(num_cpus=0, max_restarts=0)
class VirtualRank:
    """The methods of learner.worker.LearnerActor that the loop uses.

    A step reads every group and learns nothing.
    """

    def __init__(self, spec: LearnerSpec, rank: int) -> None:
        self._version: PolicyVersion = 0

    @ray.method
    def address(self) -> tuple[str, int]:
        return "", 0

    @ray.method
    def start(self, host: str, port: int) -> PolicyVersion:
        return self._version

    @ray.method
    def hold(self, *groups: TrajectoryGroup) -> None:
        """Nothing to do: Ray has fetched the groups before the call."""

    @ray.method
    def step(self, *groups: TrajectoryGroup) -> StepReport:
        self._version += 1
        values = {field.name: 0 for field in fields(StepReport)}
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        tokens = sum(len(segment.token_ids) for trajectory in trajectories for segment in trajectory.segments)
        return StepReport(
            **(values | {"version": self._version, "tokens": tokens, "trajectories": len(trajectories)})
        )

    @ray.method
    def weights(self, trainable_only: bool) -> dict[str, Any]:
        return {}
