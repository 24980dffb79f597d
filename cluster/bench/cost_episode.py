"""One cell of the cost benchmark (cost.py): an engine, a writer and one episode over a history of a given length, in a process of their own."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from actors.types import (
    AdapterKey,
    FastWeights,
    Flashcard,
    Generation,
    PolicyVersion,
    Probe,
    Sampling,
    Task,
    Trajectory,
)
from cluster.bench import memory as resident_memory
from cluster.bench.values import BenchError
from configs.schema import (
    EmbedderConfig,
    EngineConfig,
    EnvironmentConfig,
    FastWeightsConfig,
    MemoryConfig,
    ModelConfig,
    RolloutConfig,
    WriteConfig,
)

if TYPE_CHECKING:
    from actors.engine.policy import VLLMPolicy
    from actors.text.chat_template import ChatFormat

MemoryKind = Literal["none", "parametric"]

BLOCK = 128
"""Tokens of one block of vLLM's KV cache on CPU; a multiple of the GPU's."""

EPISODE_S = 3000.0
MIB = 2**20
QUESTION = "What did they say about the harbour?"
WORDS = (
    "they",
    "said",
    "that",
    "the",
    "old",
    "house",
    "was",
    "near",
    "water",
    "and",
    "we",
    "went",
    "there",
    "after",
    "work",
    "with",
    "some",
    "friends",
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """All in tokens. ``lengths``: of the histories, multiples of ``turn``. ``limit``: L_max. ``extraction``: the most that one may have."""

    lengths: tuple[int, ...]
    turn: int
    limit: int
    extraction: int
    answer: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One episode to be measured. ``memory`` "none" is full context."""

    memory: MemoryKind
    length: int
    sizes: Sizes
    model_path: str
    threads: int


@dataclass(frozen=True, slots=True)
class Cost:
    """``peak``: bytes, from after the start to the episode's end. ``context``: tokens that the engine must admit, ``cache``: bytes of their KV cache.

    ``adapter``: bytes of one revision's B. ``writes``: accepted ones; another outcome is an error here.
    """

    peak: int
    context: int
    cache: int
    seconds: float
    cpu_s: float
    writes: int
    adapter: int


class PeakMemory:
    """Of this process: resident memory, or the GPU's allocated memory where there is one."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda if torch.cuda.is_available() else None

    @property
    def resident(self) -> bool:
        """Whether this is resident memory."""
        return self._cuda is None

    def reset(self) -> None:
        """Forget the peak so far: that of loading a model would hide that of an episode. Raises BenchError where the system has no such thing.

        What the start freed and the C library kept goes back to the system first: it differs by hundreds of MiB from run to run.
        """
        if self._cuda is not None:
            self._cuda.reset_peak_memory_stats()
        else:
            resident_memory.reset_peak()

    def read(self) -> int:
        """Bytes since the last reset."""
        if self._cuda is not None:
            return int(self._cuda.max_memory_allocated())
        return resident_memory.peak()


class ScriptedExtractions:
    """The engine as a Policy whose extractions are scripted: it samples as many tokens as the script has, and the script is handed back."""

    def __init__(self, policy: VLLMPolicy, chat: ChatFormat) -> None:
        self._policy = policy
        self._chat = chat
        self._count = 0

    @property
    def version(self) -> PolicyVersion:
        return self._policy.version

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey
    ) -> Generation:
        if sampling.kind == "act":
            return await self._policy.generate(prompt_ids, sampling, adapter)
        from actors.text.flashcards import render_flashcards

        self._count += 1
        cards = [
            Flashcard(
                f"Who came to the harbour on day {self._count}{half}?", f"The keeper of house {self._count}."
            )
            for half in ("a", "b")
        ]
        script = self._chat.reply(render_flashcards(cards))
        if len(script) > sampling.max_tokens:
            raise BenchError(
                f"the scripted extraction has {len(script)} tokens of this tokenizer, {sampling.max_tokens} are allowed"
            )
        sampled = await self._policy.generate(prompt_ids, replace(sampling, max_tokens=len(script)), adapter)
        return Generation(script, sampled.logprobs, "stop")

    async def install(self, key: AdapterKey, weights: FastWeights, probe: Probe | None) -> None:
        await self._policy.install(key, weights, probe)

    async def release(self, keys: Sequence[AdapterKey]) -> None:
        await self._policy.release(keys)


class Episode:
    """What a cell's process holds: engine, writer and one episode."""

    def __init__(self, cell: Cell) -> None:
        import torch
        from transformers import AutoConfig, AutoTokenizer

        from actors.engine.policy import VLLMPolicy
        from actors.environments.build import build_environment
        from actors.episodes.rollout import Rollout
        from actors.fast_weights.basis import compute_basis_from_checkpoint
        from actors.memory.build import surroundings
        from actors.text.chat_template import ChatFormat

        torch.set_num_threads(cell.threads)
        self._cell = cell
        self._chat = ChatFormat(AutoTokenizer.from_pretrained(cell.model_path))
        environment = build_environment(EnvironmentConfig(), EmbedderConfig())
        self._memory, self._context = _memory(cell, self._chat, environment.system_prompt)
        model = ModelConfig()
        self._token_bytes = _token_bytes(
            AutoConfig.from_pretrained(cell.model_path), getattr(torch, model.dtype).itemsize
        )
        basis = compute_basis_from_checkpoint(cell.model_path, FastWeightsConfig(), seed=0)
        self._adapter = 4 * basis.parameters
        engine = EngineConfig(
            slots=1,
            max_model_tokens=self._context,
            kv_cache_gib=_cached_tokens(self._context) * self._token_bytes / 2**30,
        )
        self._policy = VLLMPolicy(
            cell.model_path, model, engine, basis, (), version=0, threads=cell.threads, seed=0
        )  # no stop: lengths are given
        write, writer = WriteConfig(), self._policy.writer(WriteConfig())
        rollout = RolloutConfig(threads=cell.threads, episode_timeout_s=EPISODE_S)
        policy = ScriptedExtractions(self._policy, self._chat)
        around = surroundings(self._context, cell.sizes.answer, EmbedderConfig())
        self._rollout = Rollout(
            policy, writer, environment, self._chat, write, rollout, engine.slots, around, basis.id, "cost"
        )

    def cache_tokens(self) -> tuple[int, int]:
        """That the KV cache admits: as computed here, and as vLLM made it."""

        def made(engine: Any) -> int:
            cache = engine.vllm_config.cache_config
            return int(cache.num_gpu_blocks * cache.block_size)

        return _cached_tokens(self._context), self._policy._loop.call(made, "other").result(60)

    def play(self) -> Cost:
        """An episode of one full context that warms up, then the measured one. Raises BenchError when it, or a write of it, fails."""
        cell, memory = self._cell, PeakMemory()
        self._run(cell.sizes.limit, seed=1)
        memory.reset()
        began = time.process_time()
        trajectory = self._run(cell.length, seed=0)
        cpu_s = time.process_time() - began
        unwritten = [record for record in trajectory.writes if record.outcome != "accepted"]
        if unwritten:
            raise BenchError(f"a write was {unwritten[0].outcome}: {unwritten[0].reason}")
        needed, made = self.cache_tokens()
        if memory.resident and made != needed:
            raise BenchError(
                f"vLLM made a KV cache of {made} tokens, not of {needed}: what its blocks need is computed wrongly here"
            )
        spare = (
            made - needed
        ) * self._token_bytes  # on GPU vLLM takes gpu_memory_utilization, however little is needed
        cache = needed * self._token_bytes
        return Cost(
            memory.read() - spare,
            self._context,
            cache,
            trajectory.timings.total,
            cpu_s,
            len(trajectory.writes),
            self._adapter,
        )

    def _run(self, length: int, seed: int) -> Trajectory:
        from actors.episodes.rollout import RolloutRequest

        payload = {
            "sessions": history(self._chat, length, self._cell.sizes.turn, seed),
            "questions": [{"question": QUESTION, "answer": "", "relation": ""}],
        }
        task = Task(f"history-{seed}", "recall", payload, seed)
        request = RolloutRequest(task, task.id, 1, self._memory, 0.0, self._cell.sizes.answer, seed)
        group = asyncio.run(self._rollout.group(request))
        if group.failed:
            raise BenchError(f"the episode failed: {group.failed[0].boundary}: {group.failed[0].message}")
        return group.trajectories[0]


def history(chat: ChatFormat, length: int, turn: int, seed: int) -> list[str]:
    """Filler texts; as user turns of ``chat`` each has exactly ``turn`` tokens, ``length`` in all (a multiple of it)."""
    draw = random.Random(seed)
    return [_filler(chat, turn, draw) for _ in range(length // turn)]


def _filler(chat: ChatFormat, tokens: int, draw: random.Random) -> str:
    words: list[str] = []
    for _ in range(1000):
        missing = tokens - len(chat.user(" ".join(words)))
        if missing == 0:
            return " ".join(words)
        if missing > 0:
            words += draw.choices(WORDS, k=missing)
        else:
            words.pop()
    raise BenchError(f"no text of {tokens} tokens was found: this tokenizer splits common English words")


def _memory(cell: Cell, chat: ChatFormat, system_prompt: str) -> tuple[MemoryConfig, int]:
    """The memory of a cell, and the tokens that its engine must admit: the longest prompt and what is sampled after it."""
    from actors.text.flashcards import extraction_prompt

    sizes = cell.sizes
    opening = len(chat.system(system_prompt)) + len(chat.assistant_open)
    if cell.memory == "none":
        needed = opening + cell.length + len(chat.user(QUESTION)) + sizes.answer
        return MemoryConfig(policy="truncation", max_context_tokens=needed), needed
    # A context is relieved once it is over L_max: by a turn at most. The extraction lists earlier flashcards, ``extraction`` tokens at most.
    asking = len(chat.user(extraction_prompt(QUESTION, [Flashcard("q", "a")]))) + len(chat.assistant_open)
    config = MemoryConfig(
        policy="parametric", max_context_tokens=sizes.limit, max_extract_tokens=sizes.extraction
    )
    return config, sizes.limit + sizes.turn + asking + 2 * sizes.extraction


def _cached_tokens(context: int) -> int:
    """What the KV cache must hold for ``context`` tokens: whole blocks, and the one that vLLM keeps for itself."""
    return (math.ceil(context / BLOCK) + 1) * BLOCK


def _token_bytes(config: Any, element_bytes: int) -> int:
    """KV cache of one token: keys and values of all layers."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * width * element_bytes)
