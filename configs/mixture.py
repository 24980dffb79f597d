"""The environments of ``environment.mix``, checked: each is the run's environment with settings of its own.

    [{share: 0.7}, {share: 0.3, environment: {name: records, records: {path: a.jsonl}}}]  -->  two Members

The loader, the driver and every rollout worker read them from the same configuration.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from configs.bounds import BoundError, ConfigError, shown
from configs.load import environment_with
from configs.schema import EnvironmentConfig, RunConfig

_KEYS = ("share", "name", "environment")
_NAME = re.compile(r"[A-Za-z][\w-]{0,40}")


@dataclass(frozen=True, slots=True)
class Member:
    """One environment of several. ``share``: of the tasks; all shares sum to 1."""

    name: str
    share: float
    environment: EnvironmentConfig


def members(environment: EnvironmentConfig) -> tuple[Member, ...]:
    """The environments of ``environment.mix``; none without it. Raises ConfigError."""
    alone = replace(environment, mix=())
    made = [_member(alone, place, content) for place, content in enumerate(environment.mix)]
    total = sum(member.share for member in made)
    names = [member.name for member in made]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise ConfigError(
                f"environment.mix[{place}]: {name!r} is there already; give it a name of its own"
            )
    return tuple(replace(member, share=member.share / total) for member in made)


def environments(environment: EnvironmentConfig) -> tuple[EnvironmentConfig, ...]:
    """Those of its mix, or itself. Raises ConfigError."""
    return tuple(member.environment for member in members(environment)) or (environment,)


def check_mix(config: RunConfig) -> None:
    """Check each environment of the mix as that of a run. Raises ConfigError."""
    for place, member in enumerate(members(config.environment)):
        try:
            replace(config, environment=member.environment)
        except BoundError as error:
            raise ConfigError(f"environment.mix[{place}]: {error}") from None


def _member(alone: EnvironmentConfig, place: int, content: Mapping[str, object]) -> Member:
    where = f"environment.mix[{place}]"
    for key in content:
        if key not in _KEYS:
            raise ConfigError(f"{where}: {shown(key)} is no key of it; it may have {', '.join(_KEYS)}")
    share = content.get("share")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf:
        raise ConfigError(f"{where}: share={shown(share)} is not allowed: it must be a number above 0")
    settings = content.get("environment") or {}
    if not isinstance(settings, Mapping) or "mix" in settings:
        bound = "a mapping of settings of environment.*, without mix"
        raise ConfigError(f"{where}: environment={shown(settings)} is not allowed: it must be {bound}")
    environment = environment_with(alone, settings, where)
    name = content.get("name", environment.name)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        bound = "letters, digits, _ and -, a letter first"
        raise ConfigError(f"{where}: name={shown(name)} is not allowed: it must be {bound}")
    return Member(name, float(share), environment)
