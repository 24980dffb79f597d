"""What the documents say is there: links, commands, settings, metrics."""

from __future__ import annotations

import argparse
import ast
import fnmatch
import re
import shlex
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

from actors.engine.policy import EngineStats
from actors.engine.step_loop import PHASES
from actors.types import Boundary, TrajectoryGroup
from actors.worker import WorkerReport
from cluster.cli import command_line
from cluster.fleet.fleet import ElasticFleet, FleetPlan, phase_seconds
from cluster.fleet.ledger import Ledger, LedgerSnapshot
from cluster.fleet.stream import Batch
from cluster.measure.rows import RowResult, row_metrics, score_episode
from cluster.train.metrics import (
    StepSeconds,
    step_metrics,
    warm_start_metrics,
    worker_metrics,
    worker_timeline,
)
from cluster.train.report import STAGES
from cluster.train.step_checkpoints import METRICS
from configs.load import ConfigError, load_config
from configs.reference import PATH, reference, settings
from learner.types import StepReport, WarmStartReport
from tests.unit.cluster_cases import finished_group, task_at, trajectory

ROOT = Path(__file__).parents[2]
NAMES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "cluster/README.md",
    "infra/README.md",
    "configs/studies/README.md",
    "configs/REFERENCE.md",
)
DOCS = [ROOT / name for name in NAMES]


def _commands(text: str) -> list[list[str]]:
    """The words of each `python -m cluster ...` in the code blocks."""
    lines = [
        line
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [
        shlex.split(match[1]) for line in lines if (match := re.search(r"python -m cluster ([^#|]*)", line))
    ]


COMMANDS = [(doc.name, words) for doc in DOCS for words in _commands(doc.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_links_lead_to_files(doc: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", doc.read_text(encoding="utf-8"))
    assert [
        target for target in targets if not target.startswith("http") and not (doc.parent / target).exists()
    ] == []


@pytest.mark.parametrize(
    ("doc", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60]
)
def test_commands_are_understood(doc: str, words: list[str]) -> None:
    parser: argparse.ArgumentParser = command_line()
    options, rest = parser.parse_known_args(words)
    given = [*getattr(options, "overrides", []), *rest]
    if words[0] == "submit":
        given = [word for word in given if "=" in word]
    assert all("=" in word and not word.startswith("-") for word in given), given
    overrides = [word for word in given if not word.startswith(("checkpoint=", "resume="))]
    config = getattr(options, "config", None)
    shipped = config is not None and (ROOT / config).exists()
    try:
        load_config(ROOT / config if shipped else None, overrides)
    except ConfigError as error:  # without its file a setting may be out of bounds, but it must be one
        assert not shipped and "is not allowed" in str(error), error


def test_commands_in_the_text_exist() -> None:
    commands = next(
        action for action in command_line()._actions if isinstance(action, argparse._SubParsersAction)
    ).choices
    for doc in DOCS:
        assert set(re.findall(r"`python -m cluster ([a-z]+)", doc.read_text(encoding="utf-8"))) <= set(
            commands
        ), doc


def test_there_are_commands_to_check() -> None:
    assert {words[0] for _, words in COMMANDS} >= {"train", "evaluate", "probe"}
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_targets_of_make_are_there(doc: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = set(re.findall(r"^make ([a-z]+)|`make ([a-z]+)", doc.read_text(encoding="utf-8"), re.MULTILINE))
    assert [
        target
        for pair in wanted
        for target in pair
        if target and not re.search(rf"^{target}:", makefile, re.MULTILINE)
    ] == []


def test_settings_that_are_named_exist() -> None:
    sections = {key.split(".")[0] for key in settings() if "." in key}
    for doc in DOCS[:-1]:
        if doc.name == "CHANGELOG.md":  # of former names too
            continue
        named = re.findall(r"`([a-z_]+\.[a-z_.]+)(?:=[^`]*)?`", doc.read_text(encoding="utf-8"))
        files = (".py", ".yaml", ".md", ".json", ".jsonl", ".png", ".lock", ".txt")
        unknown = {
            key
            for key in named
            if key.split(".")[0] in sections and not key.endswith(files) and key not in settings()
        }
        assert {
            key for key in unknown if not any(known.startswith(key.rstrip(".")) for known in settings())
        } == set(), doc


def _zeros(kind: type[Any], **values: Any) -> Any:
    return kind(**({field.name: 0 for field in fields(kind)} | values))


def _logged() -> set[str]:
    """The names of a run's metrics, from the functions that give them to the tracker: what they leave out is in none. All but two sections, which
    hold what MLflow's monitor finds and what a probe is made of."""
    episode, report = trajectory(task_at(0), 0, 1.0, writes=("accepted",)), _zeros(StepReport, tokens=1)
    groups = TrajectoryGroup(task_at(0), 0, (episode,), (), "worker-0")
    ledger = Ledger(LedgerSnapshot(failures=dict.fromkeys(get_args(Boundary), 1)))
    stats = _zeros(EngineStats, seconds=dict.fromkeys(PHASES, 1.0))
    worker = _zeros(WorkerReport, name="worker-0", engine=stats)
    fleet = ElasticFleet((), FleetPlan(None, lambda: 0, 0, 1, 1.0, lambda text: None, in_flight=False), None)
    row = RowResult("row", 0, (score_episode(episode),), ())
    figures = [
        step_metrics(
            report, Batch((0,), (finished_group(groups),), (0,), 0), StepSeconds(1.0, 1.0, 1.0, 4.0), ledger
        ),
        worker_metrics([worker]),
        worker_timeline(phase_seconds({}, {"worker-0": worker})),
        fleet.metrics(),
        warm_start_metrics(_zeros(WarmStartReport)),
        *(row_metrics(row, key) for key in (*STAGES, METRICS)),
    ]
    return {name for some in figures for name in some}


def _named(text: str, root: Path) -> list[str]:
    """The metrics that a document names: all in backticks with a slash that is no place under ``root``; `/loss_after` is of the section before it."""
    named = []
    for line in re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines():
        section = ""
        for name in re.findall(r"`([a-z_]*(?:/[a-z0-9_*]+)+)`", line):
            if name.startswith("/") and section:
                named.append(section + name)
            elif not name.startswith("/") and not (root / name).exists():
                section = name.partition("/")[0]
                named.append(name)
    return named


def _unknown(named: Iterable[str]) -> list[str]:
    """Those that no run logs; `*` stands for the rest of a name."""
    logged = _logged()
    return [name for name in named if not fnmatch.filter(logged, name)]


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_metrics_that_are_named_exist(doc: Path) -> None:
    assert _unknown(_named(doc.read_text(encoding="utf-8"), ROOT)) == []


def test_there_are_metrics_to_check_and_a_wrong_one_is_found() -> None:
    table = (ROOT / "cluster/README.md").read_text(encoding="utf-8")
    assert len(set(_named(table, ROOT))) > 20 and {"fast_weights/writes", "timeline/worker_write"} <= set(
        _named(table, ROOT)
    )
    wrong = "`learner/ratio`, `learner/kl` by `/kls`, `learners/loss`, `timeline/worker_wait`, `fleet/gone*`, `reward/*`, `tests/unit`"
    assert _unknown(_named(wrong, ROOT)) == [
        "learner/ratio",
        "learner/kls",
        "learners/loss",
        "timeline/worker_wait",
        "fleet/gone*",
    ]
    for left_out in (
        "learner/seconds",
        "learner/version",
        "timeline/episode_total",
        "eval/after_rl/f2",
        "reward/nothing",
    ):
        assert _unknown([left_out]) == [left_out]


def _texts() -> str:
    """All text of the sources' messages; what an f-string puts in is cut out."""
    found = []
    for tree in (
        ast.parse(file.read_text(encoding="utf-8"))
        for room in ("cluster", "learner", "actors")
        for file in (ROOT / room).rglob("*.py")
    ):
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "\0".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def _quoted(table: str) -> list[str]:
    """The pieces of the messages in the first column: what lies between "...", and names and numbers that stand for others."""
    messages = [
        message
        for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
        for message in re.findall(r"`([^`]* [^`]*)`", row)
    ]
    pieces = [
        piece
        for message in messages
        for piece in re.split(r"\.\.\.|[:;,]|worker-0|\b[N0-9]\b|(task|the vLLM engine)", message)
    ]
    return [piece.strip() for piece in pieces if piece and re.search("[a-z]", piece)]


def test_messages_that_are_quoted_exist() -> None:
    table = (
        (ROOT / "cluster/README.md")
        .read_text(encoding="utf-8")
        .partition("## What is wrong")[2]
        .partition("\n## ")[0]
    )
    texts = _texts()
    assert len(_quoted(table)) > 10
    assert [piece for piece in _quoted(table) if piece not in texts] == []
    assert [
        piece
        for piece in _quoted("| `no bundle ... the cluster has ...` at the start | add nodes |")
        if piece not in texts
    ] == ["no bundle"]


def test_the_reference_is_of_this_schema() -> None:
    assert PATH.read_text(encoding="utf-8") == reference(), "run `make reference`"
