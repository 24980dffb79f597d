"""First contact with a GPU: one stage after the other, each in a process of its own, one JSON line for each.

    python -m tests.gpu.smoke                   all stages; a failure is a line too, and the next stage runs
    python -m tests.gpu.smoke slots learner     some of them

A random model of Qwen3-0.6B's shape is made first: no hub is needed. Without a GPU the same stages run on the
CPU with a tiny model, which shows only that they run. Eager comes before graphs: whether the adapters act is
known even where compiling fails.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGE_S = 300  # of one stage; vLLM compiles in three of them
ACTIVE = 8  # adapters that decode at once in the stage "slots"
Report = dict[str, Any]


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def make_model(folder: Path) -> None:
    """Write a random Qwen3, in bfloat16 on a GPU and float32 on a CPU."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    real = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "vocab_size": 151_936}
    real |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    tiny = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "vocab_size": 2048}
    tiny |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    config = Qwen3Config(
        **(real if on_gpu() else tiny), max_position_embeddings=8192, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if on_gpu() else torch.float32
    with torch.device("cuda" if on_gpu() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:  # wide, so that a wrong adapter shows in the log-probs
                parameter.normal_(std=0.2 if "embed" in name else 0.1 * (128 / parameter.shape[-1]) ** 0.5)
    model.save_pretrained(folder)


def _basis(folder: Path) -> Any:
    from actors.fast_weights.basis import compute_basis_from_checkpoint
    from configs.schema import FastWeightsConfig

    return compute_basis_from_checkpoint(folder, FastWeightsConfig(last_layers=2), seed=0)


def _policy(folder: Path, basis: Any, slots: int, eager: bool) -> Any:
    from actors.engine.policy import VLLMPolicy
    from configs.schema import EngineConfig, ModelConfig

    model = ModelConfig(dtype="bfloat16" if on_gpu() else "float32")
    size = 4.0 if on_gpu() else 0.125
    engine = EngineConfig(slots=slots, max_model_tokens=512, kv_cache_gib=size, enforce_eager=eager)
    return VLLMPolicy(folder, model, engine, basis, (2,), version=0, threads=4 if on_gpu() else 1, seed=0)


def _written(policy: Any, basis: Any, episodes: int) -> Any:
    """Write random cards for each episode, on the engine's own tensors."""
    import numpy as np

    from actors.fast_weights.delta import zero
    from actors.types import WriteExample, WriteRequest
    from configs.schema import WriteConfig

    draw = np.random.default_rng(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.integers(100, 1900, length).tolist())

    asked = [
        WriteRequest(f"e{number}", zero(basis), tuple(WriteExample(ids(30), ids(6)) for _ in range(4)))
        for number in range(episodes)
    ]
    return policy.writer(WriteConfig(optimizer="adam", learning_rate=1e-3, epochs=10)).write(asked)


# --- stages -----------------------------------------------------------------------------------------------


def environment(folder: Path) -> Report:
    """What `engram doctor` says, and what torch sees."""
    import torch

    from cluster.sizing.doctor import examine

    name = torch.cuda.get_device_name() if on_gpu() else "no GPU"
    problems = [finding.problem for finding in examine() if finding.problem]
    return {"torch": torch.__version__, "gpu": name, "problems": problems}


def eager(folder: Path) -> Report:
    """Receipts: does every written adapter act, and how far are engine and writer apart?"""
    return _acts(folder, eager=True)


def graphs(folder: Path) -> Report:
    """The same with compiling and CUDA graphs."""
    return _acts(folder, eager=False)


def _acts(folder: Path, eager: bool) -> Report:
    from actors.types import AdapterKey

    began = time.perf_counter()
    basis = _basis(folder)
    policy = _policy(folder, basis, 16, eager)
    started = time.perf_counter()
    results = _written(policy, basis, 16)
    written = time.perf_counter()

    async def receipts() -> list[float]:
        apart = []
        for number, result in enumerate(results):
            key = AdapterKey(0, f"e{number}", 1)
            await policy.install(key, result.weights, result.probe)  # raises where the receipt fails
            scored = await policy.score(result.probe.token_ids, key)
            ours = scored[-len(result.probe.after) :]
            apart.append(max(abs(a - b) for a, b in zip(ours, result.probe.after, strict=True)))
        return apart

    apart = asyncio.run(receipts())
    stats = policy.stats()
    policy.close()
    return {
        "start_s": started - began,
        "write_s": written - started,
        "receipts_passed": stats.receipts_passed,
        "receipts_unseen": stats.receipts_unseen,
        "apart_largest": max(apart),
    }


def slots(folder: Path) -> Report:
    """Decode with few adapters in many slots: the grid of vLLM's kernels grows with the slots.

    ``specialize_active_lora`` of vLLM captures graphs by the number of adapters that act.
    """
    report: Report = {}
    for count, specialize in ((ACTIVE, False), (64, False), (64, True)):
        name = f"{count} slots{', specialized' if specialize else ''}"
        report[f"{name}: tokens/s"] = _decode_rate(folder, count, specialize)
    return report


def _decode_rate(folder: Path, count: int, specialize: bool) -> float:
    from actors.engine import start
    from actors.types import AdapterKey, Sampling

    plain = start.engine_arguments

    def arguments(*words: Any) -> Any:
        made = plain(*words)
        made.specialize_active_lora = specialize
        return made

    start.engine_arguments = arguments
    basis = _basis(folder)
    policy = _policy(folder, basis, count, eager=False)
    start.engine_arguments = plain
    results = _written(policy, basis, ACTIVE)
    keys = [AdapterKey(0, f"e{number}", 1) for number in range(ACTIVE)]

    async def decode(tokens: int) -> int:
        asked = (
            policy.generate((5, 6, 7 + n), Sampling(1.0, tokens, n, "act"), key) for n, key in enumerate(keys)
        )
        return sum(len(reply.token_ids) for reply in await asyncio.gather(*asked))

    async def rate() -> float:
        for key, result in zip(keys, results, strict=True):
            await policy.install(key, result.weights, result.probe)
        await decode(8)
        began = time.perf_counter()
        sampled = await decode(256 if on_gpu() else 16)
        return sampled / (time.perf_counter() - began)

    found = asyncio.run(rate())
    policy.close()
    return found


def learner(folder: Path) -> Report:
    """Two steps of the learner, with the optimizer that a GPU gets; memory against the plan."""
    import numpy as np
    import torch

    from actors.types import ActionSpan, Outcome, Segment, Task, Timings, Trajectory, TrajectoryGroup
    from cluster.sizing.memory import GIB, learner_parts, peak
    from configs.schema import LearnerConfig, ObjectiveConfig
    from configs.shapes import read_shape
    from learner.learner import Learner

    gpus, dtype = (1.0, "bfloat16") if on_gpu() else (0.0, "float32")
    tokens = 4096 if on_gpu() else 128
    config = LearnerConfig(dtype=dtype, gpus_per_worker=gpus, microbatch_tokens=tokens)  # type: ignore[arg-type]
    task = Task("t", "recall", {}, 0)

    def episode(seed: int) -> Trajectory:
        draw, mask = np.random.default_rng(seed), np.arange(tokens) >= tokens // 2
        ids = draw.integers(100, 1900, tokens).astype(np.int32)
        spans = (ActionSpan(tokens // 2, tokens, "act"),)
        segment = Segment(ids, mask, np.where(mask, -7.0, 0).astype(np.float32), 0, 0, spans)
        outcome, times = Outcome(float(seed), {}, ()), Timings(0, 0, 0, 0, 0, 0)
        return Trajectory(task, f"e{seed}", 0, (segment,), (), (), {}, outcome, "done", times)

    made = Learner(config, ObjectiveConfig(importance="none"), str(folder), _basis(folder), 0, 1.0, 0, 1)
    group = TrajectoryGroup(task, 0, (episode(0), episode(1)), (), "w")
    made.step([group])
    began = time.perf_counter()
    report = made.step([group])
    seconds = time.perf_counter() - began
    planned = peak(learner_parts(read_shape(folder / "config.json", "smoke"), config, reference=False))
    held = torch.cuda.max_memory_allocated() / GIB if on_gpu() else 0.0
    found = {"step_s": seconds, "grad_norm": report.grad_norm, "peak_gib": held, "planned_gib": planned / GIB}
    if not np.isfinite(report.grad_norm):
        raise RuntimeError(f"the gradient is not finite: {found}")
    return found


STAGES: dict[str, Callable[[Path], Report]] = {
    stage.__name__: stage for stage in (environment, eager, graphs, slots, learner)
}


# --- the run ------------------------------------------------------------------------------------------------


def run_stage(name: str, folder: Path) -> Report:
    """Run a stage in a process of its own. Its report, or an "error"."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "tests.gpu.smoke", "--here", name, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=STAGE_S, check=False)
        lines = done.stdout.strip().splitlines()
        report: Report = json.loads(lines[-1]) if done.returncode == 0 else {"error": done.stderr[-2000:]}
    except subprocess.TimeoutExpired:
        report = {"error": f"not done within {STAGE_S} s"}
    return {"stage": name, "seconds": round(time.perf_counter() - began, 1), **report}


def main(words: list[str]) -> int:
    if words[:1] == ["--here"]:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            print(json.dumps(STAGES[words[1]](Path(words[2]))), flush=True)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # without waiting for vLLM's threads
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        failed = 0
        for name in words or STAGES:
            report = run_stage(name, Path(folder))
            print(json.dumps(report), flush=True)
            failed += "error" in report
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
