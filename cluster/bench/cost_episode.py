"""One cell of the cost benchmark (cost.py), in a process of its own: an engine, a writer and one episode."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from actors.peak_memory import take_peak
from actors.text.flashcards import extraction_prompt, render_flashcards
from actors.types import AdapterKey, Flashcard, Sampling, Task, Trajectory
from cluster.bench.scripted import Script, ScriptedSide, read_chat
from cluster.bench.values import BenchError
from configs.schema import (
    EmbedderConfig,
    EngineConfig,
    EnvironmentConfig,
    FastWeightsConfig,
    MemoryConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
)

if TYPE_CHECKING:
    from actors.text.chat_template import ChatFormat

MemoryKind = Literal["none", "parametric"]

BLOCK = 128  # tokens of one block of vLLM's KV cache on CPU; a multiple of the GPU's

EPISODE_S = 3000.0
MIB = 2**20
QUESTION = "What did they say about the harbour?"
_FILLER = "they said that the old house was near water and we went there after work with some friends"
WORDS = _FILLER.split()


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes in tokens. ``lengths``: of the histories, multiples of ``turn``. ``limit``: L_max.

    ``extraction``: the longest extraction.
    """

    lengths: tuple[int, ...]
    turn: int
    limit: int
    extraction: int
    answer: int


@dataclass(frozen=True, slots=True)
class Cell:
    """An episode to measure. ``memory`` "none" is full context."""

    memory: MemoryKind
    length: int
    sizes: Sizes
    model_path: str
    threads: int


@dataclass(frozen=True, slots=True)
class Cost:
    """``peak``: bytes, from the end of the start to the episode's end. ``writes``: all were accepted.

    ``context``: tokens that the engine must admit. ``cache``: bytes of their KV cache. ``adapter``: bytes of
    one revision's B.
    """

    peak: int
    context: int
    cache: int
    seconds: float
    cpu_s: float
    writes: int
    adapter: int


def extraction_script(chat: ChatFormat) -> Script:
    """A script (scripted.Script) that writes two new flashcards an extraction and leaves answers alone."""
    count = 0

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> tuple[int, ...] | None:
        nonlocal count
        if sampling.kind == "act":
            return None
        count += 1
        answer = f"The keeper of house {count}."
        cards = [Flashcard(f"Who came to the harbour on day {count}{half}?", answer) for half in ("a", "b")]
        ids = chat.reply(render_flashcards(cards))
        if len(ids) > sampling.max_tokens:
            raise BenchError(
                f"the scripted extraction has {len(ids)} tokens of this tokenizer, "
                f"{sampling.max_tokens} are allowed"
            )
        return ids

    return script


class Episode:
    """A cell's engine, writer and episode. Held by a child process."""

    def __init__(self, cell: Cell) -> None:
        import torch
        from transformers import AutoConfig

        from actors.environments.build import build_environment
        from actors.fast_weights.basis import compute_basis_from_checkpoint

        torch.set_num_threads(cell.threads)
        self._cell, path = cell, Path(cell.model_path)
        self._chat = chat = read_chat(path)
        environment = build_environment(EnvironmentConfig(), EmbedderConfig())
        self._memory, self._context = _memory(cell, chat, environment.system_prompt)
        architecture, element = AutoConfig.from_pretrained(path), getattr(torch, ModelConfig().dtype).itemsize
        self._token_bytes = _token_bytes(architecture, element)
        basis = compute_basis_from_checkpoint(path, FastWeightsConfig(), seed=0)
        self._adapter = 4 * basis.parameters
        cache_gib = _cached_tokens(self._context) * self._token_bytes / 2**30
        config = RunConfig(
            seed=0,
            memory=self._memory,
            engine=EngineConfig(slots=1, max_model_tokens=self._context, kv_cache_gib=cache_gib),
            rollout=RolloutConfig(threads=cell.threads, episode_timeout_s=EPISODE_S),
            sampling=SamplingConfig(max_answer_tokens=cell.sizes.answer),
        )
        side = ScriptedSide(config, path, basis, chat, environment, extraction_script(chat))
        self._policy, self._rollout = side.engine, side.rollout()

    def cache_tokens(self) -> tuple[int, int]:
        """The tokens that the KV cache admits: as computed here, and as vLLM made it."""

        def made(engine: Any) -> int:
            cache = engine.vllm_config.cache_config
            return int(cache.num_gpu_blocks * cache.block_size)

        return _cached_tokens(self._context), self._policy._loop.call(made, "other").result(60)

    def play(self) -> Cost:
        """Warm up with an episode of one full context, then measure the cell's episode.

        Raises BenchError when the episode, or a write in it, fails.
        """
        cell = self._cell
        self._run(cell.sizes.limit, seed=1)
        take_peak()  # loading a model takes more than an episode
        began = time.process_time()
        trajectory = self._run(cell.length, seed=0)
        cpu_s, peak = time.process_time() - began, take_peak()
        if (held := peak.device_bytes or peak.resident_bytes) is None:
            raise BenchError(peak.problem)
        unwritten = [record for record in trajectory.writes if record.outcome != "accepted"]
        if unwritten:
            raise BenchError(f"a write was {unwritten[0].outcome}: {unwritten[0].reason}")
        needed, made = self.cache_tokens()
        if not peak.device_bytes and made != needed:
            raise BenchError(
                f"vLLM made a KV cache of {made} tokens, not of {needed}: "
                "_cached_tokens is wrong about its blocks"
            )
        # On a GPU vLLM takes gpu_memory_utilization, however little is needed.
        spare = (made - needed) * self._token_bytes
        return Cost(
            peak=held - spare,
            context=self._context,
            cache=needed * self._token_bytes,
            seconds=trajectory.timings.total,
            cpu_s=cpu_s,
            writes=len(trajectory.writes),
            adapter=self._adapter,
        )

    def _run(self, length: int, seed: int) -> Trajectory:
        from actors.episodes.rollout import RolloutRequest

        payload = {
            "sessions": history(self._chat, length, self._cell.sizes.turn, seed),
            "facts": [],
            "questions": [{"question": QUESTION, "answer": "", "relation": ""}],
        }
        task = Task(f"history-{seed}", "recall", payload, seed)
        request = RolloutRequest(task, task.id, 1, self._memory, 0.0, self._cell.sizes.answer, seed)
        group = asyncio.run(self._rollout.group(request))
        if group.failed:
            raise BenchError(f"the episode failed: {group.failed[0].boundary}: {group.failed[0].message}")
        return group.trajectories[0]


def history(chat: ChatFormat, length: int, turn: int, seed: int) -> list[str]:
    """Filler texts, ``length`` tokens in all. Each is a user turn of exactly ``turn`` tokens."""
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
    """The cell's memory, and the tokens that its engine must admit: the longest prompt and its sample."""
    sizes = cell.sizes
    opening = len(chat.system(system_prompt)) + len(chat.assistant_open)
    if cell.memory == "none":
        needed = opening + cell.length + len(chat.user(QUESTION)) + sizes.answer
        # Nothing is truncated: the answer's tokens leave room for the extraction that a config asks for.
        return MemoryConfig(policy="truncation", max_context_tokens=needed - 2, max_extract_tokens=1), needed
    # A context is relieved once it is over L_max, by at most a turn. The extraction's prompt lists earlier
    # flashcards, at most ``extraction`` tokens of them.
    prompt = chat.user(extraction_prompt(QUESTION, [Flashcard("q", "a")])) + chat.assistant_open
    limit, extraction = sizes.limit, sizes.extraction
    config = MemoryConfig(policy="parametric", max_context_tokens=limit, max_extract_tokens=extraction)
    return config, limit + sizes.turn + len(prompt) + 2 * extraction


def _cached_tokens(context: int) -> int:
    """Tokens of a KV cache for ``context`` tokens: whole blocks, and one that vLLM keeps for itself."""
    return (math.ceil(context / BLOCK) + 1) * BLOCK


def _token_bytes(config: Any, element_bytes: int) -> int:
    """KV cache of one token: keys and values of all layers."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * width * element_bytes)
