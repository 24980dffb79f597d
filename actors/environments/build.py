"""From the config's name to an environment."""

from __future__ import annotations

from actors.environments.base import Environment
from configs.schema import EnvironmentConfig


def build_environment(config: EnvironmentConfig) -> Environment:
    """The environment that ``config.name`` says. Raises TaskError or ValueError, one line, when its settings or its file cannot be used."""
    if config.name == "recall":
        from actors.environments.recall import RecallEnvironment

        return RecallEnvironment(config.recall)
    from actors.environments.conversation import ConversationEnvironment

    return ConversationEnvironment(config.conversation)
