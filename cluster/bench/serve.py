"""The endpoint against stock vLLM's: 64 conversations at once, each under a Delta of its own.

    vLLM      `vllm serve` with one static LoRA, which all requests share
    Engram    `engram serve`; each conversation has a LoRA of its own on the same modules, from its folder

Both are processes of their own, with as many engine threads and the same dtype. A client sends the same
messages to both, all at once, and reads the answers as they come. A first short turn brings the adapters in;
the second one is measured. Stop tokens are forbidden, so that all answers are of one length.

Every wait, and who unblocks it: a server's start by its /health, its death or START_S; an answer by ANSWER_S.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.engine.start import engine_modules, slot_width
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis
from actors.fast_weights.peft_format import export_peft
from actors.types import FastWeights
from cluster.bench.harness import in_turns
from cluster.bench.scripted import read_chat
from cluster.bench.values import BenchError, Case, Context, Goal, Outcome, Timing
from configs.load import load_config
from configs.shipped import find_config

if TYPE_CHECKING:
    from openai import AsyncOpenAI

GOAL = Goal("at least", 0.85)
START_S, ANSWER_S = 600.0, 300.0
WINDOW = 1536
STATIC = "static"
# Conversations differ from their first word on: with one LoRA for all, what they share would be read once.
FIRST, SECOND = "{} is the number of my house in Lisbon.", "Tell me a story about somebody who lives there."
DELTA_STD = 0.003  # of B: another model, and still one that speaks
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class _Sizes:
    conversations: int
    first_tokens: int
    tokens: int


FULL, QUICK = _Sizes(64, 4, 64), _Sizes(2, 2, 4)


@dataclass(frozen=True, slots=True)
class _Server:
    """A server that answers. ``model`` is its name for the model under a LoRA."""

    url: str
    key: str
    model: str
    owns_conversations: bool


def run(context: Context) -> Outcome:
    sizes = QUICK if context.quick else FULL
    config = load_config(find_config("chat"), [])
    basis = compute_basis_from_checkpoint(context.model_path, config.fast_weights, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        export_peft(_delta(basis, 0), basis, place / STATIC, str(context.model_path))
        for round_ in range(context.repeats + 1):  # a round's conversations are new; the first one warms up
            for number in range(sizes.conversations):
                saved = place / "saved" / _name(round_, number)
                export_peft(_delta(basis, number), basis, saved, str(context.model_path))
        vllm = _started(_vllm_command(context, basis, place, sizes), context, place / "vllm.log", STATIC)
        engram = _started(_engram_command(context, place, sizes), context, place / "engram.log")
        with vllm as baseline, engram as candidate:
            return _measure(baseline, candidate, config.assistant.system_prompt, sizes, context)


def _measure(baseline: _Server, candidate: _Server, system: str, sizes: _Sizes, context: Context) -> Outcome:
    forbidden = {str(token): -100 for token in read_chat(context.model_path).stop_token_ids}
    stock, ours = (_Rounds(server, system, sizes, forbidden) for server in (baseline, candidate))
    in_turns({"vLLM": stock.play, "Engram": ours.play}, context.repeats)
    note = f"{sizes.conversations} conversations at once, {sizes.tokens} tokens each, second turn"
    sides = ("vLLM", "Engram")
    speeds = (tuple(stock.tokens_per_s[1:]), tuple(ours.tokens_per_s[1:]))
    firsts = (tuple(stock.first_s[1:]), tuple(ours.first_s[1:]))
    return Outcome(
        (
            Case("tokens of all", *sides, "tokens/s", *speeds, "candidate/baseline", GOAL, note),
            Case("time to first token, median", *sides, "s", *firsts, "baseline/candidate", GOAL, note),
        )
    )


def _delta(basis: Basis, seed: int) -> FastWeights:
    draw = np.random.default_rng(seed)
    sizes = {name: (rows, basis.rank) for name, rows in basis.d_out.items()}
    b = {name: draw.normal(0, DELTA_STD, size).astype(np.float32) for name, size in sizes.items()}
    return FastWeights(basis.id, 1, b)


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _name(round_: int, number: int) -> str:
    return f"round-{round_}-{number}"


# --- the client ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Rounds:
    """Asks one server, round after round, and keeps what was measured, the warm-up's first."""

    server: _Server
    system: str
    sizes: _Sizes
    forbidden: dict[str, int]
    tokens_per_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)

    def play(self) -> Timing:
        began, cpu = time.perf_counter(), time.process_time()
        asyncio.run(self._round(len(self.first_s)))
        return Timing(time.perf_counter() - began, time.process_time() - cpu)

    async def _round(self, round_: int) -> None:
        from openai import AsyncOpenAI, OpenAIError

        names = [_name(round_, number) for number in range(self.sizes.conversations)]
        client = AsyncOpenAI(
            base_url=f"{self.server.url}/v1", api_key=self.server.key, timeout=ANSWER_S, max_retries=0
        )
        system = _said("system", self.system)
        told = [[system, _said("user", FIRST.format(number))] for number in range(len(names))]
        try:
            async with client:
                said = await self._turns(client, names, told, self.sizes.first_tokens)
                for messages, (text, _) in zip(told, said, strict=True):
                    messages += [_said("assistant", text), _said("user", SECOND)]
                began = time.perf_counter()
                answers = await self._turns(client, names, told, self.sizes.tokens)
        except OpenAIError as error:
            raise BenchError(f"{self.server.url}: {error}") from error
        seconds = time.perf_counter() - began
        self.tokens_per_s.append(self.sizes.tokens * len(names) / seconds)
        self.first_s.append(median(first for _, first in answers))

    async def _turns(
        self, client: AsyncOpenAI, names: Sequence[str], told: Sequence[Sequence[Any]], tokens: int
    ) -> list[tuple[str, float]]:
        pairs = zip(names, told, strict=True)
        return await asyncio.gather(*(self._turn(client, *pair, tokens) for pair in pairs))

    async def _turn(
        self, client: AsyncOpenAI, name: str, messages: Sequence[Any], tokens: int
    ) -> tuple[str, float]:
        """The answer, and the seconds to its first text."""
        began, first, text, counted = time.perf_counter(), 0.0, "", 0
        stream = await client.chat.completions.create(
            model=self.server.model,
            messages=list(messages),
            max_tokens=tokens,
            temperature=0,
            logit_bias=self.forbidden,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"X-Conversation-Id": name} if self.server.owns_conversations else {},
        )
        async for chunk in stream:
            if chunk.choices and (piece := chunk.choices[0].delta.content):
                first = first or time.perf_counter() - began
                text += piece
            if chunk.usage is not None:
                counted = chunk.usage.completion_tokens
        if counted != tokens:
            raise BenchError(f"{self.server.url} gave {counted} tokens, {tokens} were asked for")
        return text, first


# --- the servers --------------------------------------------------------------------------------------------


def _vllm_command(context: Context, basis: Basis, place: Path, sizes: _Sizes) -> list[str]:
    modules = ["--lora-modules", f"{STATIC}={place / STATIC}", "--enable-lora", "--max-loras", "1"]
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(context.model_path)),
        *("--dtype", "float32", "--enforce-eager", "--generation-config", "vllm"),
        *("--max-model-len", str(WINDOW), "--max-num-seqs", str(sizes.conversations)),
        *("--kv-cache-memory-bytes", str(2**30)),
        *(*modules, "--max-lora-rank", str(slot_width(basis.rank))),
        *("--lora-target-modules", *engine_modules(basis.modules)),
        *("--host", "127.0.0.1", "--disable-log-stats"),
    ]


def _engram_command(context: Context, place: Path, sizes: _Sizes) -> list[str]:
    return [
        *(sys.executable, "-m", "cluster", "serve", str(context.model_path)),
        *("model.dtype=float32", f"rollout.threads={context.threads}"),
        *(
            f"engine.max_model_tokens={WINDOW}",
            "engine.kv_cache_gib=1",
            f"engine.slots={sizes.conversations}",
        ),
        *(f"memory.max_context_tokens={WINDOW // 3}", "write.preserve.weight=0"),
        *(f"assistant.save_dir={place / 'saved'}", f"assistant.max_conversations={sizes.conversations}"),
        *(f"assistant.request_timeout_s={ANSWER_S}",),
    ]


@contextmanager
def _started(command: Sequence[str], context: Context, log: Path, model: str = "") -> Iterator[_Server]:
    """Run a server for the block. ``model``: what stock vLLM calls it; "" for Engram's, which has a folder's.

    Raises BenchError with the server's last line where it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key = secrets.token_hex(16)
    own = {"OMP_NUM_THREADS": str(context.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    keys = {"VLLM_API_KEY": key, "ENGRAM_API_KEY": key}
    with log.open("w") as told:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env={**os.environ, **own, **quiet, **keys},
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _await_health(process, url, log)
        yield _Server(url, key, model or context.model_path.name, owns_conversations=not model)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_health(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(_POLL_S)
    lines = log.read_text(errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    how = f"no answer within {START_S:g} s" if process.poll() is None else f"ended ({process.returncode})"
    raise BenchError(f"the server of {log.stem} did not start: {how}: {said[:300]}")
