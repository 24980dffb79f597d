"""Measures what a real learner or engine adds to its process; run as a program, one measurement each.

    python -m tests.integration.sizing_process learner MODEL key=value ...
    python -m tests.integration.sizing_process worker MODEL key=value ...

Prints bytes: held (between two steps) and peak (of a step), above the process before its model was built.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import numpy as np

from actors.peak_memory import reset_resident_peak, resident, resident_peak
from actors.types import TrajectoryGroup
from configs.load import load_config
from configs.schema import RunConfig


def settled() -> int:
    reset_resident_peak()  # collects garbage and gives free memory back
    return resident()


def measure_learner(path: Path, config: RunConfig) -> tuple[int, int]:
    """The second of two steps: the first one makes torch's own buffers."""
    import torch

    from actors.fast_weights.basis import compute_basis_from_checkpoint
    from learner.learner import Learner
    from tests.unit.learner_cases import TASK, trajectory

    basis = compute_basis_from_checkpoint(path, config.fast_weights, 0)
    torch.randn(64, 64, requires_grad=True).exp().sum().backward()
    empty = settled()
    made = Learner(config.learner, config.objective, str(path), basis, 0, 1.0, 0, 1)

    def step(seed: int) -> None:
        """Two rows, each of which fills a microbatch."""
        lengths = (config.learner.microbatch_tokens - 2,)
        episodes = tuple(
            trajectory(basis, seed + place, reward, lengths) for place, reward in ((0, 1.0), (1, 0.0))
        )
        made.step([TrajectoryGroup(TASK, 0, episodes, (), "worker-0")])

    step(1)
    held = settled()
    step(4)
    return held - empty, resident_peak() - empty


def measure_worker(path: Path, config: RunConfig) -> tuple[int, int]:
    """An engine that filled its cache, and a write of four episodes."""
    from actors.engine.policy import VLLMPolicy
    from actors.fast_weights.basis import compute_basis_from_checkpoint
    from actors.fast_weights.delta import zero
    from actors.types import AdapterKey, Sampling, WriteExample, WriteRequest

    basis = compute_basis_from_checkpoint(path, config.fast_weights, 0)
    empty = settled()
    policy = VLLMPolicy(path, config.model, config.engine, basis, (2,), 0, 1, 0)
    draw = np.random.default_rng(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.integers(100, 40000, length).tolist())

    async def fill() -> None:
        room = config.engine.max_model_tokens
        base = AdapterKey(0, "e", 0)
        asked = (policy.generate(ids(room - 4), Sampling(1.0, 3, 0, "act"), base) for _ in range(8))
        await asyncio.gather(*asked)

    asyncio.run(fill())
    held = settled()
    asyncio.run(fill())
    requests = [
        WriteRequest(f"e{number}", zero(basis), tuple(WriteExample(ids(40), ids(8)) for _ in range(8)))
        for number in range(4)
    ]
    policy.writer(config.write).write(requests)
    peak = resident_peak()
    policy.close()
    return held - empty, peak - empty


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    kind, model, *settings = sys.argv[1:]
    measure = {"learner": measure_learner, "worker": measure_worker}[kind]
    found = measure(Path(model), load_config(None, settings))
    print("measured", *found, flush=True)
    os._exit(0)  # vLLM's threads need not be waited for
