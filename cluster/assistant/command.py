"""The ``chat``, ``serve`` and ``export`` subcommands: their arguments, and from them to what they run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.assistant.opening import Opening

COMMANDS = ("chat", "serve", "export")
_MODEL = "smollm2-135m"
_CHAT = """MODEL: smollm2-135m (comes with the install, the default), a run's folder, one of its checkpoints, an exported model, any
Hugging Face folder, or a hub name. A run brings its own settings; for other models they are those of configs/chat.yaml.
A model that was not trained for it seldom writes a flashcard that parses: the chat says so.

examples:
  python -m cluster chat
  python -m cluster chat runs/quickstart-20260101-120000
  python -m cluster chat runs/quickstart-20260101-120000/checkpoints/step-000005 memory.max_context_tokens=256 sampling.max_answer_tokens=64
  python -m cluster chat Qwen/Qwen3-1.7B model.dtype=bfloat16 --memory ada
  printf '%s\\n' '/tell Ada moved to Oslo.' /write '/compare Where is Ada?' '/save ada' | python -m cluster chat runs/quickstart-20260101-120000
"""
_SERVE = """MODEL: as for chat. Endpoints: GET /v1/models, POST /v1/chat/completions (with stream: true the answer comes in one piece when it
is there), GET /health, GET and DELETE /v1/conversations/ID (what it has written; forget it).

A conversation is named by the field "conversation" of a request, or its header X-Conversation-Id: letters, digits, . _ - (64 at most).
Its context and what it wrote live here, so only the user turns after the last assistant turn of a request are new; what stands before
them is read once, when the conversation begins. A request without a name is a conversation of its own, forgotten when it is answered.
Whoever knows a name talks to it: set ENGRAM_API_KEY, and every request but /health must carry it as a bearer token.

examples:
  python -m cluster serve runs/quickstart-20260101-120000
  python -m cluster serve smollm2-135m --port 8123 assistant.save_dir=conversations assistant.max_conversations=32
  python -m cluster serve runs/quickstart-20260101-120000 --host 0.0.0.0
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "quickstart-20260101-120000", "conversation": "ada",
      "messages": [{"role": "user", "content": "My name is Ada."}]}'
"""
_EXPORT = """SOURCE: a run (its newest checkpoint) or a checkpoint -> a Hugging Face folder; a saved conversation, or an episode's record
-> a PEFT adapter (adapter_config.json, adapter_model.safetensors). An episode's writes are replayed on the weights that it was played on:
the run's checkpoint of that version, or --model.

examples:
  python -m cluster export runs/quickstart-20260101-120000 exported
  python -m cluster export runs/quickstart-20260101-120000/episodes/step-000005--train-19.0.json adapter
  python -m cluster export ada adapter
  vllm serve exported --enable-lora --max-lora-rank 8 --lora-modules episode=adapter
"""


def add_assistant(commands: Any) -> None:
    chat = _add(commands, "chat", "talk to an agent that learns in the conversation", _CHAT)
    _add_model(chat)
    chat.add_argument("--memory", type=Path, metavar="DIR", help="go on from a saved memory, as /load does")
    serve = _add(
        commands, "serve", "an OpenAI-compatible endpoint where each conversation owns its memory", _SERVE
    )
    _add_model(serve)
    serve.add_argument(
        "--host", default="127.0.0.1", help="where to listen (default 127.0.0.1: this machine alone)"
    )
    serve.add_argument("--port", type=_port, default=8000, help="default 8000; 0 takes a free one")
    export = _add(
        commands, "export", "a checkpoint as a Hugging Face folder, a memory as a PEFT adapter", _EXPORT
    )
    export.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a run, a checkpoint, a saved conversation or an episode's record",
    )
    export.add_argument("target", type=Path, metavar="DIR", help="the new folder")
    export.add_argument(
        "--model",
        default="",
        metavar="MODEL",
        help="of an episode: the weights it was played on, where they are not in its run",
    )


def run_assistant(options: argparse.Namespace) -> int:
    """The exit status. Raises what the three commands raise."""
    return {"chat": _chat, "serve": _serve, "export": _export}[options.command](options)


def _chat(options: argparse.Namespace) -> int:
    from cluster.assistant.chat import chat
    from cluster.common.display import Display

    return 1 if chat(_opening(options), options.memory, sys.stdin, Display()) else 0


def _serve(options: argparse.Namespace) -> int:
    from cluster.assistant.serve import serve
    from cluster.common.display import Display

    serve(_opening(options), options.host, options.port, Display())
    return 0


def _export(options: argparse.Namespace) -> int:
    from cluster.assistant.export import export
    from cluster.common.display import Display

    what = export(options.source.expanduser(), options.target.expanduser(), options.model)
    Display().say(f"{options.target}: {what}")
    return 0


def _opening(options: argparse.Namespace) -> Opening:
    from cluster.assistant.opening import prepare_opening

    named = [options.model] if options.model is not None else []
    overrides = [*(one for one in named if "=" in one), *options.overrides]
    return prepare_opening(next((one for one in named if "=" not in one), _MODEL), options.config, overrides)


def _add(commands: Any, name: str, text: str, examples: str) -> Any:
    description = f"{text[0].upper()}{text[1:]}."
    return commands.add_parser(
        name,
        help=text,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_model(command: Any) -> None:
    command.add_argument(
        "model", nargs="?", default=None, metavar="MODEL", help="what to talk to (default smollm2-135m)"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that differ, e.g. memory.max_context_tokens=512",
    )
    command.add_argument(
        "--config",
        type=Path,
        metavar="CONFIG",
        help="a YAML file in place of the run's settings, or of configs/chat.yaml",
    )


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give a whole number, 0 to 65535")
    return int(text)
