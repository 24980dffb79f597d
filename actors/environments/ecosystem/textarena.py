"""TextArena's games, with the agent in one seat.

    environment:
      name: textarena
      textarena: {game: TicTacToe-v0, players: 2, opponent_replies: ["[0]", "[1]", "[2]", "[4]", "[8]"]}

A task is a seed. The reward is what the game gives the agent's seat at its end, mostly -1 to 1; a game that
``rollout.max_turns`` ends early gives 0, and the part ``finished`` says so. The agent reads what is new since
its last move, not the whole game again: its memory is its own.

Why the lock: the games draw from Python's global ``random``. Each session keeps a state of it, which stands
in the global one only during its own calls. So the siblings of a group play the same game.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from actors.environments.base import Split
from actors.environments.ecosystem.stepped import (
    SteppedSession,
    as_text,
    closed_after_a_fault,
    package,
    seeded_tasks,
)
from actors.protocols import TaskError
from actors.text.thoughts import visible_reply
from actors.types import Task
from configs.schema import TextArenaConfig
from configs.user_code import load_extension, owned

Opponent = Callable[[str], str]
_GLOBAL_RANDOM = threading.Lock()


class TextArenaEnvironment:
    """The `textarena` task source."""

    name = "textarena"

    def __init__(self, config: TextArenaConfig) -> None:
        """Raises TaskError where there is no such game, ExtensionError where there is no such opponent."""
        self._textarena = package(self.name, "textarena")
        self._config = config
        self.system_prompt = config.system_prompt
        self._whom = f"environment.textarena.game={config.game}"
        own = config.opponent
        self._opponent = load_extension("environment.textarena.opponent", own) if own else None
        with owned(self._whom, TaskError):
            self.start(Task("textarena-check", self.name, {}, 0)).close()  # so the number of players fits too

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        return seeded_tasks(self.name, split, seed, start)

    def start(self, task: Task) -> TextArenaSession:
        replies = self._config.opponent_replies
        opponent = self._opponent or (_drawn(replies, task.seed) if replies else None)
        chance = _Chance(task.seed)
        with chance:
            game = self._textarena.make(self._config.game, **self._config.make)
        with closed_after_a_fault(partial(_close, game, chance)):
            with chance:
                game.reset(num_players=self._config.players, seed=task.seed)
            return TextArenaSession(game, self._whom, self._config.seat, opponent, chance)


class TextArenaSession(SteppedSession):
    """One game. The opponent moves until it is the agent's turn."""

    def __init__(self, game: Any, whom: str, seat: int, opponent: Opponent | None, chance: _Chance) -> None:
        self._game, self._whom, self._seat = game, whom, seat
        self._opponent, self._chance = opponent, chance
        first = self._until_our_turn()
        super().__init__("" if first is None else first)
        self.parts |= {"invalid_move": 0.0, "opponent_invalid_move": 0.0}
        if first is None:  # the opponent has ended the game before our first turn
            self._end()

    def act(self, text: str) -> None:
        with self._chance:
            done, _ = self._game.step(action=visible_reply(text).strip())
        if not done and (shown := self._until_our_turn()) is not None:
            self.stepped(shown, 0.0)
        else:
            self._end()

    def close(self) -> None:
        _close(self._game, self._chance)

    def _until_our_turn(self) -> str | None:
        """Let the others move; what our seat reads then, None where the game is over."""
        while True:
            with self._chance:
                player, messages = _innermost(self._game).get_observation()
            shown = _worded(self._game.state, self._seat, messages, self._whom)
            if player == self._seat:
                return shown
            assert self._opponent is not None, "configs checks it"
            reply = as_text("environment.textarena.opponent", self._opponent(shown), "the move")
            with self._chance:
                done, _ = self._game.step(action=reply)
            if done:
                return None

    def _end(self) -> None:
        rewards, info = self._game.state.rewards or {}, self._game.state.game_info
        self.stepped(None, float(rewards.get(self._seat, 0.0)))
        for player, facts in info.items():
            if facts.get("invalid_move"):
                self.parts["invalid_move" if player == self._seat else "opponent_invalid_move"] = 1.0


class _Chance:
    """The game's own state of the global ``random``, in force inside ``with``."""

    def __init__(self, seed: int) -> None:
        self._state: Any = random.Random(seed).getstate()
        self._others: Any = None

    def __enter__(self) -> None:
        _GLOBAL_RANDOM.acquire()
        self._others = random.getstate()
        random.setstate(self._state)

    def __exit__(self, *_: object) -> None:
        self._state = random.getstate()
        random.setstate(self._others)
        _GLOBAL_RANDOM.release()


def _close(game: Any, chance: _Chance) -> None:
    with chance:
        game.close()


def _innermost(game: Any) -> Any:
    """The game without its wrappers, which show the whole history at each turn."""
    while "env" in vars(game):
        game = game.env
    return game


def _worded(state: Any, seat: int, messages: object, whom: str) -> str:
    """New messages as the package's own wrapper words them, without the agent's own moves."""
    if isinstance(messages, str):
        return messages
    if not isinstance(messages, Sequence):
        return as_text(whom, messages, "the game gives messages of another shape")
    names = {-1: "GAME", **state.role_mapping}
    lines = [(sender, text) for sender, text, *_ in messages if sender != seat]
    return "\n".join(f"[{names.get(sender, f'Player {sender}')}] {text}" for sender, text in lines)


def _drawn(replies: Sequence[str], seed: int) -> Opponent:
    """An opponent without a thought: ``replies`` in a random order, then in another."""
    rng, left = random.Random(f"opponent/{seed}"), list[str]()

    def reply(_: str) -> str:
        if not left:
            left.extend(rng.sample(replies, len(replies)))
        return left.pop()

    return reply
