"""Small cells with made-up results, and a comparison over them, for the tests of the report and of what is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from actors.peak_memory import PeakMemory
from actors.types import Answer
from cluster.comparison.plan import Plan, Request, plan_cells
from cluster.comparison.prepare import Comparison
from cluster.comparison.store import CellResult, CellStore
from cluster.evaluate import EpisodeScore, RowResult
from configs.models import ResolvedModel
from tests.unit.cluster_cases import task_at

MODEL = ResolvedModel("tiny", Path("tiny"), "llama", 2, 64, 128, 2, 1, 32, 100, 512, True, (2,), "0123456789abcdef")


def plan(*rows: str, seeds: tuple[int, ...] = (0, 1), sweep: tuple[str, ...] = ()) -> Plan:
    return plan_cells(Request(Path("configs/quickstart.yaml"), (), None, rows, ("recall",), seeds, "", sweep, ""))


def comparison(folder: Path, planned: Plan, tasks: int = 3) -> Comparison:
    """Without a model or a basis: for what needs neither."""
    store = CellStore(folder / "cells", {"policy": "the base model"})
    listed = tuple(task_at(position) for position in range(tasks))
    keys = [cell.key for cell in planned.cells]
    return Comparison(planned, MODEL, None, folder, store, dict.fromkeys(keys, listed), dict.fromkeys(keys, folder / "basis"))


def scored(task: str, item: str, f1: float, category: str = "work", tokens: int = 100, context: int = 60, **parts: float) -> EpisodeScore:
    answer = Answer("Where?", ("here",), "here", category, {"f1": f1, "em": float(f1 == 1.0), "official_f1": f1 / 2})
    counts = {"accepted": 1, "empty": 0, "rolled_back": 0}
    return EpisodeScore(task, item, f1, {"f1": f1, **parts}, (answer,), counts, {"malformed": 1}, tokens, 20, context, 1.5)


def result(
    label: str, episodes: list[EpisodeScore], failed: tuple[str, ...] = (), resident: int | None = 512 * 2**20, problem: str = ""
) -> CellResult:
    return CellResult(RowResult(label, 0, tuple(episodes), failed), PeakMemory(resident, 0, problem))


def any_worker(worker: object) -> Any:
    return cast("Any", worker)
