"""Foreign folders run no code, and foreign texts do not write the terminal."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cluster.assistant.opening import BASIS_FILE, COMPANION
from cluster.cli import main
from cluster.common.display import Display
from cluster.common.quiet import quiet
from cluster.evaluation.command import REQUEST_FILE
from cluster.inspection.watch import look, view
from cluster.measure.report import Document, Section, Table, show
from cluster.tracking.figure_file import FigureFile
from cluster.tracking.registry import dataset_values
from cluster.tracking.tracker import start_tracking
from configs.bounds import BoundError
from configs.foreign import code_in, refuse_code
from configs.load import ConfigError, load_config, to_yaml
from configs.reference import settings
from configs.schema import RunConfig

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eabc"
MCP = ("environment.mcp.path=a.jsonl", "environment.mcp.servers={s: {command: [sh]}}")
EVIL = (
    "from pathlib import Path\nPath({sentinel!r}).write_text('ran')\ndef build(options): raise ValueError\n"
)


# --- code ---------------------------------------------------------------------------------------------------


def test_a_model_that_asks_for_its_own_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    companion = tmp_path / "model" / COMPANION
    companion.mkdir(parents=True)
    (companion / BASIS_FILE).touch()
    (companion / "config.yaml").write_text(
        "memory: {policy: parametric}\nmodel: {name: x, trust_remote_code: true}"
    )
    for command in ("chat", "serve"):
        assert main([command, str(companion.parent)]) == 2
        error = capsys.readouterr().err
        assert "model.trust_remote_code=true" in error and "--allow-code" in error and error.count("\n") == 1
    for trust in (["--allow-code"], ["model.trust_remote_code=false"], ["model.trust_remote_code=true"]):
        assert main(["chat", str(companion.parent), *trust]) == 2
        assert "config.json" in capsys.readouterr().err  # the next thing that is wrong with the folder


def test_a_foreign_evaluation_imports_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sentinel = tmp_path / "ran"
    (tmp_path / "evil_tasks.py").write_text(EVIL.format(sentinel=str(sentinel)))
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tmp_path / "config.yaml"
    config.write_text("environment: {name: custom, custom: 'evil_tasks:build'}")
    asked = {
        **{key: [] for key in ("overrides", "rows", "benchmarks", "seeds", "sweep")},
        "config": str(config),
        "checkpoint": None,
        "baseline": "",
        "resume": "",
    }
    (tmp_path / REQUEST_FILE).write_text(json.dumps(asked))
    load_config(config, [])
    assert main(["evaluate", "--resume", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "environment.custom=evil_tasks:build" in error and "--allow-code" in error
    assert not sentinel.exists()
    assert main(["evaluate", "--resume", str(tmp_path), "--allow-code"]) == 2
    assert sentinel.exists()


def test_every_setting_that_names_code_is_known() -> None:
    """A new one makes this fail: ``code_in`` must name it too."""
    named = {setting.key for setting in settings().values() if "package.module:name" in setting.help}
    assert named == {
        "environment.custom",
        "environment.reward",
        "environment.harness.function",
        "environment.harness.tasks",
        "environment.textarena.opponent",
        "memory.custom",
        "objective.advantage",
    }
    run = (
        ["environment.name=custom", "environment.custom=evil:build"],
        ["environment.reward=evil:reward"],
        ["environment.name=harness", "environment.harness.command=[sh]", "environment.harness.tasks=a.jsonl"],
        [
            "environment.name=mcp",
            "environment.mcp.path=a.jsonl",
            "environment.mcp.servers={s: {command: [sh]}}",
        ],
        ["environment.name=verifiers", "environment.verifiers.id=evil"],
        ["environment.name=gymnasium", "environment.gymnasium.id=evil:Room-v0"],
        ["environment.mix=[{share: 1, environment: {name: custom, custom: 'evil:build'}}]"],
        ["memory.policy=custom", "memory.custom=evil:build"],
        ["objective.advantage=evil:advantage"],
        ["model.trust_remote_code=true"],
        ["ray.address=evil:6379"],
        [
            "environment.name=rubric",
            "environment.rubric.path=a.jsonl",
            "environment.rubric.judge.url=http://evil/v1",
            "environment.rubric.judge.model=m",
        ],
    )
    for words in run:
        with pytest.raises(ConfigError, match=r"runs/x: its settings run code that is not Engram's"):
            refuse_code("runs/x", [load_config(None, words)])
    assert code_in(RunConfig()) == []


# --- the terminal -------------------------------------------------------------------------------------------


def _harmless(text: str) -> bool:
    return not set(text) & set("\x07\x9b\u202e") and "\x1b]" not in text and "\x1b[2J" not in text


def test_what_is_shown_writes_no_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = io.StringIO()
    display = Display(Console(file=output, width=80, force_terminal=True))
    display.say(f"agent> {HOSTILE}")
    with display.counting("evaluation", 2) as counter:
        counter.advance(HOSTILE)
    named = {f"timeline/worker_{HOSTILE}": 0.5, f"eval/{HOSTILE}/f1": 0.5}
    (tmp_path / "figures.jsonl").write_text(json.dumps({"step": 1, "time": 0.0, "figures": named}) + "\n")
    display.console.print(view(look(tmp_path), 80))
    table = Table("", ("row", "answer"), ((HOSTILE, HOSTILE),))
    show(Document("report", {}, (Section(HOSTILE, "", (table,), (HOSTILE,)),)), display)
    assert "abc" in output.getvalue() and _harmless(output.getvalue())
    assert main(["chat", f"./{HOSTILE}"]) == 2
    error = capsys.readouterr().err
    assert "abc" in error and _harmless(error)


def test_a_warning_writes_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("cluster.test")
    log.propagate = False  # pytest's own handlers are the root's
    with quiet(verbose=False):
        log.warning("a file says %s", HOSTILE)
    log.propagate = True
    error = capfd.readouterr().err
    assert "abc" in error and _harmless(error)


# --- secrets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        "tracking.uri=http://nora:hunter2@host",
        "tracking.uri=postgresql://nora:hunter2@host/db",
        "tracking.uri=https://hunter2@host",
        "tracking.uri=mysql://host/db?password=hunter2",
        "environment.rubric.judge.url=http://nora:hunter2@host/v1",
        "environment.openenv.url=http://nora:hunter2@host",
        "warm_start.teacher.url=http://host/v1?key=hunter2",
    ],
)
def test_an_address_with_a_password_is_no_setting(setting: str) -> None:
    """Settings become MLflow's params, config.yaml and a job's entry point."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, [setting])
    assert "hunter2" not in str(caught.value) and "(hidden)" in str(caught.value)


def test_an_address_without_a_password_is_one() -> None:
    for uri in ("http://host:5000", "sqlite:////shared/a%20b.db", "postgresql://nora@host/db", "databricks"):
        config = load_config(None, [f"tracking.uri={uri}"])
        assert config.tracking.uri == uri and uri in to_yaml(config)
    with pytest.raises(BoundError):
        replace(RunConfig().tracking, uri="http://a:b@c")


KEYS = (
    "OPENAI_API_KEY",
    "WANDB_API_KEY",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "RAY_AUTH_TOKEN",
    "JUDGE_KEY",
)


def _left(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_tracked_run_leaves_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Params, tags, the config, the outbox and MLflow's own store, for a run that knows all keys."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in KEYS:
        monkeypatch.setenv(name, f"planted-{name}")
    monkeypatch.setattr("sys.argv", ["engram", "train", "tracking.uri=http://nora:planted-argument@host"])
    words = ["environment.rubric.judge.api_key_env=JUDGE_KEY", "environment.options.seen=not-planted"]
    config = load_config(None, [f"output_dir={tmp_path}", "tracking.system_metrics_s=0", *words])
    config_file = tmp_path / "run" / "config.yaml"
    config_file.parent.mkdir()
    config_file.write_text(to_yaml(config))
    tracker = FigureFile(start_tracking(config, tmp_path, "run", config_file, ""), config_file.parent)
    tracker.log({"reward/mean": 0.5}, 1)
    tracker.dataset(dataset_values(config.environment, "training"))
    tracker.finish("FINISHED")
    left = _left(tmp_path)
    assert b"JUDGE_KEY" in left and b"not-planted" in left  # what is found where it is
    assert b"planted-" not in left.replace(b"not-planted", b"")
