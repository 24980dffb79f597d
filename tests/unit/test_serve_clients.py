"""``serve`` as clients use it: the official one, over a real socket, and by hand; the engine is scripted."""

from __future__ import annotations

import gzip
import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from openai.types.chat import ChatCompletionMessageParam as MessageParam
from prometheus_client.parser import text_string_to_metric_families

from actors.text.chat_template import ChatFormat
from actors.text.flashcards import render_flashcards
from actors.types import AdapterKey, Generation, Sampling
from cluster.assistant.connections import Protocol
from cluster.assistant.known import KEPT_TURNS, _kept
from cluster.assistant.opening import Parts
from cluster.assistant.serve import build_app
from cluster.assistant.sessions import Sessions
from tests.unit.rollout_fakes import sampled
from tests.unit.test_serve import (
    CARD,
    CHAT,
    Engine,
    body,
    chat,
    engine,
    limited,
    opening,
    parts,
    said,
    serving,
    streamed,
)
from tests.unit.test_serve_history import says

__all__ = ["chat", "engine", "opening", "parts"]  # fixtures

ASKED: list[MessageParam] = [{"role": "user", "content": "What does a lamp cost?"}]


@contextmanager
def listening(parts: Parts) -> Iterator[str]:
    """A real server; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = uvicorn.Config(build_app(parts, Sessions(parts, 2), ""), http=Protocol, log_config=None)
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, args=([taken],), daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)


@pytest.fixture
def url(parts: Parts) -> Iterator[str]:
    config = parts.opening.config
    wide = replace(config, memory=replace(config.memory, max_context_tokens=600))
    with listening(replace(parts, opening=replace(parts.opening, config=wide))) as address:
        yield address


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


# --- names of fields, in each route's own words ---------------------------------------------------------


def words(count: int) -> str:
    return "word " * count


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input"),
        ({"input": [{"role": "system", "content": "x"}]}, "input"),
        ({"instructions": words(400)}, "instructions"),
        ({"input": [{"role": "system", "content": words(400)}, {"role": "user", "content": "x"}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
        ({"stream_options": {"every": 3}}, "stream_options.every"),
        ({"conversation": "a", "instructions": "Be rude."}, "instructions"),
        (
            {
                "conversation": "a",
                "input": [
                    {"role": "user", "content": "Other?"},
                    {"role": "assistant", "content": "No."},
                    {"role": "user", "content": "Who?"},
                ],
            },
            "input",
        ),
    ],
)
def test_an_error_of_a_response_names_what_was_sent(
    parts: Parts, given: dict[str, object], place: str
) -> None:
    with serving(parts) as client:
        sent = {"model": "tiny", "input": "Who?"}
        assert client.post("/v1/responses", json={**sent, "conversation": "a"}).status_code == 200
        error = client.post("/v1/responses", json={**sent, **given}).json()["error"]
        cut = client.post("/v1/responses", json={**sent, "max_output_tokens": 10**6}).json()["engram"]
    assert error["param"] == place and "messages[" not in error["message"]
    assert list(cut["limited"]) == ["max_output_tokens"]


def test_an_edited_message_is_named_by_its_own_place(parts: Parts) -> None:
    with serving(limited(parts, edited_history="refuse")) as client:
        told = {"role": "system", "content": "Be kind."}
        said(client, body(told, "Nora lives in Lisbon.", conversation="a"))
        said(client, body(told, "Nora lives in Lisbon.", says("under 0"), "Where?", conversation="a"))
        edited = body(told, "Nora lives in Lisbon.", says("edited"), "Why?", conversation="a")
        refused = client.post(CHAT, json=edited).json()["error"]
        messages: Any = edited["messages"]
        items = [{"role": message["role"], "content": message["content"]} for message in messages]
        response = {"model": "tiny", "conversation": "a", "input": items}
        of_response = client.post("/v1/responses", json=response).json()["error"]
    assert refused["message"].startswith("messages[2] is not what was said then")
    assert of_response["message"].startswith("input[2] is not") and of_response["param"] == "input"


# --- far back in a conversation -------------------------------------------------------------------------


def test_one_can_go_back_any_distance_and_what_lies_between_is_read_again(
    parts: Parts, engine: Engine
) -> None:
    with serving(parts) as client:
        sent: list[Any] = []
        for number in range(3 * KEPT_TURNS):
            engine.text = f"Answer {number}."
            sent.append(f"Fact {number} is told.")
            assert said(client, body(*sent, conversation="a"))["engram"]["new"] is (number == 0)
            sent.append(says(engine.text))
        for place in (6, 1):
            engine.text = "Again."
            branch = [*sent[: 2 * place], "And this?"]
            answered = said(client, body(*branch, conversation="a"))["engram"]
            assert not answered["new"]
            assert f"Fact {place} is told." not in engine.asked and "Fact 20" not in engine.asked
            assert engine.asked.count("And this?") == 1
            assert f"Answer {place - 1}." in engine.asked  # the newest that it knows


def test_a_history_that_a_client_trimmed_or_summed_up_loses_no_memory(parts: Parts, engine: Engine) -> None:
    with serving(parts) as client:
        sent: list[Any] = []
        for number in range(2 * KEPT_TURNS + 2):
            engine.text = f"Answer {number}."
            sent.append(f"Fact {number} is told.")
            said(client, body(*sent, conversation="a"))
            sent.append(says(engine.text))
        trimmed = [*sent[:2], *sent[-6:], "And this?"]
        summed_up = [sent[0], says("A summary."), "And this?"]
        for history in (trimmed, summed_up):
            response = client.post("/v1/chat/completions", json=body(*history, conversation="a"))
            assert response.status_code == 409, response.text
            assert "others are left out" in response.json()["error"]["message"]
        assert said(client, body(*sent, "And this?", conversation="a"))["engram"]["new"] is False
        sent += ["And this?", says(engine.text)]
        edited = [*sent[:2], "Another fact is told.", *sent[3:], "What now?"]  # as long as before
        assert said(client, body(*edited, conversation="a"))["engram"]["new"] is False


def test_of_older_turns_ever_fewer_are_kept_and_always_the_first() -> None:
    places: list[int] = []
    for turn in range(2000):
        places = _kept([*places, 2 * turn])
        assert places[0] == 0 and places == sorted(places) and len(places) <= KEPT_TURNS + 12
        assert places[-KEPT_TURNS:] == [2 * t for t in range(max(0, turn - KEPT_TURNS + 1), turn + 1)]
    distances = [places[-1] - place for place in places]
    assert all(after > before / 5 for before, after in pairwise(distances[:-KEPT_TURNS]))
    assert _kept([*range(0, 100, 2)]) == [0, 36, 68, *range(84, 100, 2)]


# --- where a reply is cut -------------------------------------------------------------------------------


def test_a_character_that_a_bound_cuts_in_two_is_left_out(parts: Parts, chat: ChatFormat) -> None:
    whole = chat.reply("Good 😀 day")
    cuts = [size for size in range(1, len(whole)) if chat.decode(whole[:size]).endswith("\ufffd")]
    assert cuts, "the emoji is one token here"

    def script(prompt: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        assert sampling.kind == "act", render_flashcards([CARD])
        return sampled(whole[: cuts[0]], "length")

    engine = Engine(chat)
    engine._script = script
    with serving(replace(parts, policy=engine)) as client:
        answered = said(client, body())
        text, given = streamed(client, body())
        plain = client.post("/v1/completions", json={"model": "tiny", "prompt": "x"}).json()["choices"][0]
    assert (
        answered["choices"][0]["message"]["content"].strip()
        == text.strip()
        == plain["text"].strip()
        == "Good"
    )
    assert given[-1]["choices"][0]["finish_reason"] == plain["finish_reason"] == "length"


def test_log_probs_end_where_the_text_does(client: openai.OpenAI, engine: Engine) -> None:
    engine.text = "Nora lives in Lisbon, high above the river."
    asked: Any = {"model": "tiny", "messages": ASKED, "logprobs": True}
    for stop in (" high above", "high above"):  # the token " high" says one more blank, or nothing
        chosen = client.chat.completions.create(**asked, stop=[stop]).choices[0]
        tokens = [token.token for token in (chosen.logprobs and chosen.logprobs.content) or ()]
        assert "".join(tokens[:-1]) != chosen.message.content == engine.text.partition(stop)[0]
        assert "".join(tokens).removesuffix("high") == chosen.message.content
        older = client.completions.create(model="tiny", prompt="x", stop=stop, logprobs=1).choices[0]
        assert older.logprobs and older.logprobs.tokens == tokens


def test_chunks_count_tokens_where_that_is_asked(client: openai.OpenAI, engine: Engine) -> None:
    engine.text = "Nora, in Lisbon."
    for options in ({"include_usage": True}, None):
        wanted: Any = {"model": "tiny", "stream": True, "stream_options": options}
        for chunks in (
            [*client.chat.completions.create(messages=ASKED, **wanted)],
            [*client.completions.create(prompt="x", **wanted)],
        ):
            told = ["usage" in chunk.model_fields_set for chunk in chunks]
            assert told == [options is not None] * len(chunks)
            assert [chunk.usage is not None for chunk in chunks[:-1]] == [False] * (len(chunks) - 1)


def test_the_same_prompt_is_sampled_anew_unless_it_has_a_seed(client: openai.OpenAI, engine: Engine) -> None:
    for given in ({}, {}, {"seed": 7}, {"seed": 7}):
        sampling: Any = {"temperature": 1, **given}
        client.completions.create(model="tiny", prompt="Once", **sampling)
    seeds = [sampling.seed for _, sampling, _ in engine.calls]
    assert len({*seeds}) == 3 and seeds[2:] == [7, 7]


# --- HTTP -----------------------------------------------------------------------------------------------


def test_head_is_answered_and_a_wrong_method_hears_the_right_ones(url: str) -> None:
    for path in ("/health", "/v1/models", "/metrics", "/v1/conversations"):
        head, get = httpx.head(url + path), httpx.get(url + path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
    for path, allowed in (
        (CHAT, "POST"),
        ("/health", "GET, HEAD"),
        ("/v1/conversations/a", "DELETE, GET, HEAD"),
        ("/v1/conversations/a/memory", "GET, HEAD, PATCH"),
    ):
        refused = httpx.put(url + path)
        assert (refused.status_code, refused.headers["allow"]) == (405, allowed)
        assert refused.json()["error"]["code"] == "method_not_allowed"
    missing = httpx.head(f"{url}/nothing")
    assert missing.status_code == 404 and "allow" not in missing.headers


def test_a_body_comes_in_pieces_and_not_packed(url: str) -> None:
    sent, headers = json.dumps(body()).encode(), {"Content-Type": "application/json"}
    pieces = (sent[i : i + 7] for i in range(0, len(sent), 7))
    assert httpx.post(url + CHAT, content=pieces, headers=headers).status_code == 200
    packed = httpx.post(
        url + CHAT, content=gzip.compress(sent), headers={**headers, "Content-Encoding": "gzip"}
    )
    assert packed.status_code == 415 and "'gzip'" in packed.json()["error"]["message"]


def test_conversations_are_listed_in_pages(parts: Parts) -> None:
    with serving(parts) as client:
        for name in "dbace":
            said(client, body(conversation=name))
        names, after, pages = [], "", 0
        while True:
            page = client.get(f"/v1/conversations?limit=2&after={after}").json()
            names += [held["id"] for held in page["data"]]
            after, pages = page["last_id"], pages + 1
            if not page["has_more"]:
                break
        assert (names, pages, page["first_id"], after) == (["a", "b", "c", "d", "e"], 3, "e", "e")
        whole = client.get("/v1/conversations").json()
        assert [held["id"] for held in whole["data"]] == names and not whole["has_more"]
        empty = client.get("/v1/conversations?after=e").json()
        assert (empty["data"], empty["last_id"], empty["has_more"]) == ([], None, False)
        for wrong in ("0", "x", "-1", "1e3"):
            error = client.get(f"/v1/conversations?limit={wrong}")
            assert error.status_code == 400 and error.json()["error"]["param"] == "limit"


def test_a_scraper_can_read_the_figures(url: str, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="tiny", messages=ASKED)
    httpx.get(f"{url}/v1/models/some/other")
    families = {
        family.name: family for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    }
    assert all(re.fullmatch(r"engram:[a-z_]+", name) for name in families)
    assert all(family.documentation for family in families.values())
    routes = {sample.labels.get("route") for sample in families["engram:requests"].samples}
    assert routes >= {CHAT, "/v1/models/{wanted}"}
