"""The command line: what a user sees, above all after a mistake. No engine, no Ray: a mistake must be found before either starts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from cluster.cli import main
from configs.load import load_config

QUICKSTART = "configs/quickstart.yaml"


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


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"]])
def test_help_has_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if command:
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        assert stop.value.code == 0
    else:
        assert main([]) == 0
    text = capsys.readouterr().out
    assert f"python -m cluster {command[0] if command else 'train'} configs/" in text


def test_the_examples_of_help_load(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = [
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("  python -m cluster train")
    ]
    assert len(lines) >= 4
    for words in lines:
        load_config(Path(words[4]), [word for word in words[5:] if not word.startswith("--")])


def test_settings_lists_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--settings"]) == 0
    text = capsys.readouterr().out
    assert "max_staleness" in text
    assert "receipt_tolerance" in text


def test_print_config_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", QUICKSTART, "train.steps=3", "--print-config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed, []) == load_config(Path(QUICKSTART), ["train.steps=3"])


def test_a_mistyped_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean train.steps" in failure(capsys, "train", QUICKSTART, "trian.steps=3")


def test_a_missing_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in failure(capsys, "train", "configs/nothing.yaml")


def test_settings_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs a configuration file" in failure(capsys, "train", "train.steps=3")


def test_a_missing_locomo_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(
        capsys,
        "train",
        "configs/locomo.yaml",
        "environment.conversation.path=nowhere.json",
        f"output_dir={tmp_path}",
    )
    assert "nowhere.json" in message
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_locomo_file_names_item_and_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "locomo.json"
    path.write_text(
        json.dumps(
            [
                {
                    "sample_id": "c1",
                    "conversation": {"speaker_a": "A", "speaker_b": "B"},
                    "qa": [{"question": "Who?"}],
                }
            ]
        )
    )
    message = failure(
        capsys,
        "train",
        "configs/locomo.yaml",
        f"environment.conversation.path={path}",
        f"output_dir={tmp_path / 'runs'}",
    )
    assert str(path) in message
    assert not (tmp_path / "runs").exists()


def test_settings_that_only_the_environment_can_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = failure(
        capsys, "train", QUICKSTART, "environment.recall.sessions=5000", f"output_dir={tmp_path}"
    )
    assert "recall.sessions" in message


def test_a_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no-such-model" in failure(
        capsys, "train", QUICKSTART, "model.name=./no-such-model", f"output_dir={tmp_path}"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint(
    tmp_path: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [f"model.name={tiny_model_path}", f"output_dir={tmp_path}"]
    assert "is no checkpoint" in failure(capsys, "train", QUICKSTART, f"resume={tmp_path}/gone", *where)
    assert "is no checkpoint" in failure(
        capsys, "evaluate", QUICKSTART, f"checkpoint={tmp_path}/gone", *where
    )
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_belongs_to_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    assert "train takes resume=FOLDER" in failure(capsys, "train", QUICKSTART, "checkpoint=runs/x")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rows", "tmen"), "--rows tmen: no such row; shipped are amem"),
        (("--benchmarks", "locomo"), "environment.conversation.path"),
        (("--resume", "runs/gone"), "runs/gone: is no folder of an evaluation"),
        (
            ("--rows", "tmem", "memory.policy=full"),
            "with --rows it would turn every row into the same memory",
        ),
        (("--sweep", "write.epochs=1,many", "seed=3"), "write.epochs='many' is not allowed"),
    ],
)
def test_a_mistake_in_what_to_compare(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in failure(capsys, "evaluate", QUICKSTART, f"output_dir={tmp_path}", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_to_go_on_with_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "or --resume FOLDER alone" in failure(capsys, "evaluate")
    assert "or --resume FOLDER alone" in failure(capsys, "evaluate", "--resume", "runs/x", "--rows", "tmem")


def test_settings_may_stand_behind_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "evaluate",
                QUICKSTART,
                "write.epochs=2",
                "--seeds",
                "1,2",
                "evaluation.tasks=7",
                "--print-config",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "tasks: 7" in text
    assert "epochs: 2" in text
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", QUICKSTART, "--rwos", "tmem"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --rwos" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--seeds", "one"), ("--seeds", "-1"), ("--rows", "tmem,,raw")])
def test_lists_are_checked(arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", QUICKSTART, *arguments])
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_scale_asks_the_newest_run_and_refuses_what_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("old", "new", "new-evaluate-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("name: x\n")
    os.utime(tmp_path / "old" / "config.yaml", (1, 1))
    assert main(["scale", "3", "--output-dir", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "new" / "workers.json").read_text()) == {"workers": 3}
    assert "asked for 3 rollout worker(s)" in capsys.readouterr().out
    assert "is no run folder" in failure(capsys, "scale", "3", "--run", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit):
        main(["scale", "0"])
    assert "'0' is not allowed: give a whole number, 1 or more" in capsys.readouterr().err
