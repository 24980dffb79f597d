"""What an episode costs against the length of its history: everything kept in the context, beside TMEM, which never holds more than L_max.

    history (turns of filler) --> one question --> answer          both through the real Rollout, engine and writer; one fresh process a cell
    memory off   the whole history is the prompt of the question
    TMEM         full contexts are extracted, written into the fast weights and cleared; the question is asked under the last revision

Peak memory means what the episode needs: the least KV cache that admits its context (vLLM reserves its cache at the start, so each cell's engine gets
exactly that), with weights, activations, adapters and the writer. What the model says is meaningless here, past its window above all, and not shown;
the engine samples as many tokens as a scripted extraction has, and the script's flashcards are written, so that every full context is a write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.bench.cost_episode import EPISODE_S, MIB, Cell, Cost, Episode, MemoryKind, Sizes
from cluster.bench.harness import child
from cluster.bench.values import Case, Context, Goal, Outcome
from cluster.measure.report import Table

SIZES = Sizes(lengths=(1024, 2048, 4096, 8192, 16384, 32768), turn=128, limit=1024, extraction=96, answer=16)
QUICK = Sizes(lengths=(256, 1024), turn=64, limit=192, extraction=96, answer=16)
FLAT = 1.05
MEMORIES: tuple[MemoryKind, ...] = ("none", "parametric")


@contextmanager
def model_with_window(model_path: Path, tokens: int) -> Iterator[Path]:
    """The model's folder, or a temporary one with links to its files and a config.json whose window is ``tokens``, where its own is shorter."""
    config = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    if config["max_position_embeddings"] >= tokens:
        yield model_path
        return
    with TemporaryDirectory(prefix="engram-cost-") as name:
        folder = Path(name)
        for file in model_path.iterdir():
            (folder / file.name).symlink_to(file.resolve())
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(
            json.dumps(config | {"max_position_embeddings": tokens}), encoding="utf-8"
        )
        yield folder


def measure(cell: Cell) -> Cost:
    """In a process of its own."""
    with child(f"cost-{cell.memory}-{cell.length}", Episode, (cell,)) as episode:
        cost: Cost = episode.call("play", (), EPISODE_S + 600)
    return cost


def run(context: Context) -> Outcome:
    sizes = QUICK if context.quick else SIZES
    with model_with_window(context.model_path, sizes.lengths[-1] + 2 * sizes.limit) as model:
        costs: dict[tuple[MemoryKind, int], Cost] = {}
        for memory, length in product(
            MEMORIES[::-1], sizes.lengths
        ):  # the costliest cell, full context at the greatest length, comes last
            costs[memory, length] = measure(Cell(memory, length, sizes, str(model), context.threads))
            _keep(context.folder / "cost-cells.jsonl", memory, length, costs[memory, length])
    full = [costs["none", length] for length in sizes.lengths]
    tmem = [costs["parametric", length] for length in sizes.lengths]
    return Outcome(
        _cases(sizes, full, tmem),
        (_table(sizes, full, tmem),),
        (_plot(sizes, full, tmem, context.folder),),
        _figures(sizes, full, tmem),
    )


def _keep(path: Path, memory: MemoryKind, length: int, cost: Cost) -> None:
    """Cells take minutes: one that fails must not take the others with it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"memory": memory, "length": length, **asdict(cost)}) + "\n")


def _cases(sizes: Sizes, full: list[Cost], tmem: list[Cost]) -> tuple[Case, ...]:
    first, last = sizes.lengths[0], sizes.lengths[-1]
    off_growth, growth = full[-1].peak - full[0].peak, tmem[-1].peak - tmem[0].peak
    kept = (tmem[-1].writes - tmem[0].writes) * tmem[0].adapter
    flat = Case(
        f"peak memory of TMEM, history {last / first:g} times as long",
        f"TMEM, {first} tokens",
        f"TMEM, {last} tokens",
        "MiB",
        (tmem[0].peak / MIB,),
        (tmem[-1].peak / MIB,),
        "candidate/baseline",
        Goal("at most", FLAT),
        f"flat means {FLAT:g}; memory off grows by {off_growth / MIB:.0f} MiB, TMEM by {growth / MIB:.0f}. "
        f"Of that the revisions' B, which the trajectory keeps for the learner, are {kept / MIB:.0f}; "
        "the extraction's prompt also lists earlier flashcards, up to a limit that a first context does not reach; the rest is not traced. "
        "One run a cell, no repeats: the whole takes too long for them",
    )
    memory = Case(
        f"peak memory at {last} tokens",
        "memory off",
        "TMEM",
        "MiB",
        (full[-1].peak / MIB,),
        (tmem[-1].peak / MIB,),
        "baseline/candidate",
        None,
        "the KV cache of each engine is as large as its context needs, no more; on CPU a prompt runs in one step (chunked prefill is off there, see "
        "actors/engine/start.py), so the activations of the whole history are part of what full context costs",
    )
    seconds = Case(
        f"an episode at {last} tokens",
        "memory off",
        "TMEM",
        "s",
        (full[-1].seconds,),
        (tmem[-1].seconds,),
        "baseline/candidate",
        None,
        f"one question; TMEM's seconds include {tmem[-1].writes} extractions, writes and receipts, which a second question would not pay again",
    )
    return flat, memory, seconds


def _table(sizes: Sizes, full: list[Cost], tmem: list[Cost]) -> Table:
    header = (
        "history",
        "off: peak MiB",
        "KV MiB",
        "s",
        "TMEM: peak MiB",
        "KV MiB",
        "s",
        "writes",
        "adapter MiB",
    )
    rows = tuple(
        (str(length), *_cells(off), *_cells(on), str(on.writes), f"{on.adapter / MIB:.2f}")
        for length, off, on in zip(sizes.lengths, full, tmem, strict=True)
    )
    return Table(
        f"cost of an episode by tokens of history (memory off: full context; TMEM: L_max {sizes.limit})",
        header,
        rows,
    )


def _cells(cost: Cost) -> tuple[str, str, str]:
    return f"{cost.peak / MIB:.0f}", f"{cost.cache / MIB:.0f}", f"{cost.seconds:.1f}"


def _figures(sizes: Sizes, full: list[Cost], tmem: list[Cost]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, costs in (("off", full), ("tmem", tmem)):
        for length, cost in zip(sizes.lengths, costs, strict=True):
            figures |= {
                f"{name}_peak_mib_{length}": cost.peak / MIB,
                f"{name}_s_{length}": cost.seconds,
                f"{name}_cpu_s_{length}": cost.cpu_s,
            }
    return figures


def _plot(sizes: Sizes, full: list[Cost], tmem: list[Cost], folder: Path) -> Path:
    """Memory and seconds against the length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, name, value in zip(
        figure.subplots(1, 2),
        ("peak memory, MiB", "seconds per episode"),
        (lambda cost: cost.peak / MIB, lambda cost: cost.seconds),
        strict=True,
    ):
        axes.plot(
            sizes.lengths, [value(cost) for cost in full], marker="o", label="memory off (full context)"
        )
        axes.plot(
            sizes.lengths, [value(cost) for cost in tmem], marker="o", label=f"TMEM (L_max {sizes.limit})"
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(
            sizes.lengths,
            [f"{length // 1024}k" if length % 1024 == 0 else str(length) for length in sizes.lengths],
        )
        axes.set_xlabel("tokens of history")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    path = folder / "cost.png"
    FigureCanvasAgg(figure)
    figure.savefig(path)
    return path
