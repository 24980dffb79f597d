"""The quickstart's rollout side against vLLM alone: what episodes cost beyond their sampled tokens.

    Engram     configs/quickstart.yaml: engine with adapters and receipts, writer, recall environment, groups
    baseline   vLLM without adapters replays the same requests, chained per episode, as many episodes at once;
               nothing is written

A round is the episodes of one training step, all at once, on an empty prefix cache. Both sides have the same
number of engine threads.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from actors.episodes.demonstration import DemonstratingEnvironment
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import render_flashcards
from actors.types import AdapterKey, Sampling, SpanKind, Task, TrajectoryGroup
from cluster.bench.harness import child, in_turns, timed
from cluster.bench.scripted import QUICKSTART, ScriptedSide, read_chat
from cluster.bench.values import BenchError, Case, Context, Goal, Outcome, Spread, Timing
from cluster.measure.report import Table
from configs.load import load_config
from configs.schema import RunConfig

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


GOAL = Goal("at least", 0.85)
ROUND_S = 900.0
QUICK_TASKS, QUICK_SIBLINGS = 1, 2
STEP_PHASES = ("act", "extract", "receipt", "write", "install", "other", "idle")


def run(context: Context) -> Outcome:
    from actors.fast_weights.basis import compute_basis_from_checkpoint, save_basis

    config = _config(context)
    # Each episode has its own task: the scripted siblings of one task would all write the same flashcards,
    # and the writer reads those only once.
    tasks, siblings = config.train.tasks_per_step * config.train.group_size, 1
    if context.quick:
        tasks, siblings = QUICK_TASKS, QUICK_SIBLINGS
    with tempfile.TemporaryDirectory() as folder:
        basis_path = Path(folder) / "basis.safetensors"
        basis = compute_basis_from_checkpoint(context.model_path, config.fast_weights, config.seed)
        save_basis(basis, basis_path)
        return _measure(Setup(config, context.model_path, basis_path, tasks, siblings), context.repeats)


def _config(context: Context) -> RunConfig:
    config = load_config(QUICKSTART, [])
    return replace(config, rollout=replace(config.rollout, threads=context.threads))


def _measure(setup: Setup, repeats: int) -> Outcome:
    with (
        child("Engram's rollout side", EngramSide, (setup,)) as engram,
        child("vLLM", VLLMSide, (setup,)) as vllm,
    ):
        # The first round warms up, and its requests are those that vLLM replays.
        rounds: list[Round] = [engram.call("play", (), ROUND_S)]
        steps = 0

        def play() -> Timing:
            rounds.append(engram.call("play", (), ROUND_S))
            if _token_counts(rounds[-1]) != _token_counts(rounds[0]):
                raise BenchError("two rounds of the same episodes asked for different numbers of tokens")
            return rounds[-1].timing

        def replay() -> Timing:
            nonlocal steps
            timing, steps = vllm.call("play", (rounds[0].episodes,), ROUND_S)
            assert isinstance(timing, Timing)
            return timing

        timings = in_turns({"vllm": replay, "engram": play}, repeats)
    return _outcome(setup.tasks * setup.siblings, timings, rounds[-repeats:], steps)


def _token_counts(played: Round) -> list[list[tuple[int, int]]]:
    return sorted(
        [(len(request.prompt_ids), request.generated) for request in requests] for requests in played.episodes
    )


def _outcome(
    episodes: int, timings: Mapping[str, Sequence[Timing]], rounds: Sequence[Round], vllm_steps: int
) -> Outcome:
    """Compare the repeats of both sides, of ``episodes`` a round."""

    def median(values: Iterable[float]) -> float:
        return Spread.of(tuple(values)).median

    spent = {phase: median(played.phases[phase] for played in rounds) for phase in STEP_PHASES}
    plain, wall = (median(timing.wall_s for timing in timings[side]) for side in ("vllm", "engram"))
    writing = sum(spent[phase] for phase in ("write", "receipt", "install"))
    note = (
        f"writes, receipts and installs are {writing / wall:.0%} of Engram's time; "
        f"were they free, the ratio would be {plain / (wall - writing):.2f}; "
        f"{rounds[-1].steps} engine steps against {vllm_steps}"
    )
    vllm, engram = (
        tuple(episodes / timing.wall_s for timing in timings[side]) for side in ("vllm", "engram")
    )
    unit = "episodes/s"
    case = Case(unit, "vLLM alone", "Engram", unit, vllm, engram, "candidate/baseline", GOAL, note)
    figures = {f"{phase}_fraction": seconds / sum(spent.values()) for phase, seconds in spent.items()} | {
        "engine_steps": rounds[-1].steps,
        "vllm_steps": vllm_steps,
        "environment_s_per_episode": median(played.environment_s / episodes for played in rounds),
        "cpu_ratio": median(
            one.cpu_s / other.cpu_s for one, other in zip(timings["vllm"], timings["engram"], strict=True)
        ),
    }
    return Outcome((case,), (_timeline(episodes, spent, plain),), figures=figures)


def _timeline(episodes: int, spent: dict[str, float], plain: float) -> Table:
    """The step thread's seconds, as the training loop logs them under timeline/worker_*."""
    total = sum(spent.values())
    rows = [
        (phase, f"{seconds / episodes:.3f}", f"{seconds / total:.1%}", f"{seconds / plain:.1%}")
        for phase, seconds in [*spent.items(), ("all", total)]
    ]
    header = ("phase", "s per episode", "of the step thread's time", "of vLLM's time alone")
    return Table("Timeline of Engram's step thread", header, tuple(rows))


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
