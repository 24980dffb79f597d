"""The ``try`` command: from its arguments to one task of an environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.common.arguments import Settings, complete_config, setting_words
from cluster.common.printable import visible
from configs.bounds import ConfigError

EXAMPLES = """examples:
  engram try recall --reply Lisbon --reply "a baker"
  engram try my_shop:Shop --replies replies.txt         yours, in my_shop.py
  engram try my_shop:Shop environment.options.items=3   replies are typed
  engram try quickstart --task 7 --tokens               with each token's id
  engram try records environment.records.path=my.jsonl --reply Oslo

Prints each context as the agent would see it, with its tokens, where it would be full and what is extracted
then, and at the end answers and reward. It needs a tokenizer, and neither Ray nor weights. A file of replies
has one a line; a line in JSON's quotes may hold line breaks ("first\\nsecond"). The exit status is 1 for a
fault of the environment, which is shown with your file and line.
"""


def complete_environment(incomplete: str) -> list[str]:
    return [name for name in _environments() if name.startswith(incomplete)] + complete_config(incomplete)


def try_environment(
    environment: Annotated[
        str,
        typer.Argument(
            metavar="ENV|CONFIG",
            help="an environment by name, your own as module:Class, or a configuration",
            autocompletion=complete_environment,
            show_default=False,
        ),
    ],
    settings: Annotated[Settings, setting_words("memory.max_context_tokens=200")] = None,
    reply: Annotated[
        list[str] | None,
        typer.Option("--reply", metavar="TEXT", help="what the agent says; again for each reply"),
    ] = None,
    replies: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the same from a file, a reply a line")
    ] = None,
    task: Annotated[int, typer.Option(min=0, metavar="N", help="which task of the split")] = 0,
    split: Annotated[
        Literal["train", "eval"], typer.Option(metavar="train|eval", help="training or held-out tasks")
    ] = "train",
    tokens: Annotated[bool, typer.Option("--tokens", help="also print every token with its id")] = False,
) -> None:
    """Play one task of an environment with replies of your own.

    Without Ray and without a model. Replies that are not given are typed.
    """
    if reply and replies:
        raise ConfigError("arguments --reply and --replies: give one of them")
    path, overrides = _configuration(environment, settings or [])

    from rich.console import Console

    from actors.protocols import MemoryFault, TaskError
    from cluster.inspection.trial import Replies, Trial, read_replies, try_task, typed_reply
    from configs.load import load_config

    config = load_config(path, overrides)
    texts = read_replies(replies) if replies else reply
    given = Replies(texts) if texts is not None else Replies(None, typed_reply)
    try:
        try_task(config, Trial(split, task, tokens), given, Console(highlight=False))
    except (TaskError, MemoryFault) as error:
        typer.echo(f"fault: {visible(' '.join(str(error).split()))}", err=True)
        raise typer.Exit(1) from None


def _configuration(environment: str, settings: list[str]) -> tuple[Path | None, list[str]]:
    """The file and the settings of what is tried. Raises ConfigError."""
    from configs.shipped import find_config
    from configs.user_code import is_path

    if is_path(environment):
        return None, ["environment.name=custom", f"environment.custom={environment}", *settings]
    if environment in _environments():
        return None, [f"environment.name={environment}", *settings]
    return find_config(environment), settings


def _environments() -> tuple[str, ...]:
    """The environments that come with Engram."""
    from typing import get_args, get_type_hints

    from configs.schema import EnvironmentConfig

    names: tuple[str, ...] = get_args(get_type_hints(EnvironmentConfig)["name"])
    return tuple(name for name in names if name != "custom")
