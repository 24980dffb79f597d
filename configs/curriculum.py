"""The stages of ``curriculum.stages``, checked: each is the run's environment with settings of its own.

    {environment: {recall: {sessions: 1}}, metric: reward/mean, at_least: 0.6, window: 5}  -->  Stage

The loader, the driver and every rollout worker read them from the same configuration, so a stage is named by
its place.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from configs.bounds import ConfigError, shown
from configs.load import flatten, with_environment
from configs.schema import EnvironmentConfig, RunConfig

_KEYS = ("environment", "metric", "at_least", "at_most", "window", "steps")


@dataclass(frozen=True, slots=True)
class Stage:
    """Tasks of ``environment`` until ``steps`` steps were made, or the metric's mean is in its bounds.

    ``changes`` says for people what the stage sets. ``steps`` 0: no limit. ``metric`` "": none is watched.
    """

    environment: EnvironmentConfig
    changes: str
    metric: str
    at_least: float
    at_most: float
    window: int
    steps: int

    def is_reached(self, mean: float) -> bool:
        return self.at_least <= mean <= self.at_most


def stages(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of ``config``; none without a curriculum. Raises ConfigError."""
    given = config.curriculum.stages
    made = tuple(_stage(config, place, content) for place, content in enumerate(given))
    for place, stage in enumerate(made[:-1]):
        if not stage.metric and stage.steps == 0:
            cure = "give it steps, or a metric with at_least or at_most"
            raise ConfigError(f"curriculum.stages[{place}] never ends, so the next one never begins; {cure}")
    return made


def _stage(config: RunConfig, place: int, content: Mapping[str, object]) -> Stage:
    where = f"curriculum.stages[{place}]"
    for key in content:
        if key not in _KEYS:
            guess = difflib.get_close_matches(str(key), _KEYS, n=1, cutoff=0.5)
            hint = f"did you mean {guess[0]}?" if guess else f"it may have {', '.join(_KEYS)}"
            raise ConfigError(f"{where}: {shown(key)} is no key of a stage; {hint}")
    changed = content.get("environment") or {}
    if not isinstance(changed, Mapping):
        raise _refused(where, "environment", changed, "a mapping of settings of environment.*")
    environment = with_environment(config, changed, where).environment
    metric, low, high = _watched(where, content)
    return Stage(
        environment,
        _changes(config.environment, environment),
        metric,
        low,
        high,
        window=_whole(where, content, "window", 1, least=1),
        steps=_whole(where, content, "steps", 0, least=0),
    )


def _watched(where: str, content: Mapping[str, object]) -> tuple[str, float, float]:
    """The metric, and the bounds of its mean."""
    metric, bounds = content.get("metric", ""), [key for key in ("at_least", "at_most") if key in content]
    if not isinstance(metric, str) or metric.startswith("eval/"):
        raise _refused(where, "metric", metric, "the name of a figure of training steps, e.g. reward/mean")
    if bool(metric) != bool(bounds):
        cure = "a metric needs at_least or at_most" if metric else f"{bounds[0]} needs a metric"
        raise ConfigError(f"{where}: {cure}")
    if not metric and "window" in content:
        raise ConfigError(f"{where}: window needs a metric")
    low, high = _number(where, content, "at_least", -math.inf), _number(where, content, "at_most", math.inf)
    if low > high:
        raise _refused(where, "at_least", low, f"at most at_most={high:g}")
    return metric, low, high


def _number(where: str, content: Mapping[str, object], key: str, default: float) -> float:
    value = content.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise _refused(where, key, value, "a number")
    return float(value)


def _whole(where: str, content: Mapping[str, object], key: str, default: int, least: int) -> int:
    value = content.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _refused(where, key, value, f"a whole number, {least} or more")
    return value


def _refused(where: str, key: str, value: object, bound: str) -> ConfigError:
    return ConfigError(f"{where}: {key}={shown(value)} is not allowed: it must be {bound}")


def _changes(before: EnvironmentConfig, after: EnvironmentConfig) -> str:
    old, new = flatten(before), flatten(after)
    return " ".join(f"{key}={value}" for key, value in new.items() if old[key] != value) or "environment.*"
