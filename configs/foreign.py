"""Which settings run code that is not Engram's, or send a key: asked of a configuration in a folder.

CONFIG or a setting of the command line   --> the user says it, and it runs
the settings of a run's or model's folder --> they do neither, unless the command line has --allow-code
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from configs.bounds import ConfigError
from configs.mixture import environments
from configs.schema import EnvironmentConfig, RunConfig
from configs.user_code import is_path

FLAG = "--allow-code"


def code_in(config: RunConfig) -> list[str]:
    """The settings, as KEY=VALUE, by which ``config`` runs the code of a model, a module or a program.

    Also those by which it joins somebody's cluster, whose objects are unpickled, or sends them a key.
    """
    found = []
    if config.ray.address not in ("", "auto"):
        found.append(f"ray.address={config.ray.address}")
    if config.model.trust_remote_code:
        found.append("model.trust_remote_code=true")
    if config.memory.policy == "custom":
        found.append(f"memory.custom={config.memory.custom}")
    if is_path(config.objective.advantage):
        found.append(f"objective.advantage={config.objective.advantage}")
    for environment in environments(config.environment):
        found += [f"environment.{key}={value}" for key, value in _of_environment(environment)]
    return list(dict.fromkeys(found))


def refuse_code(folder: str, configs: Sequence[RunConfig]) -> None:
    """Raise ConfigError where the settings of ``folder`` would run code."""
    found = list(dict.fromkeys(setting for config in configs for setting in code_in(config)))
    if found:
        named = ", ".join(found)[:300]
        problem = f"{folder}: its settings run code that is not Engram's, or send a key ({named})"
        raise ConfigError(f"{problem}; if you trust it, give {FLAG}")


def _of_environment(environment: EnvironmentConfig) -> Iterator[tuple[str, str]]:
    name, harness = environment.name, environment.harness
    if environment.reward:
        yield "reward", environment.reward
    if name == "custom":
        yield "custom", environment.custom
    elif name == "harness":
        yield "harness", " ".join(harness.command) or harness.function
    elif name == "mcp":
        yield "mcp.servers", ", ".join(environment.mcp.servers)
    elif name == "gymnasium":  # an id may name a module, and a package that registers it is imported
        yield "gymnasium.id", environment.gymnasium.id
    elif name == "verifiers":
        yield "verifiers.id", environment.verifiers.id
    elif name == "textarena" and environment.textarena.opponent:
        yield "textarena.opponent", environment.textarena.opponent
    elif name == "rubric" and environment.rubric.judge.url and environment.rubric.judge.api_key_env:
        yield "rubric.judge.url", environment.rubric.judge.url
