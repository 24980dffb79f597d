"""A real server and the openai client: what a request may set, streams, and conversations side by side."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from openai.types.chat.chat_completion import Choice

from actors.types import Flashcard
from cluster.assistant.connections import MOST_SILENT
from cluster.assistant.memory_file import SavedMemory, load_memory, save_memory
from cluster.assistant.opening import prepare_opening
from tests.integration.assistant_cases import write_cards, write_run

ROOT = Path(__file__).parents[2]
QUESTION = "Where does Nora live?"
START_S = 300


@pytest.fixture(scope="module")
def saved(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and a folder of saved conversations: two of each of two memories.

    The cards are given: a random model writes no flashcards of its own.
    """
    run = write_run(tiny_model_path, tmp_path_factory.mktemp("runs") / "tiny-run")
    opening, folder = prepare_opening(str(run), None, ()), tmp_path_factory.mktemp("conversations")
    for name, answer in (("lisbon", "in Lisbon"), ("oslo", "high above Oslo, with Omar")):
        weights, log = write_cards(opening, [[Flashcard(QUESTION, answer)]])
        memory = SavedMemory(weights, opening.system_prompt, (), tuple(log), None)
        for number in (1, 2):
            save_memory(memory, opening, folder / f"{name}-{number}", overwrite=False)
    return run, folder


@pytest.fixture(scope="module")
def served(saved: tuple[Path, Path]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    run, folder = saved
    command = [sys.executable, "-m", "cluster", "serve", str(run), "--port", "0"]
    command += [f"assistant.save_dir={folder}", "engine.slots=3"]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        first_line = ThreadPoolExecutor(1).submit(
            lambda: next(line for line in process.stdout or () if line.startswith("serving tiny-run on "))
        )
        try:
            match = re.search(r"http://127\.0\.0\.1:\d+/v1", first_line.result(START_S))
            assert match is not None
            yield match[0], process
        finally:
            process.kill()


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", timeout=240, max_retries=0)


def user(text: str) -> ChatCompletionMessageParam:
    return {"role": "user", "content": text}


def test_the_settings_of_a_request_reach_the_engine(served: tuple[str, subprocess.Popen[str]]) -> None:
    client = client_of(served[0])
    model = client.models.list().data[0].id
    assert client.models.retrieve(model).id == model

    def say(**given: Any) -> Choice:
        asked = {"model": model, "messages": [user(QUESTION)], "max_tokens": 12, **given}
        choice: Choice = client.chat.completions.create(**asked).choices[0]
        return choice

    plain = say(logprobs=True, top_logprobs=2)
    text, tokens = plain.message.content or "", (plain.logprobs and plain.logprobs.content) or []
    assert len(tokens) == 12 and plain.finish_reason == "length"
    assert all(token.logprob == token.top_logprobs[0].logprob for token in tokens)  # greedy
    stop = text[4:8]
    assert say(stop=stop).message.content == text.partition(stop)[0]
    hot = [say(temperature=1.0, seed=seed).message.content for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    for given in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}):
        assert say(temperature=1.0, seed=3, **given).message.content == text, given
    # below 1 it says again what was said: this model does not repeat itself, so nothing else would show
    again = {"presence_penalty": -2, "frequency_penalty": -2, "extra_body": {"repetition_penalty": 0.01}}
    assert say(**again).message.content != text
    first = client.completions.create(model=model, prompt="The sea", max_tokens=1, logprobs=1)
    assert first.usage is not None and first.usage.completion_tokens == 1
    choices = {"enum": ["Oslo", "Lisbon"]}
    schema: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": choices}}
    kept = say(response_format=schema)
    assert json.loads(kept.message.content or "") in choices["enum"] and kept.finish_reason == "stop"
    least = say(response_format=schema, logprobs=True, top_logprobs=5).logprobs  # a mask leaves fewer than 5
    assert least and min(top.logprob for token in least.content or () for top in token.top_logprobs) == -9999
    for wrong in ({"type": "string", "pattern": "("}, {"type": "colour"}):
        schema["json_schema"]["schema"] = wrong
        with pytest.raises(openai.BadRequestError):
            say(response_format=schema)
    with pytest.raises(openai.BadRequestError, match="vLLM refuses"):
        say(logit_bias={"999999": 1})
    assert say().message.content == text  # the engine lives


def test_a_stream_comes_as_it_is_sampled_and_a_client_that_goes_leaves_nothing(
    served: tuple[str, subprocess.Popen[str]],
) -> None:
    client = client_of(served[0])
    model = client.models.list().data[0].id
    asked: Any = {"model": model, "messages": [user("Tell me a story.")], "max_tokens": 40, "stream": True}
    times, texts = [], []
    for chunk in client.chat.completions.create(**asked, stream_options={"include_usage": True}):
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.perf_counter())
            texts.append(chunk.choices[0].delta.content)
        usage = chunk.usage
    assert usage is not None and usage.completion_tokens == 40 and len(texts) > 20
    assert times[1] - times[0] < (times[-1] - times[0]) / 2
    whole = client.chat.completions.create(
        **{**asked, "stream": False, "messages": [user("Tell me a story.")]}
    )
    assert whole.choices[0].message.content == "".join(texts)
    spoken = client.responses.create(model=model, input="Tell me a story.", max_output_tokens=40)
    assert spoken.output_text == "".join(texts) and spoken.status == "incomplete"
    kinds = [event.type for event in client.responses.create(model=model, input="Hello.", stream=True)]
    assert kinds[0] == "response.created" and kinds.count("response.output_text.delta") > 1

    asked |= {"max_tokens": 192, "extra_body": {"conversation": "gone"}}
    with client.chat.completions.create(**asked) as stream:
        next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(**{**asked, "stream": False})
    url = served[0].removesuffix("/v1")
    deadline = time.monotonic() + 60
    while "turns_running 0.0" not in (figures := httpx.get(f"{url}/metrics").text):
        assert time.monotonic() < deadline, figures
        time.sleep(0.1)
    assert httpx.get(f"{served[0]}/conversations/gone").status_code == 404
    assert 'status="499"' in figures and "engram:time_to_first_token_seconds_count" in figures


def is_open(connection: socket.socket) -> bool:
    """True if nothing can be read: neither an end nor an answer."""
    return not select.select([connection], [], [], 0)[0]


def test_half_open_connections_and_foreign_hosts_stop_nobody(
    served: tuple[str, subprocess.Popen[str]],
) -> None:
    host, port = served[0].removeprefix("http://").removesuffix("/v1").split(":")
    half_open = [socket.create_connection((host, int(port))) for _ in range(600)]
    try:
        for connection in half_open:
            with suppress(OSError):
                connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nX-Slow: ")
        assert httpx.get(f"http://{host}:{port}/health", timeout=30).status_code == 200
        still_open = [place for place, connection in enumerate(half_open) if is_open(connection)]
        assert MOST_SILENT - 10 < len(still_open) <= MOST_SILENT, len(still_open)
        assert still_open == [*range(600 - len(still_open), 600)]  # the oldest were closed
    finally:
        for connection in half_open:
            connection.close()
    assert httpx.get(f"http://{host}:{port}/health", headers={"Host": "evil.com"}).status_code == 421
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{host}:{port}/health", headers={"X": "y" * 200_000}).raise_for_status()


def test_conversations_own_their_memories_and_are_put_away_at_the_end(
    saved: tuple[Path, Path], served: tuple[str, subprocess.Popen[str]]
) -> None:
    url, process = served
    client = client_of(url)
    model = client.models.list().data[0].id

    def ask(conversation: str, stream: bool = False) -> str:
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]
        if not stream:
            answer = client.chat.completions.create(
                model=model, messages=messages, extra_body={"conversation": conversation}
            )
            return answer.choices[0].message.content or ""
        pieces = client.chat.completions.create(
            model=model, messages=messages, stream=True, extra_headers={"X-Conversation-Id": conversation}
        )
        return "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)

    kinds = ("lisbon", "oslo", "nobody")
    alone = [ask(f"{kind}-1") for kind in kinds]
    assert len(set(alone)) == 3, alone
    with ThreadPoolExecutor(3) as together:
        assert list(together.map(lambda kind: ask(f"{kind}-2", stream=True), kinds)) == alone

    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "?"}])
    with pytest.raises(openai.BadRequestError, match="conversation must be"):
        ask("../x")

    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    run, folder = saved
    opening = prepare_opening(str(run), None, ())
    expected = {f"{kind}-{number}" for kind in kinds for number in (1, 2)}
    assert {path.name for path in folder.iterdir()} == expected
    again = load_memory(folder / "oslo-2", opening)
    assert again.weights.revision == 1
    assert again.cards[0].answer == "high above Oslo, with Omar"
    assert len(again.context_ids) > 10
