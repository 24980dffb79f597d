"""What the documents say is there: links, commands, settings, metrics."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from cluster.cli import command_line
from configs.describe import settings
from configs.load import ConfigError, load_config
from configs.reference import PATH, reference

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "cluster/README.md", "infra/README.md", "configs/REFERENCE.md")]
SOURCES = "".join(file.read_text(encoding="utf-8") for room in ("cluster", "learner", "actors") for file in (ROOT / room).rglob("*.py"))


def _commands(text: str) -> list[list[str]]:
    """The words of each `python -m cluster ...` in the code blocks."""
    lines = [line for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL) for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(match[1]) for line in lines if (match := re.search(r"python -m cluster ([^#|]*)", line))]


COMMANDS = [(doc.name, words) for doc in DOCS for words in _commands(doc.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_links_lead_to_files(doc: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", doc.read_text(encoding="utf-8"))
    assert [target for target in targets if not target.startswith("http") and not (doc.parent / target).exists()] == []


@pytest.mark.parametrize(("doc", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60])
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
    commands = next(action for action in command_line()._actions if isinstance(action, argparse._SubParsersAction)).choices
    for doc in DOCS:
        assert set(re.findall(r"`python -m cluster ([a-z]+)", doc.read_text(encoding="utf-8"))) <= set(commands), doc


def test_there_are_commands_to_check() -> None:
    assert {words[0] for _, words in COMMANDS} >= {"train", "evaluate", "probe"}
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: str(doc.relative_to(ROOT)))
def test_targets_of_make_are_there(doc: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = set(re.findall(r"^make ([a-z]+)|`make ([a-z]+)", doc.read_text(encoding="utf-8"), re.MULTILINE))
    assert [target for pair in wanted for target in pair if target and not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_settings_that_are_named_exist() -> None:
    sections = {key.split(".")[0] for key in settings() if "." in key}
    for doc in DOCS[:5]:
        if doc.name == "CHANGELOG.md":  # of former names too
            continue
        named = re.findall(r"`([a-z_]+\.[a-z_.]+)(?:=[^`]*)?`", doc.read_text(encoding="utf-8"))
        files = (".py", ".yaml", ".md", ".json", ".jsonl", ".png", ".lock", ".txt")
        unknown = {key for key in named if key.split(".")[0] in sections and not key.endswith(files) and key not in settings()}
        assert {key for key in unknown if not any(known.startswith(key.rstrip(".")) for known in settings())} == set(), doc


def test_metrics_that_are_named_exist() -> None:
    text = (ROOT / "cluster/README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:reward|rollout|learner|fast_weights|staleness|timeline|fleet)/([a-z_]+)", text)
    assert len(named) > 10
    missing = [name for name in named if f"{name}" not in SOURCES and not all(part in SOURCES for part in name.split("_", 1))]
    assert missing == []


def test_the_reference_is_of_this_schema() -> None:
    assert PATH.read_text(encoding="utf-8") == reference(), "run `make reference`"
