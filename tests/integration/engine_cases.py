"""The engine of the engine's tests: the tiny model, few slots, a short window."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from actors.engine.policy import VLLMPolicy
from actors.fast_weights.delta import Basis
from actors.types import AdapterKey, FastWeights, Sampling
from configs.schema import EngineConfig, ModelConfig

T = TypeVar("T")
SLOTS = 4
LIMIT = 512
STOP = 2
ROUNDING = 1e-5  # nats, float32: what the same weights may differ by in a batch of another size
EXACT = 1e-3  # nats, float32: what engine and transformers may differ by
SIZE = 0.02  # of B: moves the tiny model's log-probs by tenths of a nat


def engine(tiny_model_path: Path, basis: Basis) -> VLLMPolicy:
    config = EngineConfig(slots=SLOTS, max_model_tokens=LIMIT, kv_cache_gib=0.25)
    return VLLMPolicy(tiny_model_path, ModelConfig(), config, basis, (STOP,), version=0, threads=1, seed=0)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, timeout=120))


def greedy(tokens: int) -> Sampling:
    return Sampling(temperature=0.0, max_tokens=tokens, seed=0, kind="act")


def base(policy: VLLMPolicy) -> AdapterKey:
    return AdapterKey(policy.version, "any", 0)


def key(policy: VLLMPolicy, episode: str, revision: int = 1) -> AdapterKey:
    return AdapterKey(policy.version, episode, revision)


async def installed(policy: VLLMPolicy, episode: str, weights: FastWeights) -> AdapterKey:
    name = key(policy, episode, weights.revision)
    await policy.install(name, weights, None)
    return name
