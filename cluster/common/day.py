"""Pins the day that a chat template writes into prompts (Llama 3.2): a run must not change at midnight."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from pathlib import Path

from actors.text.chat_template import ChatFormat
from configs.load import load_config
from configs.schema import RunConfig


def with_day(config: RunConfig, chat: ChatFormat, day: str) -> RunConfig:
    """``config`` with ``model.date``. Nothing changes where it is set, or where the template names no day.

    ``day``: what an earlier part of the run had, "" for today.
    """
    if config.model.date or not chat.is_dated:
        return config
    return replace(config, model=replace(config.model, date=day or dt.date.today().isoformat()))


def day_in(config_path: Path) -> str:
    """``model.date`` in the file of settings of a run; "" without such a file. Raises ConfigError."""
    return load_config(config_path, []).model.date if config_path.exists() else ""
