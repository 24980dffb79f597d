"""The command line: what a user sees, above all after a mistake.

No test starts an engine or Ray: a mistake must be found before either starts.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from cluster.cli import app, main
from cluster.common.errors import AllFailed, ClusterError, FleetError, MachineError
from cluster.evaluation.command import save_request
from cluster.evaluation.plan import Request
from cluster.runs.run_lock import held
from cluster.sizing.doctor import Finding, examine, own_version
from configs.load import load_config
from configs.shipped import find_config, shipped

ROOT = Path(__file__).parents[2]
COMMANDS = tuple(get_command(app).commands)  # type: ignore[attr-defined]


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a call that must exit with 2 without starting anything."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized()
    return captured.err


# --- help --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_as_they_are_typed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: engram {command} ")
    examples = text.split("examples:\n")[1]
    assert re.search(rf"^    engram {command}\b|; do engram {command}\b", examples, re.MULTILINE)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_terminal_of_80_columns_and_speaks_no_python(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A longer example would be broken in a word. Every argument and option says what it is."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*filter(None, [command]), "--help"]) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if len(line) > 79] == []
    named = text.partition("\n  examples:")[0]
    assert re.findall(r"<[a-z]|\[\[|list\[|int range", named) == []
    words = re.findall(r"^  (\S+(?: \S+)*)(?:$|  +(.*)$)", named.partition("\nArguments:")[2], re.MULTILINE)
    assert [name for name, about in words if about.startswith("[")] == []


def test_settings_of_help_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    given = {}
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        example = re.search(r"settings to change, e\.g\.\s+(\S+)", capsys.readouterr().out)
        if example is not None:
            load_config(None, [example[1]])
            given[command] = example[1]
    assert (
        len(given) == 8 and given["serve"].startswith("assistant.") and given["memory"].startswith("write.")
    )


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"engram {own_version()}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", own_version())
    assert Finding("Engram", own_version()) in examine()


def test_help_lists_the_commands_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        listed = dict(re.findall(r"^  (\w+)  +(\S.*)$", text.split("Commands:\n")[1], re.MULTILINE))
        assert tuple(listed) == COMMANDS and not any(about.endswith("...") for about in listed.values())


def test_the_examples_of_help_load(capsys: pytest.CaptureFixture[str]) -> None:
    checked = 0
    for command in ("train", "evaluate", "probe"):
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out.replace("\\\n", " ")
        for line in re.findall(rf"^    engram {command} (.*?)(?:   .*)?$", text, re.MULTILINE):
            config, *words = shlex.split(line)
            if config.startswith("--"):  # --resume, --settings
                continue
            until_option = words[: next((i for i, word in enumerate(words) if word[0] == "-"), len(words))]
            overrides = [word for word in until_option if not word.startswith(("checkpoint=", "resume="))]
            load_config(find_config(config), overrides)
            checked += 1
    assert checked >= 15


def test_help_answers_at_once() -> None:
    """It imports no framework, and takes under a second of CPU (0.4 s here)."""
    code = (
        "import sys, time\nfrom cluster.cli import main\nassert main(['train', '--help']) == 0\n"
        "heavy = {'torch', 'ray', 'vllm', 'mlflow', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert time.process_time() < 1, time.process_time()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_settings_lists_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "evaluate", "probe"):
        assert main([command, "--settings"]) == 0
        text = capsys.readouterr().out
        assert "max_staleness" in text and "receipt_tolerance" in text


# --- configurations ----------------------------------------------------------------------------------------


def test_print_config_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart", "train.steps=3", "--print-config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed, []) == load_config(shipped()["quickstart"], ["train.steps=3"])


@pytest.mark.parametrize("command", ["train", "evaluate", "probe"])
def test_a_configuration_is_a_shipped_name_or_a_path(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    assert main([command, "quickstart", "--print-config"]) == 0
    assert "name: quickstart\n" in capsys.readouterr().out
    assert main([command, "mine.yaml", "--print-config"]) == 0
    assert "name: mine\n" in capsys.readouterr().out
    assert "quickstrat: no such file; did you mean quickstart; shipped are chat" in failure(
        capsys, command, "quickstrat"
    )


def test_a_missing_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in failure(capsys, "train", "configs/nothing.yaml")


def test_settings_may_stand_before_and_behind_options(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["write.epochs=2", "--seeds", "1,2", "evaluation.tasks=7", "--print-config", "train.steps=9"]
    assert main(["evaluate", "quickstart", *words]) == 0
    text = capsys.readouterr().out
    assert "epochs: 2" in text and "tasks: 7" in text and "steps: 9" in text


# --- mistakes in the words ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trian", "quickstart"), "No such command 'trian'. Did you mean 'train'?"),
        (("evaluate", "quickstart", "--rwos", "tmem"), "No such option: --rwos; did you mean --rows"),
        (("train", "quickstart", "--xyzzy"), "No such option: --xyzzy"),
        (("train", "quickstart", "word"), "argument 'word': write key=value"),
        (("train", "quickstart", "trian.steps=3"), "did you mean train.steps"),
        (("train", "train.steps=3"), "train needs a configuration before the settings, e.g. quickstart"),
        (("train",), "train needs a configuration before the settings"),
        (("probe", "write.epochs=3"), "probe needs a configuration before the settings"),
        (("evaluate", "quickstart", "--seeds", "one"), "argument --seeds: 'one' is not allowed: give whole"),
        (("evaluate", "quickstart", "--seeds", "-1"), "argument --seeds: '-1' is not allowed"),
        (("evaluate", "quickstart", "--seeds", "0,0"), "argument --seeds: '0,0' is not allowed"),
        (("evaluate", "quickstart", "--rows", "tmem,,raw"), "argument --rows: 'tmem,,raw' has an empty name"),
        (("scale", "0"), "Invalid value for 'N': Input should be greater than or equal to 1"),
        (("scale", "many"), "Invalid value for 'N': Input should be a valid integer"),
        (("scale", "1", "2"), "Got unexpected extra argument"),
        (("scale",), "Missing argument 'N'"),
        (("bench", "--repeats"), "Option '--repeats' requires an argument"),
        (
            ("serve", "--port", "70000"),
            "Invalid value for '--port': Input should be less than or equal to 65535",
        ),
        (
            ("submit", "dance"),
            "Invalid value for 'COMMAND': 'dance' is not one of 'train', 'evaluate', 'probe'",
        ),
        (("probe", "quickstart", "--cards", "recall:2", "--cell"), "--cell: needs one setting or more"),
        (("chat", "--config", "nothing"), "nothing: no such file; shipped are chat"),
    ],
)
def test_a_wrong_word_is_one_line(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in failure(capsys, *words)


def test_a_cell_takes_all_words_up_to_the_next_option(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--cell",
        "write.epochs=1",
        "write.optimizer=adam",
        "--cell",
        "write.epochs=many",
        "--sweep",
        "x",
    ]
    message = failure(capsys, "probe", "quickstart", "--cards", "recall:2", *words)
    assert "argument 'x': a probe's cells differ in write.*" in message
    message = failure(capsys, "probe", "quickstart", "--cards", "recall:2", *words[:5])
    assert "argument 'write.epochs=many': write.epochs='many' is not allowed" in message


@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError])
def test_an_interrupted_command_says_so(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise error

    monkeypatch.setattr("cluster.runs.wanted_workers.newest_run", interrupted)
    assert main(["scale", "2"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# --- mistakes that only the parts can find -----------------------------------------------------------------


def test_a_missing_locomo_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = "environment.conversation.path=nowhere.json"
    message = failure(capsys, "train", "locomo", path, f"output_dir={tmp_path}")
    assert "nowhere.json" in message
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_locomo_file_names_item_and_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "locomo.json"
    speakers = {"speaker_a": "A", "speaker_b": "B"}
    item = {"sample_id": "c1", "conversation": speakers, "qa": [{"question": "Who?"}]}
    path.write_text(json.dumps([item]))
    settings = [f"environment.conversation.path={path}", f"output_dir={tmp_path / 'runs'}"]
    assert str(path) in failure(capsys, "train", "locomo", *settings)
    assert not (tmp_path / "runs").exists()


def test_settings_that_only_the_environment_can_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["environment.recall.sessions=5000", f"output_dir={tmp_path}"]
    assert "recall.sessions" in failure(capsys, "train", "quickstart", *settings)


def test_a_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["model.name=./no-such-model", f"output_dir={tmp_path}"]
    assert "no-such-model" in failure(capsys, "train", "quickstart", *settings)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint(
    tmp_path: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [f"model.name={tiny_model_path}", f"output_dir={tmp_path}"]
    assert "is no checkpoint" in failure(capsys, "train", "quickstart", f"resume={tmp_path}/gone", *where)
    missing = f"checkpoint={tmp_path}/gone"
    assert "is no checkpoint" in failure(capsys, "evaluate", "quickstart", missing, *where)
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_belongs_to_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    assert "train takes resume=FOLDER" in failure(capsys, "train", "quickstart", "checkpoint=runs/x")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rows", "tmen"), "--rows tmen: no such row; shipped are amem"),
        (("--benchmarks", "locomo"), "environment.conversation.path"),
        (("--resume", "runs/gone"), "runs/gone: is no folder of an evaluation"),
        (("--rows", "tmem", "memory.policy=full"), "it would turn every row into the same memory"),
        (("--sweep", "write.epochs=1,many", "seed=3"), "write.epochs='many' is not allowed"),
    ],
)
def test_a_mistake_in_what_to_compare(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in failure(capsys, "evaluate", "quickstart", f"output_dir={tmp_path}", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_to_go_on_with_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "or --resume FOLDER alone" in failure(capsys, "evaluate")
    assert "or --resume FOLDER alone" in failure(capsys, "evaluate", "--resume", "runs/x", "--rows", "tmem")
    assert "runs/x: is no folder of an evaluation" in failure(capsys, "evaluate", "--resume", "runs/x")


def test_auto_alone_goes_on_with_the_newest_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = failure(capsys, "evaluate", "--resume", "auto")
    assert "--resume auto: runs holds no evaluation; give its folder; or auto beside CONFIG" in said
    for number, seed in ((2, 7), (10, 8), (9, 6)):
        folder = tmp_path / "runs" / f"other-evaluate-202601{20 - number}-120000"
        folder.mkdir(parents=True)
        config = find_config("quickstart")
        save_request(Request(config, (f"seed={seed}",), None, (), (), (), "", (), ""), folder)
        (folder / "number").write_text(f"{number}\n")
    (tmp_path / "runs" / "quickstart-20260202-120000").mkdir()
    assert main(["evaluate", "--resume", "auto", "--print-config"]) == 0
    assert "\nseed: 8\n" in capsys.readouterr().out


def test_scale_asks_the_newest_run_and_refuses_what_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("old", "new", "new-evaluate-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("name: x\n")
    os.utime(tmp_path / "old" / "config.yaml", (1, 1))
    dead = failure(capsys, "scale", "3", "--output-dir", str(tmp_path))
    assert "is not running: it ended or died" in dead and "rollout.workers=3" in dead
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.yaml"]
    with held(tmp_path / "new"):
        assert main(["scale", "3", "--output-dir", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "new" / "workers.json").read_text()) == {"workers": 3}
    assert "asked for 3 rollout worker(s)" in capsys.readouterr().out
    assert "is no run folder" in failure(capsys, "scale", "3", "--run", str(tmp_path / "nothing"))


def test_a_full_disk_is_one_line_wherever_it_is_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/x/workers.json")

    monkeypatch.setattr("cluster.runs.wanted_workers.newest_run", full)
    assert main(["scale", "3", "--output-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(
        "error: /runs/x/workers.json: cannot be written or read (No"
    )

    def bug(_: Path) -> Path:
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")

    monkeypatch.setattr("cluster.runs.wanted_workers.newest_run", bug)
    with pytest.raises(FileNotFoundError):  # a mistake of ours keeps its traceback
        main(["scale", "3", "--output-dir", str(tmp_path)])


@pytest.mark.parametrize(("error", "status"), [(MachineError, 2), (AllFailed, 2), (FleetError, 1)])
def test_what_another_start_would_meet_again_is_the_users_mistake(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: type[ClusterError],
    status: int,
) -> None:
    """--supervise starts again on status 1 alone."""

    def refuse(config: object, display: object) -> None:
        raise error("the reason")

    monkeypatch.setattr("cluster.train.run.train_config", refuse)
    assert main(["train", str(ROOT / "tests" / "quickstart.yaml")]) == status
    assert capsys.readouterr().err == "error: the reason\n"
