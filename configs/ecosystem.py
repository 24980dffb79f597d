"""Settings of the adapters to other projects' environments (actors/environments/ecosystem/)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from configs.bounds import fraction, positive, require
from configs.services import require_no_secret
from configs.user_code import FORM, is_path

ADAPTERS = ("gymnasium", "textarena", "openenv", "verifiers")
"""Values of ``environment.name`` whose environment is another project's. Their names are their sections'."""


@dataclass(frozen=True)
class GymnasiumConfig:
    """A Gymnasium environment whose observations and actions are texts. The reward is the sum of steps."""

    id: str = ""  # required with environment.name=gymnasium: of gymnasium.make, e.g. my_package:Rooms-v0
    make: dict[str, Any] = field(default_factory=dict, hash=False)  # further arguments of gymnasium.make
    reset: dict[str, Any] = field(default_factory=dict, hash=False)  # the options of its reset
    system_prompt: str = "Act in the environment that you read. Reply with your action and nothing else."


@dataclass(frozen=True)
class TextArenaConfig:
    """A TextArena game. The agent has one seat; the reward is what the game gives that seat at its end."""

    game: str = ""  # required with environment.name=textarena: of textarena.make, e.g. TicTacToe-v0
    make: dict[str, Any] = field(default_factory=dict, hash=False)  # further arguments of textarena.make
    players: int = 1  # 2 or more: the opponent has all other seats
    seat: int = 0  # the agent's; the first is 0
    # what the opponent says, drawn with the task's seed, each once before any comes again; one: always that
    opponent_replies: tuple[str, ...] = ()
    # instead: package.module:name of a function from the text that a seat reads to its reply
    opponent: str = ""
    system_prompt: str = "Play the game that you read. Reply with your move, in the format of the game."

    def __post_init__(self) -> None:
        positive(self, "players")
        require(0 <= self.seat < self.players, "seat", self.seat, f"0 to players - 1 = {self.players - 1}")
        require(self.opponent == "" or is_path(self.opponent), "opponent", self.opponent, f"{FORM}, or empty")
        one = (self.opponent != "") + (len(self.opponent_replies) > 0) == (self.players > 1)
        bound = "given where players is 2 or more, or else opponent, and only there"
        require(one, "opponent_replies", self.opponent_replies, bound)


@dataclass(frozen=True)
class OpenEnvConfig:
    """An OpenEnv server. Each episode has a connection of its own. The reward is the sum of the steps'."""

    url: str = ""  # required with environment.name=openenv, e.g. http://127.0.0.1:8000
    action_field: str = ""  # takes the agent's reply; empty: the only required text field of its actions
    action: dict[str, Any] = field(
        default_factory=dict, hash=False
    )  # the other fields, the same in each step
    observation_field: str = ""  # what the agent reads; empty: the only text field of its observations
    reset: dict[str, Any] = field(default_factory=dict, hash=False)  # further arguments of its reset
    system_prompt: str = "Act in the environment that you read. Reply with your action and nothing else."

    def __post_init__(self) -> None:
        require_no_secret("url", self.url, "settings are saved and logged")
        known = self.url == "" or self.url.startswith(("http://", "https://"))
        require(known, "url", self.url, "an address such as http://127.0.0.1:8000")


@dataclass(frozen=True)
class VerifiersConfig:
    """A verifiers environment. Rows of its dataset are tasks, and its rubric gives the reward."""

    id: str = ""  # required with environment.name=verifiers: of verifiers.load_environment
    args: dict[str, Any] = field(default_factory=dict, hash=False)  # further arguments of load_environment
    eval_fraction: float = 0.1  # of the rows, held out, where the environment has no eval dataset of its own
    system_prompt: str = "Answer what you are asked."  # of rows that bring none

    def __post_init__(self) -> None:
        fraction(self, "eval_fraction")
