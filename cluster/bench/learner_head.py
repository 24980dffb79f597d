"""Peak memory and time of many tokens' log-probs, forward and backward, a process for each size: full logits, torch's chunked loss, ours."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.bench.harness import child
from cluster.bench.memory import peak_above
from cluster.bench.values import BenchError
from cluster.measure.report import Table

Way = Literal["full logits", "torch's chunked loss", "TokenHead"]
WAYS: tuple[Way, ...] = ("full logits", "torch's chunked loss", "TokenHead")
_LONGEST_S = 900.0
_TORCH_CHUNK = 128  # tokens, about TokenHead's; torch's own pick is a few at these vocabularies, and many times as slow on a CPU
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class HeadSize:
    """``trained``: whether the head's weight needs a gradient (learner.trainable=full) or is frozen (last_layers)."""

    tokens: int
    width: int
    vocabulary: int
    trained: bool


@dataclass(frozen=True, slots=True)
class HeadCost:
    """``peak``: bytes above states, weight and targets. ``difference``: of the summed log-probs from those of full logits, relative (0 for those)."""

    peak: int
    wall_s: float
    cpu_s: float
    total: float


class Head:
    """What the child holds: random states and weight of one size."""

    def __init__(self, size: HeadSize, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self._layer = torch.nn.Linear(size.width, size.vocabulary, bias=False).requires_grad_(size.trained)
        self._states = torch.randn(size.tokens, size.width).requires_grad_(True)
        self._targets = torch.randint(size.vocabulary, (size.tokens,))

    def measure(self, way: Way) -> HeadCost:
        """Forward and backward, once after a small warm-up. Raises BenchError where peaks cannot be measured (memory.why_unmeasurable)."""
        self._run(way, slice(0, 2))  # imports, thread pools
        self._layer.weight.grad = self._states.grad = None

        def once() -> tuple[float, float, float]:
            wall, cpu = time.perf_counter(), time.process_time()
            total = self._run(way, slice(None))
            return time.perf_counter() - wall, time.process_time() - cpu, total

        (wall_s, cpu_s, total), peak = peak_above(once)
        self._layer.weight.grad = self._states.grad = None  # theirs is the next way's memory
        return HeadCost(peak, wall_s, cpu_s, total)

    def _run(self, way: Way, part: slice) -> float:
        import torch
        from torch.nn import LinearCrossEntropyOptions
        from torch.nn.functional import linear_cross_entropy

        from learner.head import TokenHead

        states, targets, weight = self._states[part], self._targets[part], self._layer.weight
        if way == "TokenHead":
            logp = TokenHead(self._layer)(states, targets, 1.0)[0]
        elif way == "full logits":
            logp = self._layer(states).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        else:
            logp = -linear_cross_entropy(
                states,
                weight,
                targets,
                reduction="none",
                options=LinearCrossEntropyOptions(batch_chunk_size=_TORCH_CHUNK),
            )
        total: torch.Tensor = logp.sum()
        total.backward()
        return float(total.detach())


def head_table(
    sizes: tuple[HeadSize, ...], threads: int
) -> tuple[Table, dict[tuple[HeadSize, Way], HeadCost]]:
    """Every way at every size. Raises BenchError when two ways disagree by more than rounding."""
    costs: dict[tuple[HeadSize, Way], HeadCost] = {}
    for size in sizes:
        with child(f"log-probs at {size.vocabulary}", Head, (size, threads)) as process:
            costs |= {(size, way): process.call("measure", (way,), _LONGEST_S) for way in WAYS}
    rows = []
    for (size, way), cost in costs.items():
        plain = costs[size, "full logits"]
        if abs(cost.total - plain.total) > 1e-4 * abs(plain.total):
            raise BenchError(
                f"{way} at {size}: the log-probs sum to {cost.total}, full logits to {plain.total}; learner/head.py is wrong"
            )
        head = "trained" if size.trained else "frozen"
        share, slower = cost.peak / plain.peak, cost.cpu_s / plain.cpu_s
        rows.append(
            (
                f"{size.vocabulary}",
                head,
                way,
                f"{cost.peak / _MIB:.0f}",
                f"{share:.2f}",
                f"{cost.cpu_s:.2f}",
                f"{slower:.2f}",
            )
        )
    header = (
        "vocabulary",
        "head",
        "log-probs by",
        "peak MiB above inputs",
        "of full logits",
        "CPU s",
        "of full logits",
    )
    title = (
        f"Log-probs of {sizes[0].tokens:,} tokens at width {sizes[0].width}, forward and backward, float32"
    )
    return Table(title, header, tuple(rows)), costs


def head_plot(costs: dict[tuple[HeadSize, Way], HeadCost], folder: Path) -> Path:
    """Bars of peak memory, a group for each size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    sizes = list(dict.fromkeys(size for size, _ in costs))
    for place, way in enumerate(WAYS):
        heights = [costs[size, way].peak / _MIB for size in sizes]
        axes.bar(
            [number + (place - 1) * 0.27 for number in range(len(sizes))], heights, width=0.25, label=way
        )
    axes.set_xticks(
        range(len(sizes)), [f"{size.vocabulary}\n{'trained' if size.trained else 'frozen'}" for size in sizes]
    )
    axes.set_xlabel("vocabulary and head")
    axes.set_ylabel("peak MiB above inputs")
    axes.legend(frameon=False)
    FigureCanvasAgg(figure)
    path = folder / "learner-head-memory.png"
    figure.savefig(path)
    return path
