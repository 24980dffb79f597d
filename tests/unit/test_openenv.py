"""OpenEnv's environments over a real server on loopback, played by a scripted policy."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from configs.schema import (
    EnvironmentConfig,
    OpenEnvConfig,
)
from tests.unit.ecosystem_cases import (
    build,
    ended,
    failure,
    first_task,
    modules_in,
    play,
    run_of,
)


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with modules_in(tmp_path_factory.mktemp("modules")) as folder:
        yield folder


_SERVE = """
import sys, types
# openenv imports fastmcp, which wants mcp<2, for tools that this server has none of
for name in ("fastmcp", "fastmcp.client", "fastmcp.client.client"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].Client = sys.modules[name].CallToolResult = object
import my_bell, uvicorn
from openenv.core.env_server import Environment, create_fastapi_app
class Worse(my_bell.Bell):
    def step(self, action): return {}["price"]
if sys.argv[2] == "worse":
    my_bell.app = create_fastapi_app(Worse, my_bell.Say, my_bell.Heard, max_concurrent_envs=1)
uvicorn.run(my_bell.app, port=int(sys.argv[1]), log_level="warning")
"""


def _serve(folder: Path, kind: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", _SERVE, str(port), kind], cwd=folder)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            break
        except OSError:
            time.sleep(0.2)
    assert server.poll() is None, "the server has not started"
    yield url
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="module")
def bell(modules: Path) -> Iterator[str]:
    yield from _serve(modules, "bell")


@pytest.fixture(scope="module")
def worse(modules: Path) -> Iterator[str]:
    yield from _serve(modules, "worse")


def test_openenv_is_played_over_a_connection_for_each_episode(chat: ChatFormat, bell: str) -> None:
    environment = build(run_of(2, f"environment.openenv.url={bell}"))
    for position in range(3):
        task, turns = first_task(environment, position=position), list[str]()

        def ring(last: str, turns: list[str] = turns) -> str:
            turns.append(last)
            return "ring"

        (episode,) = ended(play(chat, environment, task, ring, siblings=1))
        times = 1 + task.seed % 3
        assert turns == [f"Say ring, {times} times."] + [
            f"{left} times are left." for left in range(times - 1, 0, -1)
        ]
        assert episode.outcome.reward == times
        assert episode.outcome.reward_parts == {"steps": times, "finished": 1.0, "refused": 0.0}
    (episode, other) = ended(play(chat, environment, task, lambda _: "hum", max_turns=2))
    assert (
        episode.outcome.reward == other.outcome.reward == 0 and episode.outcome.reward_parts["finished"] == 0
    )


def test_what_openenvs_server_says_and_refuses(chat: ChatFormat, worse: str) -> None:
    config = OpenEnvConfig(url=worse)
    environment = build(EnvironmentConfig(name="openenv", openenv=config))
    failed = play(chat, environment, first_task(environment), lambda _: "ring", siblings=1)
    assert f"url={worse}: the server answers step with EXECUTION_ERROR: 'price'" in failure(failed)
    session, task = environment.start(first_task(environment)), first_task(environment)
    with pytest.raises(TaskError, match="CAPACITY_REACHED"):  # its only place is taken
        environment.start(task)
    session.close()  # type: ignore[attr-defined]
    wrong = EnvironmentConfig(name="openenv", openenv=OpenEnvConfig(url=worse, action={"volume": 3}))
    (episode,) = ended(play(chat, build(wrong), task, lambda _: "ring", siblings=1, max_turns=3))
    assert episode.outcome.reward_parts == {"steps": 3.0, "finished": 0.0, "refused": 3.0}
    with pytest.raises(
        TaskError, match=r"environment\.openenv\.url=http://127\.0\.0\.1:9: URLError: .*refused"
    ):
        build(EnvironmentConfig(name="openenv", openenv=OpenEnvConfig(url="http://127.0.0.1:9")))
