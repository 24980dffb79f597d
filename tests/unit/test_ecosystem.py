"""Other projects' environments, played by a scripted policy through the rollout worker's episodes.

The packages are the real ones. The environments are those of actors/README.md, and worse ones.
"""

from __future__ import annotations

import asyncio
import random
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from actors.environments.base import Environment
from actors.environments.build import build_environment
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from actors.types import AdapterKey, Generation, Sampling, Task, Trajectory, TrajectoryGroup
from cluster.train.prepare import questions_of
from configs.load import ConfigError, load_config
from configs.schema import (
    EmbedderConfig,
    EnvironmentConfig,
    GymnasiumConfig,
    MemoryConfig,
    OpenEnvConfig,
    RolloutConfig,
    RunConfig,
    TextArenaConfig,
    VerifiersConfig,
    WriteConfig,
)
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, sampled

ROOT = Path(__file__).parents[2]
CARDS = '[{"instruction": "Who moved?", "output": "Nora"}]'
SECTION = (ROOT / "actors/README.md").read_text("utf-8").split("## Environments of other projects\n")[1]
SECTION = SECTION.split("\n## ")[0]
MODULES = {
    re.match(r'"""(\w+)\.py:', code)[1]: code  # type: ignore[index]
    for code in re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
}
COMMANDS = re.findall(r"```sh\nengram train quickstart (.*?)\n```", SECTION, re.DOTALL)

WORSE = """
import gymnasium, random
import verifiers as vf
from datasets import Dataset
from gymnasium.spaces import Box, Text

closed, stubborn = [], []

class Broken(gymnasium.Env):
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return ["no text"] if (options or {}).get("list") else "Go.", {}
    def step(self, action): return "On.", 1 / (len(action) - 4), False, False, {}
    def close(self):
        closed.append(self)
        if stubborn: raise OSError("the window is gone")

class Pictures(Broken):
    observation_space = Box(0, 1, (2, 2))

gymnasium.register("Broken-v0", Broken)
gymnasium.register("Pictures-v0", Pictures)

def moves(text): return [][0] if stubborn else random.choice("abc")

class Steps(vf.MultiTurnEnv):
    ended = []
    async def setup_state(self, state): state["seen"] = 0
    async def env_response(self, messages, state, **kwargs):
        if state["answer"] == "raise": return [{"role": "user", "content": 1 / 0}]
        if state["answer"] == "own": raise vf.ToolError("the shop is closed")
        return [{"role": "user", "content": f"turn {len(state['trajectory'])}"}]
    async def get_prompt_messages(self, state):
        messages = await super().get_prompt_messages(state)
        return messages[-1:] if state["answer"] == "rewrite" else messages
    @vf.cleanup
    async def end(self, state): self.ended.append(state["answer"])

def turns(state): return float(len(state["trajectory"]))
def price(answer, info): return {"dear": 2.0}[answer] if answer in ("dear", "cheap") else 0.0
def nothing(state): return None
def group(completions): return [0.0 for _ in completions]

def load_environment(answers="a b c", rubric="turns"):
    if answers == "none": raise KeyError("answers")
    rows = [{"question": f"Say {answer}.", "answer": answer, "info": {"n": 1}} for answer in answers.split()]
    functions = {"turns": [turns], "price": [turns, price], "group": [group], "nothing": [nothing]}[rubric]
    rubric = vf.Rubric(funcs=functions, weights=[0.5, 1.0][:len(functions)])
    data = {"dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(rows)}
    return Steps(max_turns=4, rubric=rubric, **data)
"""


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("modules")
    for name, code in {**MODULES, "my_worse": WORSE}.items():
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in (*MODULES, "my_worse"):
        sys.modules.pop(name, None)


def _run(number: int, *settings: str) -> RunConfig:
    """The run of one of the README's commands."""
    return load_config(
        ROOT / "configs/quickstart.yaml", [*shlex.split(COMMANDS[number].replace("\\\n", " ")), *settings]
    )


def _build(config: RunConfig | EnvironmentConfig) -> Environment:
    environment = config.environment if isinstance(config, RunConfig) else config
    return build_environment(environment, EmbedderConfig())


def _play(
    chat: ChatFormat,
    environment: Environment,
    task: Task,
    reply: Callable[[str], str],
    siblings: int = 2,
    max_turns: int = 12,
    context: int = 400,
) -> TrajectoryGroup:
    """A group whose agent answers the last turn of its prompt with ``reply``."""

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        last = [turn.text for turn in chat.turns(prompt_ids) if turn.role == "user"][-1]
        return sampled(chat.reply(CARDS if sampling.kind == "extract" else reply(last)))

    policy, writer = ScriptedPolicy(script), ScriptedWriter()
    config = RolloutConfig(episode_timeout_s=60, environment_timeout_s=30, max_turns=max_turns)
    rollout = Rollout(
        policy, writer, environment, chat, WriteConfig(), config, 8, SURROUNDINGS, "basis", "worker-0"
    )
    memory = MemoryConfig(max_context_tokens=context)
    request = RolloutRequest(task, "g", siblings, memory, temperature=1.0, max_answer_tokens=64, seed=1)
    return asyncio.run(rollout.group(request))


def _ended(group: TrajectoryGroup) -> list[Trajectory]:
    assert group.failed == (), group.failed
    return list(group.trajectories)


def _failure(group: TrajectoryGroup) -> str:
    assert group.trajectories == () and {failed.boundary for failed in group.failed} == {"environment"}
    return group.failed[0].message


def _first(environment: Environment, split: str = "train", position: int = 0) -> Task:
    return next(environment.tasks(split, 0, position))  # type: ignore[arg-type]


# --- Gymnasium ----------------------------------------------------------------------------------------------


def test_gymnasium_sums_the_rewards_of_steps_until_the_end(chat: ChatFormat) -> None:
    run = _run(0)
    environment = _build(run)
    assert questions_of(run, environment, [_first(environment)]) == []  # nothing of the user's starts here
    wanted = {}
    for position in range(8):
        task = _first(environment, position=position)
        turns: list[str] = []

        def search(last: str, turns: list[str] = turns) -> str:
            turns.append(last)
            return str(len(turns))

        (episode,) = _ended(_play(chat, environment, task, search, siblings=1))
        assert turns[0].startswith("A key lies") and turns[1:] == [
            f"No key in room {room}." for room in range(1, len(turns))
        ]
        truncated = episode.outcome.reward == pytest.approx(-0.75)
        assert truncated or episode.outcome.reward == pytest.approx(1.25 - 0.25 * len(turns))
        parts = {"steps": float(len(turns)), "finished": 1.0, "truncated": float(truncated)}
        assert episode.outcome.reward_parts == parts and episode.outcome.answers == ()
        wanted[position] = len(turns)
    assert len(set(wanted.values())) > 1, "the seed decides where the key is"
    again = _ended(_play(chat, environment, _first(environment), lambda _: "1"))
    assert len({episode.outcome.reward for episode in again}) == 1, "siblings have one key"


def test_gymnasiums_faults_have_an_owner_and_everything_is_closed(chat: ChatFormat) -> None:
    import my_worse  # type: ignore[import-not-found]

    def broken(**settings: object) -> Environment:
        config = GymnasiumConfig(id="my_worse:Broken-v0", **settings)  # type: ignore[arg-type]
        return _build(EnvironmentConfig(name="gymnasium", gymnasium=config))

    environment = broken()
    my_worse.closed.clear()
    message = _failure(_play(chat, environment, _first(environment), lambda _: "four"))
    assert re.search(r"act: ZeroDivisionError: division by zero \(my_worse\.py:13\)$", message)
    lists = broken(reset={"list": True})
    assert re.search(
        r"id=my_worse:Broken-v0 gave an observation of type list, it must be a text: wrap it in",
        _failure(_play(chat, lists, _first(lists), lambda _: "on")),
    )
    assert len(my_worse.closed) == 5, "two siblings twice, and the look at the spaces"
    my_worse.stubborn.append(True)
    assert "gave an observation of type list" in _failure(_play(chat, lists, _first(lists), lambda _: "on"))
    assert len(my_worse.closed) == 7 and not my_worse.stubborn.clear()


@pytest.mark.parametrize(
    ("identifier", "said"),
    [
        ("Nowhere-v0", "NameNotFound: Environment `Nowhere` doesn't exist"),
        (
            "my_worse:Pictures-v0",
            r"its observations are Box\(.*, not texts: wrap it in a gymnasium.Observation",
        ),
        ("my_nothing:A-v0", "ModuleNotFoundError: .*my_nothing"),
    ],
)
def test_what_gymnasium_cannot_play_is_said_at_once(identifier: str, said: str) -> None:
    config = EnvironmentConfig(name="gymnasium", gymnasium=GymnasiumConfig(id=identifier))
    with pytest.raises(TaskError, match=rf"^environment\.gymnasium\.id={identifier}: {said}") as caught:
        _build(config)
    assert "\n" not in str(caught.value)


# --- TextArena ----------------------------------------------------------------------------------------------


def test_textarena_is_played_in_one_seat_against_a_stated_opponent(chat: ChatFormat) -> None:
    environment = _build(_run(1))
    shown: dict[int, list[str]] = {}
    for task in (_first(environment), _first(environment, position=1)):
        turns: list[str] = []

        def move(last: str, turns: list[str] = turns) -> str:
            turns.append(last)
            return ["[4]", "[7]", "[8]", "[1]", "[3]"][(len(turns) - 1) % 5]

        before = random.getstate()
        episodes = _ended(_play(chat, environment, task, move, siblings=1))
        assert random.getstate() == before, "the run's own randomness is left alone"
        assert "You are Player 0 in Tic Tac Toe" in turns[0] and "Tic Tac Toe" not in turns[1]
        assert "[Player 1] [" in turns[1] and "[Player 0] [4]" not in turns[1]
        shown[task.seed] = turns
        (episode,) = episodes
        assert episode.outcome.reward in (-1.0, 0.0, 1.0) and episode.outcome.reward_parts["finished"] == 1.0
    first, second = shown.values()
    assert first != second, "the seed decides what the opponent says"


def test_textarena_plays_the_same_game_for_all_siblings(chat: ChatFormat) -> None:
    config = TextArenaConfig(game="GuessTheNumber-v0", make={"max_turns": 3})
    environment = _build(EnvironmentConfig(name="textarena", textarena=config))
    episodes = _ended(_play(chat, environment, _first(environment), lambda _: "[10]", siblings=4))
    spoken = {tuple(segment.token_ids.tobytes() for segment in episode.segments) for episode in episodes}
    assert len(spoken) == 1 and {episode.outcome.reward_parts["finished"] for episode in episodes} == {1.0}


def test_textarenas_own_opponent_moves_first_and_an_unfinished_game_gives_nothing(chat: ChatFormat) -> None:
    config = TextArenaConfig(game="TicTacToe-v0", players=2, seat=1, opponent="my_worse:moves")
    environment = _build(EnvironmentConfig(name="textarena", textarena=config))
    (episode,) = _ended(_play(chat, environment, _first(environment), lambda _: "[1]", siblings=1))
    parts = episode.outcome.reward_parts  # its opponent says letters: that loses the game
    assert episode.outcome.reward == 1.0 and parts["opponent_invalid_move"] == 1.0 and parts["steps"] == 1.0
    config = TextArenaConfig(game="TowerOfHanoi-v0")
    environment = _build(EnvironmentConfig(name="textarena", textarena=config))
    (episode,) = _ended(_play(chat, environment, _first(environment), lambda _: "[A C]", 1, max_turns=1))
    assert episode.outcome.reward == 0.0 and episode.outcome.reward_parts["finished"] == 0.0


def test_textarenas_game_is_closed_also_where_its_first_turn_raises(
    chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    import my_worse
    from textarena.envs.TicTacToe.env import TicTacToeEnv  # type: ignore[import-untyped]

    config = TextArenaConfig(game="TicTacToe-v0", players=2, seat=1, opponent="my_worse:moves")
    environment = _build(EnvironmentConfig(name="textarena", textarena=config))
    closed: list[object] = []
    monkeypatch.setattr(TicTacToeEnv, "close", lambda game: closed.append(game))
    monkeypatch.setattr(my_worse, "stubborn", [True])
    message = _failure(_play(chat, environment, _first(environment), str))
    assert re.search(r"start.*: IndexError: list index out of range \(my_worse\.py:\d+\)$", message)
    assert len(closed) == 2, "the opponent has raised"
    monkeypatch.setattr(TicTacToeEnv, "reset", lambda *_, **__: 1 / 0)
    assert "ZeroDivisionError" in _failure(_play(chat, environment, _first(environment), str))
    assert len(closed) == 4, "the game itself has"


def test_a_game_that_is_none_and_seats_that_do_not_fit_are_said_at_once() -> None:
    with pytest.raises(TaskError, match=r"textarena\.game=Go-v9: ValueError: Environment Go-v9 not found"):
        _build(EnvironmentConfig(name="textarena", textarena=TextArenaConfig(game="Go-v9")))
    with pytest.raises(TaskError, match="AssertionError: The number of players has to be 2, received 1"):
        _build(EnvironmentConfig(name="textarena", textarena=TextArenaConfig(game="TicTacToe-v0")))
    with pytest.raises(ConfigError, match=r"opponent_replies.*given where players is 2 or more"):
        _run(1, "environment.textarena.players=1")
    with pytest.raises(ConfigError, match="seat"):
        _run(1, "environment.textarena.seat=2")


# --- OpenEnv ------------------------------------------------------------------------------------------------

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
    environment = _build(_run(2, f"environment.openenv.url={bell}"))
    for position in range(3):
        task, turns = _first(environment, position=position), list[str]()

        def ring(last: str, turns: list[str] = turns) -> str:
            turns.append(last)
            return "ring"

        (episode,) = _ended(_play(chat, environment, task, ring, siblings=1))
        times = 1 + task.seed % 3
        assert turns == [f"Say ring, {times} times."] + [
            f"{left} times are left." for left in range(times - 1, 0, -1)
        ]
        assert episode.outcome.reward == times
        assert episode.outcome.reward_parts == {"steps": times, "finished": 1.0, "refused": 0.0}
    (episode, other) = _ended(_play(chat, environment, task, lambda _: "hum", max_turns=2))
    assert (
        episode.outcome.reward == other.outcome.reward == 0 and episode.outcome.reward_parts["finished"] == 0
    )


def test_what_openenvs_server_says_and_refuses(chat: ChatFormat, worse: str) -> None:
    config = OpenEnvConfig(url=worse)
    environment = _build(EnvironmentConfig(name="openenv", openenv=config))
    failed = _play(chat, environment, _first(environment), lambda _: "ring", siblings=1)
    assert f"url={worse}: the server answers step with EXECUTION_ERROR: 'price'" in _failure(failed)
    session, task = environment.start(_first(environment)), _first(environment)
    with pytest.raises(TaskError, match="CAPACITY_REACHED"):  # its only place is taken
        environment.start(task)
    session.close()  # type: ignore[attr-defined]
    wrong = EnvironmentConfig(name="openenv", openenv=OpenEnvConfig(url=worse, action={"volume": 3}))
    (episode,) = _ended(_play(chat, _build(wrong), task, lambda _: "ring", siblings=1, max_turns=3))
    assert episode.outcome.reward_parts == {"steps": 3.0, "finished": 0.0, "refused": 3.0}
    with pytest.raises(
        TaskError, match=r"environment\.openenv\.url=http://127\.0\.0\.1:9: URLError: .*refused"
    ):
        _build(EnvironmentConfig(name="openenv", openenv=OpenEnvConfig(url="http://127.0.0.1:9")))


# --- verifiers ----------------------------------------------------------------------------------------------


def test_verifiers_rows_are_tasks_and_the_rubric_is_the_reward(
    chat: ChatFormat, capfd: pytest.CaptureFixture[str]
) -> None:
    environment = _build(_run(3))
    train = [_first(environment, position=position) for position in range(8)]
    held_out = list(environment.tasks("eval", 0, 0))
    asked = {task.payload["question"] for task in train}
    assert len(asked) == 4 and len(held_out) == 1 and held_out[0].payload["question"] not in asked
    task, turns = train[0], list[str]()
    assert task.system_prompt == "Say one word."

    def second(last: str) -> str:
        turns.append(last)
        return "hm" if len(turns) == 1 else str(task.payload["answer"])

    (episode,) = _ended(_play(chat, environment, task, second, siblings=1))
    assert turns == [task.payload["question"], "No, not hm. Once more."]
    assert episode.outcome.reward == 1.0 and episode.outcome.reward_parts == {"right": 1.0, "num_turns": 2.0}
    assert chat.decode(episode.segments[0].token_ids).count("Say one word.") == 1
    right, wrong = (
        _ended(_play(chat, environment, task, lambda _: reply, siblings=1))[0].outcome  # noqa: B023
        for reply in (str(task.payload["answer"]), "hm")
    )
    assert (right.reward, right.reward_parts["num_turns"]) == (1.0, 1.0)
    assert (wrong.reward, wrong.reward_parts["num_turns"]) == (0.0, 2.0)
    assert capfd.readouterr() == ("", ""), "no progress bars, no warnings of the libraries"


def test_an_address_of_openenv_with_a_secret_is_refused_unseen() -> None:
    for url in ("http://me:hunter2@host", "http://host?key=hunter2"):
        with pytest.raises(ConfigError, match=r"url='\(hidden\)' is not allowed"):
            load_config(ROOT / "configs/quickstart.yaml", [f"environment.openenv.url={url}"])


def _worse(answers: str, **args: object) -> Environment:
    config = VerifiersConfig(id="my_worse", args={"answers": answers, **args})
    return _build(EnvironmentConfig(name="verifiers", verifiers=config))


def test_verifiers_scores_a_rollout_that_the_turn_limit_has_cut(chat: ChatFormat) -> None:
    import my_worse

    my_worse.Steps.ended.clear()
    environment = _worse("a")
    whole, cut = (
        _ended(_play(chat, environment, _first(environment), lambda _: "hm", 3, most)) for most in (9, 2)
    )
    assert {episode.outcome.reward for episode in whole} == {2.0}, "half of four turns"
    assert {episode.outcome.reward for episode in cut} == {1.0} and my_worse.Steps.ended == ["a"] * 6


@pytest.mark.parametrize(
    ("answers", "rubric", "said"),
    [
        ("raise", "turns", r"ZeroDivisionError: division by zero \(my_worse\.py:\d+\)$"),
        ("own", "turns", r"ToolError: the shop is closed \(my_worse\.py:\d+\)$"),
        ("cheap", "price", r"outcome: KeyError: 'cheap' \(my_worse\.py:\d+\)$"),
        ("a", "nothing", r"TypeError: float\(\) argument must be .* not 'NoneType'"),
        ("rewrite", "turns", r"it shows the agent 0 of its 1 replies"),
    ],
)
def test_verifiers_faults_have_an_owner(chat: ChatFormat, answers: str, rubric: str, said: str) -> None:
    environment = _worse(answers, rubric=rubric)
    assert re.search(said, _failure(_play(chat, environment, _first(environment), lambda _: "hm")))


def test_a_session_of_verifiers_that_is_closed_early_cleans_up() -> None:
    import my_worse

    my_worse.Steps.ended.clear()
    environment = _worse("a")

    async def play() -> None:
        session: Any = await environment.start(_first(environment))  # type: ignore[misc]
        assert (await session.observe()).text == "Say a."
        await session.close()
        assert my_worse.Steps.ended == ["a"]

    asyncio.run(play())


def test_what_verifiers_cannot_give_is_said_at_once() -> None:
    import signal

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(TaskError, match=r"verifiers\.id=my_worse: its rubric scores the siblings"):
        _worse("a", rubric="group")
    with pytest.raises(TaskError, match=r"verifiers\.id=my_worse: KeyError: 'answers' \(my_worse\.py:\d+\)"):
        _worse("none")
    with pytest.raises(
        TaskError, match=r"verifiers\.id=no-env: ModuleNotFoundError: No module named 'no_env'"
    ):
        _build(EnvironmentConfig(name="verifiers", verifiers=VerifiersConfig(id="no-env")))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    with ThreadPoolExecutor() as threads:  # a worker may build it in a thread
        assert threads.submit(_worse, "a").result().name == "verifiers"


# --- all ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "module"),
    [*enumerate(("gymnasium", "textarena", "websockets.sync.client", "verifiers.envs.multiturn_env"))],
)
def test_a_missing_package_is_one_line(number: int, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    name = COMMANDS[number].split()[0].split("=")[1]
    cure = r"is not installed here: pip install 'engram-rl\[environments\]'"
    with pytest.raises(TaskError, match=rf"^environment\.name={name}: {module} {cure}"):
        _build(_run(number))


@pytest.mark.parametrize("name", ["gymnasium", "textarena", "openenv", "verifiers"])
def test_what_an_adapter_must_be_told_is_required(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"environment\.{name}\..* where environment\.name is {name}"):
        load_config(ROOT / "configs/quickstart.yaml", [f"environment.name={name}"])
