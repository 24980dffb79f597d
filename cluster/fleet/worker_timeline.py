"""Where the workers' time went between two of their reports."""

from __future__ import annotations

from collections.abc import Mapping

from actors.engine.step_loop import PHASES
from actors.worker import WorkerReport


def worker_timeline(
    before: Mapping[str, WorkerReport], after: Mapping[str, WorkerReport]
) -> dict[str, float]:
    """Between two reports of each worker; one that is new or was replaced counts from its start. Empty when no time has passed."""
    spent: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    for name, report in after.items():
        earlier = before[name].engine.seconds if name in before else {}
        restarted = any(seconds > report.engine.seconds.get(phase, 0.0) for phase, seconds in earlier.items())
        for phase, seconds in report.engine.seconds.items():
            spent[phase] += seconds if restarted else seconds - earlier.get(phase, 0.0)
    return fractions("worker", spent)


def fractions(view: str, seconds: Mapping[str, float]) -> dict[str, float]:
    total = sum(seconds.values())
    return (
        {f"timeline/{view}_{phase}": value / total for phase, value in seconds.items()} if total > 0 else {}
    )
