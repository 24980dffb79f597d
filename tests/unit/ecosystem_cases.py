"""Other projects' environments, and a scripted policy that plays them: those of actors/README.md, and worse.

The packages are the real ones.
"""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from actors.environments.base import Environment
from actors.environments.build import build_environment
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.text.chat_template import ChatFormat
from actors.types import AdapterKey, Generation, Sampling, Task, Trajectory, TrajectoryGroup
from configs.load import load_config
from configs.schema import (
    EmbedderConfig,
    EnvironmentConfig,
    MemoryConfig,
    RolloutConfig,
    RunConfig,
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


@contextmanager
def modules_in(folder: Path) -> Iterator[Path]:
    """The modules of actors/README.md and the worse ones, importable from ``folder``."""
    for name, code in {**MODULES, "my_worse": WORSE}.items():
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in (*MODULES, "my_worse"):
        sys.modules.pop(name, None)


def run_of(number: int, *settings: str) -> RunConfig:
    """The run of one of the README's commands."""
    return load_config(
        ROOT / "configs/quickstart.yaml", [*shlex.split(COMMANDS[number].replace("\\\n", " ")), *settings]
    )


def build(config: RunConfig | EnvironmentConfig) -> Environment:
    environment = config.environment if isinstance(config, RunConfig) else config
    return build_environment(environment, EmbedderConfig())


def play(
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


def ended(group: TrajectoryGroup) -> list[Trajectory]:
    assert group.failed == (), group.failed
    return list(group.trajectories)


def failure(group: TrajectoryGroup) -> str:
    assert group.trajectories == () and {failed.boundary for failed in group.failed} == {"environment"}
    return group.failed[0].message


def first_task(environment: Environment, split: str = "train", position: int = 0) -> Task:
    return next(environment.tasks(split, 0, position))  # type: ignore[arg-type]
