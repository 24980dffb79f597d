"""What all adapters to other projects' environments say where something is missing."""

from __future__ import annotations

import sys

import pytest

from actors.protocols import TaskError
from configs.load import ConfigError, load_config
from tests.unit.ecosystem_cases import (
    COMMANDS,
    ROOT,
    build,
    run_of,
)


@pytest.mark.parametrize(
    ("number", "module"),
    [*enumerate(("gymnasium", "textarena", "websockets.sync.client", "verifiers.envs.multiturn_env"))],
)
def test_a_missing_package_is_one_line(number: int, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    name = COMMANDS[number].split()[0].split("=")[1]
    cure = r"is not installed here: pip install 'engram-rl\[environments\]'"
    with pytest.raises(TaskError, match=rf"^environment\.name={name}: {module} {cure}"):
        build(run_of(number))


@pytest.mark.parametrize("name", ["gymnasium", "textarena", "openenv", "verifiers"])
def test_what_an_adapter_must_be_told_is_required(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"environment\.{name}\..* where environment\.name is {name}"):
        load_config(ROOT / "configs/quickstart.yaml", [f"environment.name={name}"])
