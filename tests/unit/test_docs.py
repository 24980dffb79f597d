"""What the documents say is there: links, commands, settings, metrics."""

from __future__ import annotations

import ast
import fnmatch
import re
import shlex
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typer
from typer.main import get_command

from actors.engine.policy import EngineStats
from actors.engine.step_loop import PHASES
from actors.environments.recall_questions import KINDS
from actors.episodes.teacher import Teaching
from actors.types import Boundary, CardUse, Flashcard, TrajectoryGroup
from actors.worker import WorkerReport
from cluster.cli import app, main
from cluster.fleet.broadcast import ObjectStoreChannel
from cluster.fleet.collective import CollectiveChannel
from cluster.fleet.fleet import ElasticFleet, FleetPlan, phase_seconds
from cluster.fleet.ledger import Ledger, LedgerSnapshot
from cluster.fleet.stream import Batch
from cluster.measure.row_metrics import row_metrics
from cluster.measure.rows import RowResult, score_episode
from cluster.train.curriculum import Curriculum
from cluster.train.metrics import (
    StepSeconds,
    step_metrics,
    warm_start_metrics,
    worker_metrics,
    worker_timeline,
)
from cluster.train.report import STAGES
from cluster.train.step_checkpoints import METRICS
from configs.curriculum import stages
from configs.load import ConfigError, Layer, load_config
from configs.reference import PATH, reference, settings
from configs.shipped import shipped
from learner.types import StepReport, WarmStartReport
from tests.unit.cluster_cases import finished_group, task_at, trajectory

ROOT = Path(__file__).parents[2]
ROOMS = ("actors", "cluster", "configs", "infra", "learner")
DOCS = [*sorted(ROOT.glob("*.md")), *(doc for room in ROOMS for doc in sorted((ROOT / room).rglob("*.md")))]
CALL = r"(?:python -m cluster|engram)"
CLI = get_command(app)


def _commands(text: str) -> list[list[str]]:
    """The words of each `engram ...` or `python -m cluster ...` in the code blocks."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    calls = [match[1] for line in lines for match in re.finditer(rf"(?:^|[\s;]){CALL} ([^#|;]*)", line)]
    return [shlex.split(call) for call in calls]


COMMANDS = [(doc.name, words) for doc in DOCS for words in _commands(doc.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_links_lead_to_files(doc: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", doc.read_text(encoding="utf-8"))
    places = [target for target in targets if not target.startswith("http")]
    assert [place for place in places if not (doc.parent / place).exists()] == []


def _named(value: object) -> str:
    return value if isinstance(value, str) else " ".join(value)[:60]  # type: ignore[arg-type]


@pytest.mark.parametrize(("doc", "words"), COMMANDS, ids=_named)
def test_commands_are_understood(doc: str, words: list[str]) -> None:
    try:
        given = CLI.commands[words[0]].make_context(words[0], words[1:]).params  # type: ignore[attr-defined]
    except typer.Exit:  # --help, --settings
        return
    overrides = given.get("settings") or []
    if words[0] == "submit":
        overrides = [word for word in given["arguments"] if "=" in word and not word.startswith("-")]
    overrides = [word for word in overrides if not word.startswith(("checkpoint=", "resume="))]
    config = str(given.get("config") or "")
    path = shipped().get(config, ROOT / config)
    try:
        load_config(path if path.is_file() else None, overrides)
    except ConfigError as error:  # without its file a setting may be out of bounds, but it must be a setting
        assert not path.is_file() and "is not allowed" in str(error), error


RUN_AT_ONCE = [
    words
    for _, words in COMMANDS
    if (words[0] in ("plan", "doctor", "try") or {"--settings", "--print-config"} & {*words})
    and "my_" not in " ".join(words)  # of the reader's own module
]


@pytest.mark.parametrize("words", RUN_AT_ONCE, ids=_named)
def test_commands_that_need_no_engine_run(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    own = ["model.name=smollm2-135m"] if words[0] == "plan" else []  # not the hub's: tests run without it
    assert main([*words, *own]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) > 5 and shown.err == ""


def test_there_are_commands_to_run() -> None:
    assert {words[0] for words in RUN_AT_ONCE} >= {"plan", "try", "train"}


def test_commands_in_the_text_exist() -> None:
    for doc in DOCS:
        named = set(re.findall(rf"`{CALL} ([a-z]+)", doc.read_text(encoding="utf-8")))
        assert named <= set(CLI.commands), doc  # type: ignore[attr-defined]


def test_there_are_commands_to_check() -> None:
    assert {words[0] for _, words in COMMANDS} >= {"train", "evaluate", "probe"}
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_targets_of_make_are_there(doc: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = set(re.findall(r"(?:^|`)make ([a-z-]+)", doc.read_text(encoding="utf-8"), re.MULTILINE))
    assert wanted <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def test_settings_that_are_named_exist() -> None:
    sections = {key.split(".")[0] for key in settings() if "." in key}
    for doc in DOCS:
        if doc.name in ("CHANGELOG.md", PATH.name):  # former names; the settings themselves
            continue
        named = re.findall(r"`([a-z_]+\.[a-z_.]+)(?:=[^`]*)?`", doc.read_text(encoding="utf-8"))
        files = (".py", ".yaml", ".md", ".json", ".jsonl", ".png", ".lock", ".txt")
        keys = {key for key in named if key.split(".")[0] in sections and not key.endswith(files)}
        known = {key for key in keys if any(setting.startswith(key.rstrip(".")) for setting in settings())}
        assert keys - known == set(), doc


def test_values_that_are_named_are_allowed() -> None:
    """Of settings with a list of values."""
    checked = 0
    for doc in DOCS:
        if doc.name in ("CHANGELOG.md", PATH.name):  # former values; the settings themselves
            continue
        for key, value in re.findall(r"`([a-z_]+\.[a-z_.]+)=([a-z_]+)[` ]", doc.read_text(encoding="utf-8")):
            if key in settings() and get_origin(settings()[key].kind) is Literal:
                assert value in get_args(settings()[key].kind), (doc, key)
                checked += 1
    assert checked > 10


def test_memory_rows_are_given_with_their_policies() -> None:
    text = (ROOT / "actors" / "README.md").read_text(encoding="utf-8")
    table = text.split("| row (`configs/rows/`) | `memory.policy` |")[1].split("\n\n")[0]
    cells = [
        [re.findall(r"`(\w+)`", cell) for cell in line.split("|")[1:3]] for line in table.splitlines()[2:]
    ]
    pairs = [pair for rows, policies in cells for pair in zip(rows, policies, strict=True)]
    allowed = ("memory.", "write.", "fast_weights.")
    for row, policy in pairs:
        layer = Layer(shipped("rows")[row], "row", allowed)
        assert load_config(None, [], [layer]).memory.policy == policy, row
    assert len(pairs) == 13


def _zeros(kind: type[Any], **values: Any) -> Any:
    return kind(**({field.name: 0 for field in fields(kind)} | values))


def _logged() -> set[str]:
    """The names of a run's metrics, from the functions that give them to the tracker.

    Two sections are missing: what MLflow's monitor finds, and what a probe is made of.
    """
    episode, report = trajectory(task_at(0), 0, 1.0, writes=("accepted",)), _zeros(StepReport, tokens=1)
    card = replace(
        episode.writes[0], flashcards=(Flashcard("Where?", "here"),), uses=(CardUse((0,), right=True),)
    )
    parts = {**episode.outcome.reward_parts, **dict.fromkeys(KINDS, 0.0)}  # recall's
    task = replace(task_at(0), member="mine")  # of an environment.mix
    outcome = replace(episode.outcome, reward_parts=parts)
    episode = replace(episode, task=task, writes=(card,), outcome=outcome)
    groups = TrajectoryGroup(task, 0, (episode,), (), "worker-0")
    ledger = Ledger(LedgerSnapshot(failures=dict.fromkeys(get_args(Boundary), 1)))
    stats = _zeros(EngineStats, seconds=dict.fromkeys(PHASES, 1.0))
    worker = _zeros(WorkerReport, name="worker-0", engine=stats)
    fleet = ElasticFleet((), FleetPlan(None, lambda: 0, 0, 1, 1.0, lambda text: None, in_flight=False), None)
    nobody: Any = None
    row = RowResult("row", 0, (score_episode(episode),), ())
    batch = Batch((0,), (finished_group(groups),), (0,), 0)
    figures = [
        step_metrics(report, batch, StepSeconds(1.0, 1.0, 1.0, 4.0), ledger),
        worker_metrics([worker]),
        worker_timeline(phase_seconds({}, {"worker-0": worker})),
        fleet.metrics(),
        CollectiveChannel(ObjectStoreChannel(False), nobody, list, "gloo", print).metrics(),
        warm_start_metrics(
            _zeros(WarmStartReport), {f"teacher_{name}": 0.0 for name in Teaching().figures()}
        ),
        _stage_figures(),
        *(row_metrics(row, key) for key in (*STAGES, METRICS)),
    ]
    return {name for metrics in figures for name in metrics}


def _stage_figures() -> dict[str, float]:
    config = load_config(None, ["curriculum.stages=[{}]"])
    curriculum = Curriculum(task_at, stages(config), [task_at])
    curriculum.task_at(0)
    return curriculum.after_step(1, {}, [0])


def _metrics(text: str, root: Path) -> list[str]:
    """The metrics that a document names: words in backticks with a slash that are no place under ``root``.

    `/loss_after` belongs to the section of the metric before it in the line.
    """
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
    """The metrics that no run logs. `*` stands for the rest of a name."""
    logged = _logged()
    return [name for name in named if not fnmatch.filter(logged, name)]


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_metrics_that_are_named_exist(doc: Path) -> None:
    assert _unknown(_metrics(doc.read_text(encoding="utf-8"), ROOT)) == []


def test_there_are_metrics_to_check_and_a_wrong_one_is_found() -> None:
    table = (ROOT / "cluster/README.md").read_text(encoding="utf-8")
    named = set(_metrics(table, ROOT))
    assert len(named) > 20 and {"fast_weights/writes", "timeline/worker_write"} <= named
    right = "`learner/kl`, `reward/*`, `tests/unit`"
    wrong = "`learner/ratio`, `learner/kl` by `/kls`, `learners/loss`, `timeline/worker_wait`, `fleet/gone*`"
    not_logged = ["learner/ratio", "learner/kls", "learners/loss", "timeline/worker_wait", "fleet/gone*"]
    assert _unknown(_metrics(f"{right}, {wrong}", ROOT)) == not_logged
    left_out = ["learner/seconds", "timeline/episode_total", "eval/after_rl/f2", "reward/nothing"]
    assert _unknown([*left_out, "learner/version"]) == [*left_out, "learner/version"]


def _texts() -> str:
    """All texts of the sources, for the messages among them. What an f-string inserts is cut out."""
    texts = []
    for file in (file for room in ("cluster", "learner", "actors") for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) for part in node.values if isinstance(part, ast.Constant)]
                texts.append("\0".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def _quoted(table: str) -> list[str]:
    """The pieces of the messages in the first column, between "..." and names and numbers that vary."""
    rows = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]* [^`]*)`", row)]
    between = re.compile(r"\.\.\.|[:;,]|worker-0|\b[N0-9]\b|(task|the vLLM engine)")
    pieces = [piece for message in messages for piece in between.split(message)]
    return [piece.strip() for piece in pieces if piece and re.search("[a-z]", piece)]


def test_messages_that_are_quoted_exist() -> None:
    text = (ROOT / "cluster/README.md").read_text(encoding="utf-8")
    table = text.partition("## What is wrong")[2].partition("\n## ")[0]
    texts = _texts()
    assert len(_quoted(table)) > 10
    assert [piece for piece in _quoted(table) if piece not in texts] == []
    invented = _quoted("| `no bundle ... the cluster has ...` at the start | add nodes |")
    assert [piece for piece in invented if piece not in texts] == ["no bundle"]


def test_the_reference_is_of_this_schema() -> None:
    assert PATH.read_text(encoding="utf-8") == reference(), "run `make reference`"
