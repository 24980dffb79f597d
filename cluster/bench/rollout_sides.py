"""The two processes of the rollout benchmark: Engram's rollout side, and vLLM that replays its requests.

Engram's engine, writer, environment, groups and receipts are real. The samples are scripted (scripted.py):
the engine samples as many tokens as the gold flashcards or the gold answer have, and these are handed back.
So extractions lead to real writes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from actors.episodes.demonstration import DemonstratingEnvironment
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import render_flashcards
from actors.types import (
    AdapterKey,
    Sampling,
    SpanKind,
    Task,
    TrajectoryGroup,
)
from cluster.bench.harness import timed
from cluster.bench.scripted import ScriptedSide, read_chat
from cluster.bench.values import BenchError, Timing
from configs.schema import RunConfig

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


@dataclass(frozen=True, slots=True)
class Setup:
    """What both sides are built from. ``rollout.threads`` are the engine's threads on either side."""

    config: RunConfig
    model_path: Path
    basis_path: Path
    tasks: int
    siblings: int


@dataclass(frozen=True, slots=True)
class Request:
    """One request to the engine. Two requests share cached keys and values only if ``cache`` is equal."""

    kind: SpanKind
    prompt_ids: tuple[int, ...]
    generated: int
    seed: int
    cache: str


Episodes = tuple[tuple[Request, ...], ...]
"""The requests of each episode, in order."""


@dataclass(frozen=True, slots=True)
class Round:
    """All episodes of a round, played at once.

    ``phases``: the step thread's seconds. ``environment_s``: the environments' own seconds, summed over
    episodes.
    """

    timing: Timing
    episodes: Episodes
    phases: Mapping[str, float]
    environment_s: float
    steps: int


class EngramSide:
    """Plays rounds. Held by a child process."""

    def __init__(self, setup: Setup) -> None:
        from actors.environments.build import build_environment
        from actors.fast_weights.basis import load_basis
        from cluster.train.demonstrations import can_demonstrate

        self._setup, config = setup, setup.config
        torch.set_num_threads(config.rollout.threads)
        environment = build_environment(config.environment, config.embedder)
        assert can_demonstrate(environment)
        chat, basis = read_chat(setup.model_path), load_basis(setup.basis_path)
        self._script = GoldScript(chat, environment, config.memory.question_blind)
        self._side = ScriptedSide(config, setup.model_path, basis, chat, environment, self._script)
        self._tasks = list(islice(environment.tasks("train", config.seed, 0), setup.tasks))
        self._loop = asyncio.new_event_loop()  # a Rollout lives on one loop
        self._rounds = 0

    def play(self) -> Round:
        """Play one round on an empty prefix cache, with a new writer that has read no flashcards.

        Raises BenchError when an episode failed or a write was rolled back.
        """
        self._rounds += 1
        engine, self._rollout = self._side.engine, self._side.rollout()
        engine._loop.call(lambda engine: engine.reset_prefix_cache(), "other").result()
        before, groups = engine.stats(), list[TrajectoryGroup]()
        timing = timed(lambda: groups.extend(self._loop.run_until_complete(self._play())))
        after = engine.stats()
        for failure in (failure for group in groups for failure in group.failed):
            raise BenchError(f"episode {failure.episode_id} failed: {failure.message}")
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        for record in (record for trajectory in trajectories for record in trajectory.writes):
            if record.outcome == "rolled_back":
                raise BenchError(f"a write of the benchmark was rolled back: {record.reason}")
        return Round(
            timing,
            self._script.take_requests(),
            {phase: seconds - before.seconds[phase] for phase, seconds in after.seconds.items()},
            sum(trajectory.timings.environment for trajectory in trajectories),
            after.steps - before.steps,
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
        self._script.tasks = {request.group_id: request.task for request in requests}
        return await asyncio.gather(*(self._rollout.group(request) for request in requests))


class GoldScript:
    """The script of gold flashcards and gold answers (scripted.Script).

    Records the requests of each episode.
    """

    def __init__(self, chat: ChatFormat, environment: DemonstratingEnvironment, question_blind: bool) -> None:
        self.tasks: dict[str, Task] = {}  # by group id
        self._chat, self._environment, self._question_blind = chat, environment, question_blind
        self._requests: dict[str, list[Request]] = {}  # by episode id

    def __call__(self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> tuple[int, ...]:
        requests = self._requests.setdefault(adapter.episode_id, [])
        task = self.tasks[adapter.episode_id.rpartition(".")[0]]
        if sampling.kind == "extract":
            context = self._chat.decode(prompt_ids)
            cards = self._environment.demonstrate_flashcards(task, context, self._question_blind)
            text = render_flashcards(cards)
        else:
            number = sum(request.kind == "act" for request in requests)
            text = task.payload["questions"][number]["answer"]
        ids = self._chat.reply(text)[: sampling.max_tokens]
        request = Request(sampling.kind, tuple(prompt_ids), len(ids), sampling.seed, adapter.name)
        requests.append(request)
        return ids

    def take_requests(self) -> Episodes:
        """The requests of all episodes since the last call."""
        taken, self._requests = self._requests, {}
        return tuple(tuple(requests) for requests in taken.values())


class VLLMSide:
    """Replays the requests. Held by a child process.

    vLLM runs without adapters and without writes, on the settings of Engram's engine.
    """

    def __init__(self, setup: Setup) -> None:
        from actors.engine.start import engine_arguments, prepare_environment, start_engine
        from actors.fast_weights.basis import load_basis

        config = setup.config
        prepare_environment(config.rollout.threads)
        basis = load_basis(setup.basis_path)
        arguments = engine_arguments(setup.model_path, config.model, config.engine, basis, config.seed)
        plain = replace(
            arguments,
            enable_lora=False,
            lora_target_modules=None,
            worker_extension_cls="",
            weight_transfer_config=None,
        )
        self._engine: LLMEngine = start_engine(plain, config.rollout.threads)
        self._temperature = config.sampling.temperature

    def play(self, episodes: Episodes) -> tuple[Timing, int]:
        """Run each episode's requests one after the other, all episodes at once.

        Returns the engine's steps too. Raises BenchError when a request generates another number of tokens
        than it asked for.
        """
        self._engine.reset_prefix_cache()
        self._steps = 0
        return timed(lambda: self._replay(episodes)), self._steps

    def _replay(self, episodes: Episodes) -> None:
        waiting = {str(number): deque(requests) for number, requests in enumerate(episodes)}
        running = {name: self._start_next(name, requests) for name, requests in waiting.items()}
        while self._engine.has_unfinished_requests():
            self._steps += 1
            for output in self._engine.step():
                name, count = output.request_id, len(output.outputs[0].token_ids)
                asked = running[name].generated
                if count != asked:
                    raise BenchError(f"vLLM generated {count} tokens where {asked} were asked for")
                if waiting[name]:
                    running[name] = self._start_next(name, waiting[name])

    def _start_next(self, name: str, requests: deque[Request]) -> Request:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        request = requests.popleft()
        parameters = SamplingParams(
            temperature=self._temperature,
            max_tokens=request.generated,
            seed=request.seed,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = tokens_input(list(request.prompt_ids), cache_salt=request.cache)
        self._engine.add_request(name, prompt, parameters)
        return request
