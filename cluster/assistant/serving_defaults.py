"""Gives ``serve`` a context and replies of its own: a model may have been trained with far shorter ones.

A run that was trained on contexts of 54 tokens and answers of 8 would else be served with them. What the
user sets stays. Nothing is made shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cluster.assistant.opening import PRESET, Opening
from configs.bounds import BoundError
from configs.load import load_config
from configs.schema import RunConfig

_WINDOW = "engine.max_model_tokens"
_KEYS = (
    "memory.max_context_tokens",
    "memory.max_extract_tokens",
    "sampling.max_answer_tokens",
    _WINDOW,
    "engine.kv_cache_gib",
)


def for_serving(opening: Opening, overrides: Sequence[str]) -> tuple[Opening, str]:
    """``opening`` with at least the sizes of configs/chat.yaml, and a line about what that changed, or "".

    Nothing changes where the model's window is smaller than that, where the user sets the window, or where
    the larger sizes do not fit beside those that stay.
    """
    floor, own = load_config(PRESET, []), opening.config
    given = {argument.partition("=")[0] for argument in overrides}
    window = opening.model.max_positions
    if _WINDOW in given or window < floor.engine.max_model_tokens:
        return opening, ""
    sections: dict[str, dict[str, float]] = {}
    changed = []
    for key in _KEYS:
        was, least = _value(own, key), _value(floor, key)
        if key not in given and was is not None and least is not None and was < least:
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = least
            changed.append(f"{key}={least:g} (trained with {was:g})")
    try:  # all at once: a larger context alone may not fit into the window as it was
        larger: dict[str, Any] = {name: replace(getattr(own, name), **new) for name, new in sections.items()}
        return replace(opening, config=replace(own, **larger)), ", ".join(changed)
    except BoundError:
        return opening, ""


def _value(config: RunConfig, key: str) -> float | None:
    section, _, name = key.partition(".")
    value: float | None = getattr(getattr(config, section), name)
    return value
