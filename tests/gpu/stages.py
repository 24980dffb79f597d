"""The stages of ``smoke`` without an engine of their own: machine, kernels, writer, learner, one RL step."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu.parts import Report, dtype, make_basis, on_gpu, random_cards, write_config

ROOT = Path(__file__).parents[2]
WRITES, BY_LOOP = 32, 4  # episodes that write at once, and those of the PEFT loop, one after the other
FARTHEST = 1e-2  # B of the writer from B of the loop in float32, of the norm of B: Adam enlarges roundings
SHARED_GPU = (
    "model.dtype=bfloat16",
    "learner.dtype=bfloat16",
    "rollout.gpus_per_worker=0.5",
    "learner.gpus_per_worker=0.5",
    "engine.kv_cache_gib=2",
)
"""The settings of the RL step's run on one GPU."""
STEP = (
    "objective.advantage=tests.integration.advantages:by_place",  # a reward of 0 would train nothing
    "train.steps=1",
    "train.tasks_per_step=2",
    "train.group_size=2",
    "warm_start.steps=0",
    "evaluation.tasks=2",
    "evaluation.bootstrap_samples=100",
    "evaluation.memory_off_row=false",
    "memory.max_extract_tokens=24",
    "engine.slots=4",
    "tracking.enabled=false",
    "ray.object_store_gib=0.5",
    "ray.startup_timeout_s=200",
)

FIGURES = {
    "step_s": "timing_s/step",
    "learner_s": "timing_s/learner",
    "publish_s": "sync/publish_s",
    "grad_norm": "learner/grad_norm",
    "reward": "reward/mean",
    "version": "sync/policy_version",
}
"""What the RL step reports, and what the run calls it."""


def environment(folder: Path, report: Report) -> None:
    """The machine and its software, as a benchmark's figures name them, and what ``doctor`` finds wrong."""
    import torch

    from cluster.bench.machine import describe
    from cluster.sizing.doctor import examine, installed

    report |= describe(threads=torch.get_num_threads())
    report |= {"triton": installed("triton"), "cuda": torch.version.cuda or ""}
    report["problems"] = [finding.problem for finding in examine() if finding.problem]


def kernels(folder: Path, report: Report) -> None:
    """vLLM's LoRA kernels against plain torch; on a CPU what stands in for them."""
    import torch

    from tests.gpu.kernels import QWEN3_4B, SMALL, check, microseconds

    if on_gpu():
        from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

        wrapper, device, large = PunicaWrapperGPU, torch.device("cuda"), QWEN3_4B
    else:
        from tests.gpu.emulation import gpu_wrapper

        wrapper, device, large = gpu_wrapper(), torch.device("cpu"), SMALL
    report["kernels"] = wrapper.__module__
    for name, sizes in (("small", SMALL), ("large", large)):
        found = check(wrapper, device, torch.bfloat16, sizes)
        report |= {f"{name}: {case}": error for case, error in found.items()}
    report |= microseconds(wrapper, device, torch.bfloat16, large)


def writer(folder: Path, report: Report) -> None:
    """The batched writer against a loop of stock PEFT: the same B in float32, and writes a second of both."""
    import numpy as np
    import torch

    from actors.write.writer import checkpoint_writer
    from cluster.bench.harness import timed
    from cluster.bench.writer import PeftLoop
    from cluster.sizing.memory import GIB

    device, basis, config = torch.device("cuda" if on_gpu() else "cpu"), make_basis(folder), write_config()
    count, by_loop = (WRITES, BY_LOOP) if on_gpu() else (4, 2)
    asked = random_cards(basis, count + 1)
    made = checkpoint_writer(str(folder), basis, config, dtype(), device)
    loop = PeftLoop(folder, basis, getattr(torch, dtype()), device)
    made.write(asked[count:])
    loop.write(asked[count:], config)
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    results: list[Any] = []
    report["writes_per_s"] = count / timed(lambda: results.extend(made.write(asked[:count]))).wall_s
    report["peak_gib"] = torch.cuda.max_memory_allocated() / GIB if on_gpu() else 0.0
    report["peft_writes_per_s"] = by_loop / timed(lambda: loop.write(asked[:by_loop], config)).wall_s
    report["over_peft"] = report["writes_per_s"] / report["peft_writes_per_s"]
    report["outcomes"] = sorted({result.outcome for result in results})
    report["loss"] = [
        float(np.mean([getattr(r, f"loss_{when}") for r in results])) for when in ("before", "after")
    ]
    if report["outcomes"] != ["accepted"]:
        raise RuntimeError(f"writes were refused: {next(r.reason for r in results if r.reason)}")

    wide = checkpoint_writer(str(folder), basis, config, "float32", device).write(asked[:by_loop])
    exact = PeftLoop(folder, basis, torch.float32, device).write(asked[:by_loop], config)
    report["float32_from_peft"] = max(
        _apart(one.weights.b, other) for one, other in zip(wide, exact, strict=True)
    )
    report["from_float32"] = max(
        _apart(one.weights.b, other.weights.b) for one, other in zip(results, wide, strict=False)
    )
    if not report["float32_from_peft"] <= FARTHEST:
        raise RuntimeError(
            f"the writer's B is not the loop's: {report['float32_from_peft']:.1e} of its norm off"
        )


def _apart(one: Any, other: Any) -> float:
    """The largest distance of a module's B, over its norm."""
    import numpy as np

    return max(float(np.linalg.norm(one[name] - other[name]) / np.linalg.norm(other[name])) for name in other)


def learner(folder: Path, report: Report) -> None:
    """Two steps of the learner, with the optimizer that a GPU gets; memory against the plan."""
    import numpy as np
    import torch

    from actors.types import TrajectoryGroup
    from cluster.sizing.memory import GIB, learner_parts, peak
    from configs.schema import LearnerConfig, ObjectiveConfig
    from configs.shapes import read_shape
    from learner.learner import Learner

    gpus, tokens = (1.0, 4096) if on_gpu() else (0.0, 128)
    config = LearnerConfig(dtype=dtype(), gpus_per_worker=gpus, microbatch_tokens=tokens)
    made = Learner(config, ObjectiveConfig(importance="none"), str(folder), make_basis(folder), 0, 1.0, 0, 1)
    episodes = (_episode(tokens, 0), _episode(tokens, 1))
    group = TrajectoryGroup(episodes[0].task, 0, episodes, (), "w")
    made.step([group])
    began = time.perf_counter()
    step = made.step([group])
    report |= {"step_s": time.perf_counter() - began, "grad_norm": step.grad_norm}
    planned = peak(learner_parts(read_shape(folder / "config.json", "smoke"), config, reference=False))
    held = torch.cuda.max_memory_allocated() if on_gpu() else 0
    report |= {"peak_gib": held / GIB, "planned_gib": planned / GIB}
    if not np.isfinite(step.grad_norm):
        raise RuntimeError("the gradient is not finite")


def _episode(tokens: int, seed: int) -> Any:
    """Of one segment, whose second half is sampled. The reward is the seed."""
    import numpy as np

    from actors.types import ActionSpan, Outcome, Segment, Task, Timings, Trajectory

    draw, mask = np.random.default_rng(seed), np.arange(tokens) >= tokens // 2
    ids = draw.integers(100, 1900, tokens).astype(np.int32)
    spans = (ActionSpan(tokens // 2, tokens, "act"),)
    segment = Segment(ids, mask, np.where(mask, -7.0, 0).astype(np.float32), 0, 0, spans)
    outcome, times = Outcome(float(seed), {}, ()), Timings(0, 0, 0, 0, 0, 0)
    task = Task("t", "recall", {}, 0)
    return Trajectory(task, f"e{seed}", 0, (segment,), (), (), {}, outcome, "done", times)


def rl(folder: Path, report: Report) -> None:
    """One step of ``engram train``: episodes that write, a learner step, a refresh; held-out tasks around it.

    The model is the one that comes with the install; a CPU takes a tiny one with its tokenizer.
    """
    from cluster.tracking.figure_file import read_figures

    settings = [*STEP, f"output_dir={folder / 'runs'}"]
    settings += SHARED_GPU if on_gpu() else [f"model.name={_tiny(folder)}", "learner.trainable_layers=3"]
    command = [sys.executable, "-m", "cluster", "train", str(ROOT / "tests" / "quickstart.yaml"), *settings]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"engram train ended with {ran.returncode}: {(ran.stdout + ran.stderr)[-1500:]}")
    (run,) = (folder / "runs").glob("*/figures.jsonl")
    figures = {name: value for logged in read_figures(run.parent) for name, value in logged.figures.items()}
    report |= {short: figures[name] for short, name in FIGURES.items() if name in figures}
    missing = sorted(set(FIGURES) - set(report))
    if missing or not report["grad_norm"] > 0 or report["version"] != 1:
        raise RuntimeError(f"the step trained nothing (missing: {', '.join(missing) or 'no figure'})")


def _tiny(folder: Path) -> Path:
    from configs.models import resolve_model
    from configs.schema import ModelConfig
    from tests.conftest import write_tiny_model

    (folder / "tiny").mkdir(exist_ok=True)
    return write_tiny_model(resolve_model(ModelConfig()).path, folder / "tiny")
