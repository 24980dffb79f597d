"""The outcome of benchmarks for people and machines: terminal tables, Markdown, JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from cluster.bench.values import Case, Outcome, Spread

HEADER = ("case", "baseline", "candidate", "ratio [quartiles]", "goal", "")


def case_cells(case: Case) -> tuple[str, ...]:
    """One line of the table, in the order of HEADER."""
    ratios = case.ratios
    goal = "-" if case.goal is None else f"{case.goal.sense} {case.goal.value:g}"
    verdict = "" if case.goal is None else ("met" if case.goal.met(ratios.median) else "MISSED")
    return (
        case.name,
        f"{case.baseline}: {_with_unit(Spread.of(case.baseline_values), case.unit)}",
        f"{case.candidate}: {_with_unit(Spread.of(case.candidate_values), case.unit)}",
        f"{case.ratio} {ratios.median:.3g} [{ratios.low:.3g}, {ratios.high:.3g}]",
        goal,
        verdict,
    )


def metrics(name: str, outcome: Outcome) -> dict[str, float]:
    """For the tracker: the median ratio of each case, and the figures."""
    found = {f"bench/{name}/{_key(case.name)}": case.ratios.median for case in outcome.cases}
    return found | {f"bench/{name}/{_key(key)}": value for key, value in outcome.figures.items()}


def markdown(facts: Mapping[str, str], outcomes: Mapping[str, Outcome], abouts: Mapping[str, str]) -> str:
    lines = ["# Benchmarks", "", *(f"- {key}: {value}" for key, value in facts.items())]
    for name, outcome in outcomes.items():
        lines += ["", f"## {name}", "", f"{abouts[name]}.", ""]
        if outcome.cases:
            lines += _table(HEADER, [case_cells(case) for case in outcome.cases])
            lines += ["", *(f"- {case.name}: {case.note}" for case in outcome.cases if case.note)]
        for table in outcome.tables:
            lines += ["", f"{table.title}:", "", *_table(table.header, list(table.rows))]
        lines += ["", *(f"![{plot.stem}]({plot.name})" for plot in outcome.plots)]
    return "\n".join(lines).rstrip() + "\n"


def as_json(facts: Mapping[str, str], outcomes: Mapping[str, Outcome]) -> str:
    """Every value that was measured, not only the medians."""
    benchmarks = {
        name: {
            "cases": [{**asdict(case), "ratios": asdict(case.ratios)} for case in outcome.cases],
            "figures": dict(outcome.figures),
            "tables": [asdict(table) for table in outcome.tables],
            "plots": [plot.name for plot in outcome.plots],
        }
        for name, outcome in outcomes.items()
    }
    return json.dumps({"environment": dict(facts), "benchmarks": benchmarks}, indent=1)


def save(
    folder: Path, facts: Mapping[str, str], outcomes: Mapping[str, Outcome], abouts: Mapping[str, str]
) -> list[Path]:
    """report.md and report.json, written after each benchmark, so that a run which is stopped keeps what it measured."""
    report, data = folder / "report.md", folder / "report.json"
    report.write_text(markdown(facts, outcomes, abouts), encoding="utf-8")
    data.write_text(as_json(facts, outcomes), encoding="utf-8")
    return [report, data]


def _with_unit(spread: Spread, unit: str) -> str:
    return f"{spread.median:.4g} {unit}"


def _key(name: str) -> str:
    """A name that MLflow takes."""
    return "".join(
        character if character.isalnum() or character in "_-. " else "_" for character in name
    ).replace(" ", "_")


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [header, ("---",) * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
