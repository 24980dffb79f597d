"""The commands ``chat``, ``serve``, ``memory`` and ``export``: from their arguments to what they run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.common.arguments import Settings, complete_config, setting_words
from cluster.common.quiet import Verbose, quiet
from configs.bounds import ConfigError
from configs.foreign import FLAG

if TYPE_CHECKING:
    from cluster.assistant.opening import Opening

_DEFAULT_MODEL = "smollm2-135m"
CHAT_EXAMPLES = """examples:
  engram chat
  engram chat runs/quickstart-20260101-120000
  engram chat runs/quickstart-20260101-120000/checkpoints/step-000005
  engram chat Qwen/Qwen3-1.7B model.dtype=bfloat16 --memory ada
  printf '%s\\n' '/tell Ada moved to Oslo.' /write '/compare Where is Ada?' \\
      '/save ada' | engram chat runs/quickstart-20260101-120000

MODEL is smollm2-135m (the default, comes with the install), a run's folder, one of its checkpoints, an
exported model, any Hugging Face folder, or a hub name. A run brings its own settings. Other models take those
of the shipped configuration chat. A model that was not trained for it seldom writes a flashcard that parses;
the chat says so.
"""
SERVE_EXAMPLES = """examples:
  engram serve runs/quickstart-20260101-120000
  engram serve smollm2-135m --port 8123 assistant.save_dir=conversations
  engram serve runs/quickstart-20260101-120000 --host 0.0.0.0
  curl localhost:8000/v1/chat/completions \\
      -H 'Content-Type: application/json' \\
      -d '{"model": "quickstart-20260101-120000", "conversation": "ada",
           "messages": [{"role": "user", "content": "My name is Ada."}]}'

MODEL as for chat. Context and replies are at least as long as in the configuration chat. Endpoints: POST
/v1/chat/completions, /v1/responses and /v1/completions; GET /v1/models, /v1/conversations (with /ID what one
has written; DELETE forgets it), /metrics (Prometheus) and /health. What is not supported is refused by name.

The field "conversation" of a request, or its header X-Conversation-Id, names a conversation: letters, digits,
. _ - (64 at most). Its context and what it wrote live here. Send the new turns alone, or all of them each
time: what is known is not read again, and an edited history goes back to where it was the same
(assistant.edited_history). A request without a name goes on where its history was said, or is a new
conversation. Anybody who knows a name can talk to it: set ENGRAM_API_KEY, and every request except /health
must carry it as a bearer token.
"""
MEMORY_EXAMPLES = """examples:
  engram memory ada
  engram memory ada --correct '3=in Porto' --forget 5 --forget 6
  engram memory ada --model runs/quickstart-20260101-120000
  engram memory conversations/ada --forget 2 write.epochs=20
  engram memory conversations --model runs/quickstart-20260101-120000

Without options it lists the flashcards in the weights of a saved conversation; no model is loaded.

--correct and --forget name them by their numbers. The model is loaded, and Delta is written anew from the
flashcards that remain, since nothing takes one out of the weights. It says how many of them were learnt, and
which did not take. The folder is replaced at the end, or stays as it is. --model writes them onto another
model, which chat and serve never do: they refuse a saved conversation that is not one of their model.

FOLDER may also hold conversations, as a server's assistant.save_dir does. Without options they are listed.
With --model all of them are moved, with the model loaded once. One that fails stays as it was (status 1); the
same command again moves the rest.

Do not change a memory that a chat or a server has open: it is saved there again after its next turn.
"""
EXPORT_EXAMPLES = """examples:
  engram export runs/quickstart-20260101-120000 exported
  engram export runs/.../episodes/step-000005--train-19.0.json adapter
  engram export ada adapter
  vllm serve exported --enable-lora --max-lora-rank 8 \\
      --lora-modules episode=adapter

A run (its newest checkpoint) or a checkpoint becomes a Hugging Face folder. Where it trained a LoRA
(learner.trainable=lora) it becomes a PEFT adapter of the base model, or with --merge the folder.
A saved conversation, or an episode's record, becomes a PEFT adapter (adapter_config.json,
adapter_model.safetensors). An episode's writes are replayed on the weights that it was played on: the run's
checkpoint of that version, or --model.
"""

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="what to talk to", show_default=_DEFAULT_MODEL),
]
AllowCode = Annotated[
    bool, typer.Option(FLAG, help="run the code that the model's own settings name (trust_remote_code)")
]
Config = Annotated[
    str,
    typer.Option(
        "--config",
        metavar="CONFIG",
        help="a configuration in place of the run's settings, or of chat",
        autocompletion=complete_config,
        show_default=False,
    ),
]


def chat(
    model: Model = None,
    settings: Annotated[Settings, setting_words("memory.max_context_tokens=512")] = None,
    config: Config = "",
    memory: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="where the conversation lives: loaded, and saved again after every turn"
        ),
    ] = None,
    allow_code: AllowCode = False,
    verbose: Verbose = False,
) -> int:
    """Talk to an agent that learns in the conversation."""
    from cluster.common.display import Display

    display = Display()
    with quiet(verbose):
        from cluster.assistant.chat import chat as talk

        failures = talk(_opening(model, settings, config, allow_code), memory, sys.stdin, display)
    return 1 if failures else 0


def serve(
    model: Model = None,
    settings: Annotated[Settings, setting_words("assistant.max_conversations=32")] = None,
    config: Config = "",
    host: Annotated[
        str, typer.Option(metavar="HOST", help="where to listen; 127.0.0.1 is this machine alone")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="PORT", help="0 takes a free one")] = 8000,
    allow_code: AllowCode = False,
    verbose: Verbose = False,
) -> None:
    """Serve an OpenAI-compatible endpoint.

    Each conversation owns its memory.
    """
    from cluster.common.display import Display

    display = Display()
    with quiet(verbose):
        from cluster.assistant.opening import for_serving
        from cluster.assistant.serve import serve as listen

        opening = _opening(model, settings, config, allow_code)
        if not config:
            opening, changed = for_serving(opening, [*filter(None, [model]), *(settings or [])])
            if changed:
                display.say(f"larger than in the training: {changed}; a setting of yours stays as it is")
        listen(opening, host, port, display)


def memory(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="that /save, --memory or serve wrote; or a save_dir")
    ],
    settings: Annotated[Settings, setting_words("write.epochs=20")] = None,
    correct: Annotated[
        list[str] | None,
        typer.Option(metavar="N=ANSWER", help="give flashcard N the right answer; can be repeated"),
    ] = None,
    forget: Annotated[
        list[int] | None, typer.Option(metavar="N", help="forget flashcard N; can be repeated")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="write it onto this model", show_default="the one that it is a memory of"
        ),
    ] = "",
    config: Config = "",
    allow_code: AllowCode = False,
    verbose: Verbose = False,
) -> int:
    """Show a conversation's flashcards, correct or forget some.

    Or write them onto another model: those of one conversation, or of a folder of them.
    """
    from cluster.common.display import Display

    display = Display()
    with quiet(verbose):
        from cluster.assistant.tending import parse_edits
        from cluster.assistant.tending_command import change, show
        from configs.shipped import find_config

        edits = parse_edits(forget or (), correct or ())
        if edits or model:
            chosen = find_config(config) if config else None
            where = folder.expanduser()
            return int(change(where, edits, model, chosen, settings or [], allow_code, display) > 0)
        if settings:
            needs = "settings are for --correct, --forget and --model"
            raise ConfigError(f"argument {settings[0]!r}: {needs}; the list needs none")
        show(folder.expanduser(), display)
    return 0


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="a run, a checkpoint, a saved conversation or an episode's record; or its address (s3://)",
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="DIR", help="the new folder")],
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="of an episode: the weights it was played on, if its run lacks them"
        ),
    ] = "",
    merge: Annotated[
        bool,
        typer.Option("--merge", help="of a run that trained a LoRA: write the whole model"),
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """Export a checkpoint, or a memory.

    A checkpoint becomes a Hugging Face folder (a PEFT adapter where it trained a LoRA), a memory a PEFT
    adapter.
    """
    from cluster.common.display import Display

    with quiet(verbose=False):
        from cluster.assistant.export import export as write
        from cluster.runs.from_store import local_copy

        found = local_copy(source, weights=True).expanduser()
        what = write(found, target.expanduser(), model, merge, allow_code)
    Display().say(f"{target}: {what}")


def _opening(model: str | None, settings: list[str] | None, config: str, allow_code: bool) -> Opening:
    """The model to talk to. The first word may be a setting: then the model is the default one."""
    from cluster.assistant.opening import prepare_opening
    from configs.shipped import find_config

    overrides = settings or []
    if model is None or "=" in model:
        overrides, model = [*filter(None, [model]), *overrides], _DEFAULT_MODEL
    return prepare_opening(model, find_config(config) if config else None, overrides, allow_code)
