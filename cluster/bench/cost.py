"""The cost of an episode against the length of its history: full context beside TMEM.

    history (turns of filler) --> one question --> answer

memory off   the whole history is the prompt of the question
TMEM         a full context (L_max tokens) is extracted, written into the fast weights and cleared;
             the question is asked under the last revision

Both run through the real Rollout, engine and writer. Each cell has a fresh process (cost_episode.py).

Peak memory means what the episode needs: weights, activations, adapters, the writer, and the smallest KV
cache that admits its context. vLLM reserves its cache at the start, so each cell's engine gets exactly that
cache. The model's answers mean nothing here, above all past its window, and are not shown. Extractions are
scripted, so that every full context is a write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.bench.cost_episode import EPISODE_S, MIB, Cell, Cost, Episode, MemoryKind, Sizes
from cluster.bench.harness import child
from cluster.bench.values import Case, Context, Goal, Outcome
from cluster.measure.report import Curve, Panel, Table, save_plot

SIZES = Sizes(lengths=(1024, 2048, 4096, 8192, 16384, 32768), turn=128, limit=1024, extraction=96, answer=16)
QUICK = Sizes(lengths=(256, 1024), turn=64, limit=192, extraction=96, answer=16)
FLAT = 1.05


@dataclass(frozen=True, slots=True)
class Costs:
    """A cost for each length of ``sizes``, with full context and with TMEM."""

    sizes: Sizes
    full: tuple[Cost, ...]
    tmem: tuple[Cost, ...]


@contextmanager
def model_with_window(model_path: Path, tokens: int) -> Iterator[Path]:
    """A model folder whose window is at least ``tokens``.

    If the model's own is shorter: a temporary folder with links to its files and another config.json.
    """
    config = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    if config["max_position_embeddings"] >= tokens:
        yield model_path
        return
    with TemporaryDirectory(prefix="engram-cost-") as name:
        folder = Path(name)
        for file in model_path.iterdir():
            (folder / file.name).symlink_to(file.resolve())
        (folder / "config.json").unlink()
        longer = config | {"max_position_embeddings": tokens}
        (folder / "config.json").write_text(json.dumps(longer), encoding="utf-8")
        yield folder


def measure(cell: Cell) -> Cost:
    """Measure a cell in a process of its own."""
    with child(f"cost-{cell.memory}-{cell.length}", Episode, (cell,)) as episode:
        cost: Cost = episode.call("play", (), EPISODE_S + 600)
    return cost


def run(context: Context) -> Outcome:
    sizes = QUICK if context.quick else SIZES
    costs: dict[tuple[MemoryKind, int], Cost] = {}
    with model_with_window(context.model_path, sizes.lengths[-1] + 2 * sizes.limit) as model:
        # The costliest cell, full context at the greatest length, comes last.
        memories: tuple[MemoryKind, ...] = ("parametric", "none")
        for memory, length in product(memories, sizes.lengths):
            cost = costs[memory, length] = measure(Cell(memory, length, sizes, str(model), context.threads))
            _keep(context.folder / "cost-cells.jsonl", memory, length, cost)
    measured = Costs(
        sizes,
        full=tuple(costs["none", length] for length in sizes.lengths),
        tmem=tuple(costs["parametric", length] for length in sizes.lengths),
    )
    plot = _plot(measured, context.folder)
    return Outcome(_cases(measured), (_table(measured),), (plot,), _figures(measured))


def _keep(path: Path, memory: MemoryKind, length: int, cost: Cost) -> None:
    """Append a cell to a file at once: cells take minutes, and a failure must not take the others with it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"memory": memory, "length": length, **asdict(cost)}) + "\n")


def _cases(costs: Costs) -> tuple[Case, ...]:
    first, last = costs.sizes.lengths[0], costs.sizes.lengths[-1]
    full, tmem = costs.full, costs.tmem
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
        f"Of that {kept / MIB:.0f} are the revisions' B, which the trajectory keeps for the learner. "
        "The extraction's prompt also lists earlier flashcards, up to a limit that a first context does not "
        "reach. The rest is not traced. One run a cell, without repeats: they would take too long",
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
        "the KV cache of each engine is as large as its context needs, no more. "
        "On CPU a prompt runs in one step (chunked prefill is off, see actors/engine/start.py), "
        "so full context pays the activations of the whole history",
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
        f"one question; TMEM's seconds include {tmem[-1].writes} extractions, writes and receipts, "
        "which a second question would not pay again",
    )
    return flat, memory, seconds


def _table(costs: Costs) -> Table:
    def cells(cost: Cost) -> tuple[str, str, str]:
        return f"{cost.peak / MIB:.0f}", f"{cost.cache / MIB:.0f}", f"{cost.seconds:.1f}"

    rows = tuple(
        (str(length), *cells(full), *cells(tmem), str(tmem.writes), f"{tmem.adapter / MIB:.2f}")
        for length, full, tmem in zip(costs.sizes.lengths, costs.full, costs.tmem, strict=True)
    )
    off, tmem = ("off: peak MiB", "KV MiB", "s"), ("TMEM: peak MiB", "KV MiB", "s", "writes", "adapter MiB")
    limit = costs.sizes.limit
    title = f"cost of an episode by tokens of history (memory off: full context; TMEM: L_max {limit})"
    return Table(title, ("history", *off, *tmem), rows)


def _figures(costs: Costs) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, column in (("off", costs.full), ("tmem", costs.tmem)):
        for length, cost in zip(costs.sizes.lengths, column, strict=True):
            figures |= {
                f"{name}_peak_mib_{length}": cost.peak / MIB,
                f"{name}_s_{length}": cost.seconds,
                f"{name}_cpu_s_{length}": cost.cpu_s,
            }
    return figures


def _plot(costs: Costs, folder: Path) -> Path:
    """Draw memory and seconds against the length."""
    lengths = costs.sizes.lengths
    columns = {
        "memory off (full context)": costs.full,
        f"TMEM (L_max {costs.sizes.limit})": costs.tmem,
    }
    figures = {
        "peak memory, MiB": [[cost.peak / MIB for cost in column] for column in columns.values()],
        "seconds per episode": [[cost.seconds for cost in column] for column in columns.values()],
    }
    ticks = {length: f"{length // 1024}k" if length % 1024 == 0 else str(length) for length in lengths}
    panels = [
        Panel(
            "tokens of history",
            y_label,
            tuple(
                Curve(lengths, ys, series, label, "dots")
                for series, (label, ys) in enumerate(zip(columns, values, strict=True))
            ),
            y_range=(0.0, None),
            log_x=True,
            ticks=ticks,
        )
        for y_label, values in figures.items()
    ]
    return save_plot(panels, folder / "cost.png")
