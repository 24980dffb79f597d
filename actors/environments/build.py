"""From the config's name to an environment."""

from __future__ import annotations

from functools import partial

from actors.environments.base import Environment
from configs.schema import EmbedderConfig, EnvironmentConfig


def build_environment(config: EnvironmentConfig, embedder: EmbedderConfig) -> Environment:
    """The environment that ``config.name`` says, with ``config.reward`` if there is one; ``embedder`` is loaded only where it searches by meaning.

    Raises TaskError, ExtensionError or ValueError, one line, when its settings or its files cannot be used.
    """
    environment = _named(config, embedder)
    if not config.reward:
        return environment
    from actors.environments.custom import rewarded

    return rewarded(environment, config.reward)


def _named(config: EnvironmentConfig, embedder: EmbedderConfig) -> Environment:
    if config.name == "recall":
        from actors.environments.recall import RecallEnvironment

        return RecallEnvironment(config.recall)
    if config.name == "rubric":
        from actors.environments.rubric import RubricEnvironment

        return RubricEnvironment(config.rubric)
    if config.name == "search":
        from actors.environments.search import SearchEnvironment
        from actors.text.embedder import load_embedder

        return SearchEnvironment(config.search, partial(load_embedder, embedder))
    if config.name == "records":
        from actors.environments.records import RecordsEnvironment

        return RecordsEnvironment(config.records)
    if config.name == "custom":
        from actors.environments.custom import custom_environment

        return custom_environment(config)
    from actors.environments.conversation import ConversationEnvironment

    return ConversationEnvironment(config.conversation)
