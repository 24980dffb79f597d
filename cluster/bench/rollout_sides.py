"""The two processes of the rollout benchmark: Engram's rollout side, and vLLM alone replaying its requests.

Engram's side is real: engine, writer, environment, groups of siblings, receipts. Scripted is what the base model cannot do: it samples as many tokens
as the gold flashcards, or the gold answer, have (no stop token ends it), and the gold ones are handed back, so that extractions lead to real writes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actors.episodes.demonstration import DemonstratingEnvironment
from actors.protocols import FastWeightWriter, Policy
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import render_flashcards
from actors.types import (
    AdapterKey,
    FastWeights,
    Generation,
    PolicyVersion,
    Probe,
    Sampling,
    SpanKind,
    Task,
    TrajectoryGroup,
    WriteRecord,
    WriteRequest,
    WriteResult,
)
from cluster.bench.harness import timed
from cluster.bench.machine import matmul_rate
from cluster.bench.values import BenchError, Timing
from configs.schema import RunConfig

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

    from actors.engine.policy import EngineStats
    from actors.episodes.rollout import Rollout

VERSION: PolicyVersion = 0


@dataclass(frozen=True, slots=True)
class Setup:
    """What both sides are built from. ``rollout.threads`` are the engine's threads on either side."""

    config: RunConfig
    model_path: Path
    basis_path: Path
    tasks: int
    siblings: int


@dataclass(frozen=True, slots=True)
class Asked:
    """One request to the engine. ``cache`` names what its keys and values depend on besides the tokens: only requests with equal names share them."""

    kind: SpanKind
    prompt_ids: tuple[int, ...]
    generated: int
    seed: int
    cache: str


@dataclass(frozen=True, slots=True)
class Round:
    """All episodes of a round, played at once. ``phases``: the step thread's seconds; ``environment_s``: the episodes' own, summed."""

    timing: Timing
    episodes: tuple[tuple[Asked, ...], ...]
    phases: Mapping[str, float]
    environment_s: float
    steps: int
    writes: tuple[WriteRecord, ...]


class EngramSide:
    """Held by a child process."""

    def __init__(self, setup: Setup) -> None:
        from transformers import AutoTokenizer

        from actors.engine.policy import VLLMPolicy
        from actors.environments.build import build_environment
        from actors.episodes.rollout import Rollout
        from actors.fast_weights.basis import load_basis
        from actors.memory.build import surroundings
        from cluster.train.warm_start import can_demonstrate

        self._setup, config = setup, setup.config
        torch.set_num_threads(config.rollout.threads)
        chat = ChatFormat(AutoTokenizer.from_pretrained(setup.model_path))
        environment = build_environment(config.environment, config.embedder)
        assert can_demonstrate(environment)
        basis = load_basis(setup.basis_path)
        stop: tuple[int, ...] = ()  # every request samples the number of tokens that it is given
        self._engine = VLLMPolicy(
            setup.model_path,
            config.model,
            config.engine,
            basis,
            stop,
            VERSION,
            config.rollout.threads,
            config.seed,
        )
        self._policy = Scripted(self._engine, chat, environment, config.memory.question_blind)
        self._basis = basis
        around = surroundings(
            config.engine.max_model_tokens, config.sampling.max_answer_tokens, config.embedder
        )
        self._make_rollout: Callable[[FastWeightWriter], Rollout] = lambda writer: Rollout(
            self._policy,
            writer,
            environment,
            chat,
            config.write,
            config.rollout,
            config.engine.slots,
            around,
            basis.id,
            "bench",
        )
        self._tasks = list(_first(environment, config.seed, setup.tasks))
        self._loop = asyncio.new_event_loop()  # a Rollout lives on one
        self._rounds = 0

    def play(self) -> Round:
        """One round on an empty prefix cache and with a new writer, which remembers no flashcard of an earlier round.

        Raises BenchError when an episode failed or a write was rolled back.
        """
        self._rounds += 1
        self._writer = Recorder(self._engine.writer(self._setup.config.write))
        self._rollout = self._make_rollout(self._writer)
        self._engine._loop.call(lambda engine: engine.reset_prefix_cache(), "other").result()
        before, groups = self._engine.stats(), list[TrajectoryGroup]()
        timing = timed(lambda: groups.extend(self._loop.run_until_complete(self._play())))
        after, trajectories = (
            self._engine.stats(),
            [trajectory for group in groups for trajectory in group.trajectories],
        )
        for failed in (failed for group in groups for failed in group.failed):
            raise BenchError(f"episode {failed.episode_id} failed: {failed.message}")
        writes = tuple(record for trajectory in trajectories for record in trajectory.writes)
        for record in writes:
            if record.outcome == "rolled_back":
                raise BenchError(f"a write of the benchmark was rolled back: {record.reason}")
        return Round(
            timing,
            self._policy.take_asked(),
            _passed(before, after),
            sum(trajectory.timings.environment for trajectory in trajectories),
            after.steps - before.steps,
            writes,
        )

    def write_floor(self) -> tuple[float, float]:
        """FLOPs of the last round's writes if all were one batch, and the FLOP/s of a large matmul on these threads."""
        from torch.utils.flop_counter import FlopCounterMode

        from actors.write.writer import checkpoint_writer

        config, cpu = self._setup.config, torch.device("cpu")
        writer = checkpoint_writer(
            str(self._setup.model_path), self._basis, config.write, config.model.dtype, cpu
        )
        with FlopCounterMode(display=False) as counter:
            writer.write(self._writer.requests)
        where = torch.device("cuda") if torch.cuda.is_available() else cpu
        return float(counter.get_total_flops()), matmul_rate(
            1024, 576, 3072, getattr(torch, config.model.dtype), where
        )

    async def _play(self) -> list[TrajectoryGroup]:
        from actors.episodes.rollout import RolloutRequest

        config = self._setup.config
        requests = [
            RolloutRequest(
                task=task,
                group_id=f"round-{self._rounds}-task-{number}",
                group_size=self._setup.siblings,
                memory=config.memory,
                temperature=config.sampling.temperature,
                max_answer_tokens=config.sampling.max_answer_tokens,
                seed=number,
            )
            for number, task in enumerate(self._tasks)
        ]
        self._policy.tasks = {request.group_id: request.task for request in requests}
        return await asyncio.gather(*(self._rollout.group(request) for request in requests))


class Recorder:
    """FastWeightWriter: the engine's, and what it was asked."""

    def __init__(self, writer: FastWeightWriter) -> None:
        self._writer = writer
        self.requests: list[WriteRequest] = []

    def write(self, requests: Sequence[WriteRequest]) -> list[WriteResult]:
        self.requests.extend(requests)
        return self._writer.write(requests)


class Scripted:
    """Policy: the engine, whose samples are replaced by the gold flashcards and answers; and a record of what it was asked, by episode in order."""

    def __init__(
        self, policy: Policy, chat: ChatFormat, environment: DemonstratingEnvironment, question_blind: bool
    ) -> None:
        self.tasks: dict[str, Task] = {}  # by group id
        self._policy, self._chat, self._environment, self._question_blind = (
            policy,
            chat,
            environment,
            question_blind,
        )
        self._asked: dict[str, list[Asked]] = {}

    @property
    def version(self) -> PolicyVersion:
        return self._policy.version

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey
    ) -> Generation:
        asked = self._asked.setdefault(adapter.episode_id, [])
        task = self.tasks[adapter.episode_id.rpartition(".")[0]]
        if sampling.kind == "extract":
            cards = self._environment.demonstrate_flashcards(
                task, self._chat.decode(prompt_ids), self._question_blind
            )
            text = render_flashcards(cards)
        else:
            text = task.payload["questions"][sum(request.kind == "act" for request in asked)]["answer"]
        script = self._chat.reply(text)[: sampling.max_tokens]
        asked.append(Asked(sampling.kind, tuple(prompt_ids), len(script), sampling.seed, adapter.name))
        generation = await self._policy.generate(
            prompt_ids, replace(sampling, max_tokens=len(script)), adapter
        )
        return Generation(script, generation.logprobs, "stop")

    async def install(self, key: AdapterKey, weights: FastWeights, probe: Probe | None) -> None:
        await self._policy.install(key, weights, probe)

    async def release(self, keys: Sequence[AdapterKey]) -> None:
        await self._policy.release(keys)

    def take_asked(self) -> tuple[tuple[Asked, ...], ...]:
        """By episode; forgotten afterwards."""
        asked, self._asked = self._asked, {}
        return tuple(tuple(requests) for requests in asked.values())


class VLLMSide:
    """Held by a child process: vLLM without adapters and without writes, on the settings of Engram's engine."""

    def __init__(self, setup: Setup) -> None:
        from actors.engine.start import engine_arguments, prepare_environment, start_engine
        from actors.fast_weights.basis import load_basis

        config = setup.config
        prepare_environment(config.rollout.threads)
        arguments = engine_arguments(
            setup.model_path, config.model, config.engine, load_basis(setup.basis_path), config.seed
        )
        plain = replace(
            arguments,
            enable_lora=False,
            lora_target_modules=None,
            worker_extension_cls="",
            weight_transfer_config=None,
        )
        self._engine: LLMEngine = start_engine(plain, config.rollout.threads)
        self._temperature = config.sampling.temperature

    def play(self, episodes: Sequence[Sequence[Asked]]) -> tuple[Timing, int]:
        """Each episode's requests one after the other, all episodes at once; and the engine's steps.

        Raises BenchError when a request generates another number of tokens than was asked for.
        """
        self._engine.reset_prefix_cache()
        self._steps = 0
        return timed(lambda: self._replay(episodes)), self._steps

    def _replay(self, episodes: Sequence[Sequence[Asked]]) -> None:
        waiting = {str(number): deque(requests) for number, requests in enumerate(episodes)}
        running = {name: self._add(name, requests) for name, requests in waiting.items()}
        while self._engine.has_unfinished_requests():
            self._steps += 1
            for output in self._engine.step():
                name, count = output.request_id, len(output.outputs[0].token_ids)
                if count != running[name].generated:
                    raise BenchError(
                        f"vLLM generated {count} tokens where {running[name].generated} were asked for"
                    )
                if waiting[name]:
                    running[name] = self._add(name, waiting[name])

    def _add(self, name: str, requests: deque[Asked]) -> Asked:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        asked = requests.popleft()
        parameters = SamplingParams(
            temperature=self._temperature,
            max_tokens=asked.generated,
            seed=asked.seed,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request(
            name, tokens_input(list(asked.prompt_ids), cache_salt=asked.cache), parameters
        )
        return asked


def _first(environment: DemonstratingEnvironment, seed: int, count: int) -> Sequence[Task]:
    tasks = environment.tasks("train", seed, 0)
    return [next(tasks) for _ in range(count)]


def _passed(before: EngineStats, after: EngineStats) -> dict[str, float]:
    """Seconds by phase."""
    earlier: Mapping[Any, float] = before.seconds
    return {phase: seconds - earlier[phase] for phase, seconds in after.seconds.items()}
