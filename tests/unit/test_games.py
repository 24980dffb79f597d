"""Gymnasium's environments and TextArena's games, played by a scripted policy."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.environments.base import Environment
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from cluster.train.prepare import questions_of
from configs.load import ConfigError
from configs.schema import (
    EnvironmentConfig,
    GymnasiumConfig,
    TextArenaConfig,
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


# --- Gymnasium ----------------------------------------------------------------------------------------------


def test_gymnasium_sums_the_rewards_of_steps_until_the_end(chat: ChatFormat) -> None:
    run = run_of(0)
    environment = build(run)
    assert (
        questions_of(run, environment, [first_task(environment)]) == []
    )  # nothing of the user's starts here
    wanted = {}
    for position in range(8):
        task = first_task(environment, position=position)
        turns: list[str] = []

        def search(last: str, turns: list[str] = turns) -> str:
            turns.append(last)
            return str(len(turns))

        (episode,) = ended(play(chat, environment, task, search, siblings=1))
        assert turns[0].startswith("A key lies") and turns[1:] == [
            f"No key in room {room}." for room in range(1, len(turns))
        ]
        truncated = episode.outcome.reward == pytest.approx(-0.75)
        assert truncated or episode.outcome.reward == pytest.approx(1.25 - 0.25 * len(turns))
        parts = {"steps": float(len(turns)), "finished": 1.0, "truncated": float(truncated)}
        assert episode.outcome.reward_parts == parts and episode.outcome.answers == ()
        wanted[position] = len(turns)
    assert len(set(wanted.values())) > 1, "the seed decides where the key is"
    again = ended(play(chat, environment, first_task(environment), lambda _: "1"))
    assert len({episode.outcome.reward for episode in again}) == 1, "siblings have one key"


def test_gymnasiums_faults_have_an_owner_and_everything_is_closed(chat: ChatFormat) -> None:
    import my_worse  # type: ignore[import-not-found]

    def broken(**settings: object) -> Environment:
        config = GymnasiumConfig(id="my_worse:Broken-v0", **settings)  # type: ignore[arg-type]
        return build(EnvironmentConfig(name="gymnasium", gymnasium=config))

    environment = broken()
    my_worse.closed.clear()
    message = failure(play(chat, environment, first_task(environment), lambda _: "four"))
    assert re.search(r"act: ZeroDivisionError: division by zero \(my_worse\.py:13\)$", message)
    lists = broken(reset={"list": True})
    assert re.search(
        r"id=my_worse:Broken-v0 gave an observation of type list, it must be a text: wrap it in",
        failure(play(chat, lists, first_task(lists), lambda _: "on")),
    )
    assert len(my_worse.closed) == 5, "two siblings twice, and the look at the spaces"
    my_worse.stubborn.append(True)
    assert "gave an observation of type list" in failure(play(chat, lists, first_task(lists), lambda _: "on"))
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
        build(config)
    assert "\n" not in str(caught.value)


# --- TextArena ----------------------------------------------------------------------------------------------


def test_textarena_is_played_in_one_seat_against_a_stated_opponent(chat: ChatFormat) -> None:
    environment = build(run_of(1))
    shown: dict[int, list[str]] = {}
    for task in (first_task(environment), first_task(environment, position=1)):
        turns: list[str] = []

        def move(last: str, turns: list[str] = turns) -> str:
            turns.append(last)
            return ["[4]", "[7]", "[8]", "[1]", "[3]"][(len(turns) - 1) % 5]

        before = random.getstate()
        episodes = ended(play(chat, environment, task, move, siblings=1))
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
    environment = build(EnvironmentConfig(name="textarena", textarena=config))
    episodes = ended(play(chat, environment, first_task(environment), lambda _: "[10]", siblings=4))
    spoken = {tuple(segment.token_ids.tobytes() for segment in episode.segments) for episode in episodes}
    assert len(spoken) == 1 and {episode.outcome.reward_parts["finished"] for episode in episodes} == {1.0}


def test_textarenas_own_opponent_moves_first_and_an_unfinished_game_gives_nothing(chat: ChatFormat) -> None:
    config = TextArenaConfig(game="TicTacToe-v0", players=2, seat=1, opponent="my_worse:moves")
    environment = build(EnvironmentConfig(name="textarena", textarena=config))
    (episode,) = ended(play(chat, environment, first_task(environment), lambda _: "[1]", siblings=1))
    parts = episode.outcome.reward_parts  # its opponent says letters: that loses the game
    assert episode.outcome.reward == 1.0 and parts["opponent_invalid_move"] == 1.0 and parts["steps"] == 1.0
    config = TextArenaConfig(game="TowerOfHanoi-v0")
    environment = build(EnvironmentConfig(name="textarena", textarena=config))
    (episode,) = ended(play(chat, environment, first_task(environment), lambda _: "[A C]", 1, max_turns=1))
    assert episode.outcome.reward == 0.0 and episode.outcome.reward_parts["finished"] == 0.0


def test_textarenas_game_is_closed_also_where_its_first_turn_raises(
    chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    import my_worse
    from textarena.envs.TicTacToe.env import TicTacToeEnv  # type: ignore[import-untyped]

    config = TextArenaConfig(game="TicTacToe-v0", players=2, seat=1, opponent="my_worse:moves")
    environment = build(EnvironmentConfig(name="textarena", textarena=config))
    closed: list[object] = []
    monkeypatch.setattr(TicTacToeEnv, "close", lambda game: closed.append(game))
    monkeypatch.setattr(my_worse, "stubborn", [True])
    message = failure(play(chat, environment, first_task(environment), str))
    assert re.search(r"start.*: IndexError: list index out of range \(my_worse\.py:\d+\)$", message)
    assert len(closed) == 2, "the opponent has raised"
    monkeypatch.setattr(TicTacToeEnv, "reset", lambda *_, **__: 1 / 0)
    assert "ZeroDivisionError" in failure(play(chat, environment, first_task(environment), str))
    assert len(closed) == 4, "the game itself has"


def test_a_game_that_is_none_and_seats_that_do_not_fit_are_said_at_once() -> None:
    with pytest.raises(TaskError, match=r"textarena\.game=Go-v9: ValueError: Environment Go-v9 not found"):
        build(EnvironmentConfig(name="textarena", textarena=TextArenaConfig(game="Go-v9")))
    with pytest.raises(TaskError, match="AssertionError: The number of players has to be 2, received 1"):
        build(EnvironmentConfig(name="textarena", textarena=TextArenaConfig(game="TicTacToe-v0")))
    with pytest.raises(ConfigError, match=r"opponent_replies.*given where players is 2 or more"):
        run_of(1, "environment.textarena.players=1")
    with pytest.raises(ConfigError, match="seat"):
        run_of(1, "environment.textarena.seat=2")
