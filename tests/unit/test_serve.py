"""The HTTP side of ``serve`` with a scripted engine; tests/integration/test_serve.py has a real one."""

from __future__ import annotations

import asyncio
import json
import select
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from uvicorn.server import ServerState

from actors.endpoint.answers import SaidChoice
from actors.endpoint.requests import RequestError
from actors.episodes.rollout import WriteBatcher
from actors.fast_weights.basis import make_basis
from actors.speech import Decoding
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import render_flashcards
from actors.types import AdapterKey, Flashcard, Generation, Sampling
from cluster.assistant.answering import Manner
from cluster.assistant.connections import MOST_SILENT, Protocol
from cluster.assistant.conversation import Conversation
from cluster.assistant.metrics import Metrics
from cluster.assistant.openai_answers import Chunks
from cluster.assistant.openai_format import parse_request
from cluster.assistant.opening import Opening, Parts, for_serving
from cluster.assistant.serve import build_app
from cluster.assistant.sessions import Sessions
from cluster.assistant.turns import answer
from configs.load import load_config
from configs.models import resolve_model
from configs.schema import ModelConfig
from tests.unit.rollout_fakes import MODULE, ScriptedPolicy, ScriptedWriter, sampled

CARD = Flashcard("Who lives in Lisbon?", "Nora")
SETTINGS = (
    "memory.max_context_tokens=160",
    "memory.max_extract_tokens=64",
    "engine.max_model_tokens=1500",
    "sampling.max_answer_tokens=48",
)
CHAT = "/v1/chat/completions"
PRICE = {"name": "price", "description": "Of an item.", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": PRICE}]
CALL = 'Let me see.\n<tool_call>{"name": "price", "arguments": {"item": "lamp"}}</tool_call>'


class Engine(ScriptedPolicy):
    """Says ``text``, or the revision that it acts under; writes one card."""

    def __init__(self, chat: ChatFormat) -> None:
        self.text = ""
        self._chat = chat

        def script(prompt: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
            text = self.text or f"under {adapter.revision}"
            return sampled(chat.reply(render_flashcards([CARD]) if sampling.kind == "extract" else text))

        super().__init__(script)

    @property
    def asked(self) -> str:
        """The prompt of the last reply, as text."""
        return self._chat.decode(next(ids for ids, sampling, _ in self.calls[::-1] if sampling.kind == "act"))


@pytest.fixture(scope="module")
def opening(tiny_model_path: Path) -> Opening:
    config = load_config(None, [f"model.name={tiny_model_path}", *SETTINGS])
    basis = make_basis("random", {MODULE: torch.arange(6.0).reshape(2, 3)}, {MODULE: 4}, False)
    return Opening("tiny", config, resolve_model(ModelConfig(name=str(tiny_model_path))), basis, "Be brief.")


@pytest.fixture(scope="module")
def chat(tiny_model_path: Path) -> ChatFormat:
    from transformers import AutoTokenizer

    return ChatFormat(AutoTokenizer.from_pretrained(tiny_model_path))


@pytest.fixture
def engine(chat: ChatFormat) -> Engine:
    return Engine(chat)


@pytest.fixture
def parts(opening: Opening, engine: Engine, chat: ChatFormat) -> Parts:
    return Parts(opening, engine, WriteBatcher(ScriptedWriter()), chat, None, lambda: "")


def limited(parts: Parts, **settings: Any) -> Parts:
    config = replace(parts.opening.config, assistant=replace(parts.opening.config.assistant, **settings))
    return replace(parts, opening=replace(parts.opening, config=config))


@contextmanager
def serving(parts: Parts, key: str = "") -> Iterator[TestClient]:
    app = build_app(parts, Sessions(parts, 2), key)
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def body(*messages: Any, **changes: object) -> dict[str, object]:
    said = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
    return {"model": "tiny", "messages": said or [{"role": "user", "content": "Who?"}], **changes}


def said(client: TestClient, sent: dict[str, object]) -> dict[str, Any]:
    answered = client.post(CHAT, json=sent)
    assert answered.status_code == 200, answered.text
    return dict(answered.json())


def events(text: str) -> list[dict[str, Any]]:
    *given, end, nothing = text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in given]


def streamed(client: TestClient, sent: dict[str, object]) -> tuple[str, list[dict[str, Any]]]:
    """The text of a stream's first choice, and its events."""
    given = events(client.post(CHAT, json={**sent, "stream": True}).text)
    choices = [choice for event in given for choice in event["choices"] if choice["index"] == 0]
    return "".join(choice["delta"].get("content") or "" for choice in choices), given


# --- a conversation -------------------------------------------------------------------------------------


def test_the_endpoint_speaks_openai(parts: Parts) -> None:
    with serving(parts) as client:
        assert client.get("/health").json() == {"status": "ok", "model": "tiny", "conversations": 0}
        assert client.get("/v1/models").json()["data"] == [client.get("/v1/models/tiny").json()]
        assert client.get("/v1/models/other").status_code == 404
        first = said(client, body("Nora lives in Lisbon.", conversation="a"))
        choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
        assert first["choices"] == [{**choice, "message": {"role": "assistant", "content": "under 0"}}]
        assert first["object"] == "chat.completion" and first["engram"]["new"]
        history = ["old " * 180, {"role": "assistant", "content": "yes"}, "new?"]
        # A new conversation reads the history, and writes it.
        fresh = said(client, body(*history))["engram"]
        assert fresh["new"] and fresh["revision"] > 0
        assert fresh["writes"][0]["flashcards"] == [{"question": CARD.question, "answer": CARD.answer}]
        assert client.get("/v1/conversations/a").json()["revision"] == 0
        assert client.delete("/v1/conversations/a").json()["deleted"]
        assert client.get("/v1/conversations/a").status_code == 404


def test_a_stream_tells_the_reply_token_by_token(parts: Parts, engine: Engine) -> None:
    engine.text = "Nora lives in Lisbon, high above the river."
    with serving(parts) as client:
        text, given = streamed(client, body(stream_options={"include_usage": True}))
    assert text == engine.text and len(given) > 8
    head = {key: given[0][key] for key in ("id", "created")} | {
        "object": "chat.completion.chunk",
        "model": "tiny",
    }
    assert all(event.items() >= head.items() for event in given)
    assert given[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    ended = {"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}
    addition = {"conversation": None, "new": True, "revision": 0, "writes": []}
    assert given[-2] == {**head, "choices": [ended], "engram": addition, "usage": None}
    assert given[-1]["choices"] == [] and given[-1]["usage"]["completion_tokens"] == len(engine.calls) + (
        len(parts.chat.reply(engine.text)) - 1
    )


def test_what_it_has_sent_it_takes_back(parts: Parts, engine: Engine) -> None:
    with serving(parts) as client:
        for text in ("Nora.", " ", CALL):
            engine.text = text
            answered = ChatCompletion.model_validate(said(client, body("Who?", tools=TOOLS)))
            message = answered.choices[0].message.model_dump()
            said(client, body({"role": "system", "content": ""}, "Who?", message, "And?", tools=TOOLS))


def test_system_messages_may_be_developers_several_and_late(parts: Parts, engine: Engine) -> None:
    with serving(parts) as client:
        first, second = ({"role": role, "content": f"Rule {role}."} for role in ("system", "developer"))
        said(client, body(first, second, "Who?", {"role": "assistant", "content": "Nora"}, first))
    assert "Rule system.\n\nRule developer." in engine.asked and engine.asked.count("Rule system.") == 2


# --- sampling settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"top_p": 0.5}, Decoding(top_p=0.5)),
        ({"top_k": 7}, Decoding(top_k=7)),
        ({"top_k": -1}, Decoding()),
        ({"min_p": 0.1}, Decoding(min_p=0.1)),
        ({"presence_penalty": 1}, Decoding(presence_penalty=1)),
        ({"frequency_penalty": -0.5}, Decoding(frequency_penalty=-0.5)),
        ({"repetition_penalty": 1.2}, Decoding(repetition_penalty=1.2)),
        ({"logit_bias": {"17": -100}}, Decoding(logit_bias=((17, -100),))),
        ({"logprobs": True, "top_logprobs": 3}, Decoding(top_logprobs=3)),
        ({"response_format": {"type": "json_object"}}, Decoding(json_schema='{"type": "object"}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}}}},
            Decoding(json_schema='{"a": 1}'),
        ),
        ({"response_format": {"type": "text"}, "user": "nora", "store": False}, Decoding()),
    ],
)
def test_a_setting_reaches_the_engine(
    parts: Parts, engine: Engine, given: dict[str, object], expected: Decoding
) -> None:
    with serving(parts) as client:
        said(client, body(**given))
    assert engine.decodings == ([] if expected == Decoding() else [expected])


def test_seed_and_temperature_of_a_request_hold_for_it_alone(parts: Parts, engine: Engine) -> None:
    with serving(parts) as client:
        for wanted in ({"temperature": 0.5, "seed": 7}, {}):
            said(client, body(conversation="a", **wanted))
    first, second = (sampling for _, sampling, _ in engine.calls)
    assert (first.temperature, first.seed, second.temperature) == (0.5, 7, 0.0) and second.seed != 7


@pytest.mark.parametrize("stop", ["river", "ver", "Lisbon, high", ["nothing", "r."]])
def test_a_stop_text_ends_the_reply_before_it_in_a_stream_too(
    parts: Parts, engine: Engine, stop: str | list[str]
) -> None:
    engine.text = "Nora lives in Lisbon, high above the river."
    expected = min(
        (engine.text.partition(end)[0] for end in ([stop] if isinstance(stop, str) else stop)), key=len
    )
    with serving(parts) as client:
        answered = said(client, body(stop=stop))
        text, _ = streamed(client, body(stop=stop))
    (choice,) = answered["choices"]
    assert choice["message"]["content"] == text == expected and choice["finish_reason"] == "stop"
    assert answered["usage"]["completion_tokens"] <= len(parts.chat.reply(engine.text))


def test_several_choices_are_sampled_with_seeds_of_their_own(parts: Parts, engine: Engine) -> None:
    with serving(parts) as client:
        answered = said(client, body(n=3, seed=5))
        _, given = streamed(client, body(n=2))
        refused = client.post(CHAT, json=body(n=2, conversation="a")).json()["error"]
    assert [choice["index"] for choice in answered["choices"]] == [0, 1, 2]
    assert sorted(sampling.seed for _, sampling, _ in engine.calls[:3]) == [5, 6, 7]
    assert [c["index"] for event in given for c in event["choices"] if c["finish_reason"]] == [0, 1]
    assert refused["message"] == "n must be 1 in a conversation: one reply goes on"


def test_log_probs_are_those_of_the_reply_without_its_stop_token(parts: Parts, chat: ChatFormat) -> None:
    with serving(parts) as client:
        (choice,) = said(client, body(logprobs=True))["choices"]
        _, given = streamed(client, body(logprobs=True))
    content = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == "under 0"
    assert [token["logprob"] for token in content] == pytest.approx(
        [-0.1 * (i + 1) for i in range(len(content))]
    )
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
    assert given[-1]["choices"][0]["logprobs"]["content"] == content


@pytest.mark.parametrize(
    ("given", "status", "expected"),
    [
        ({"model": "other"}, 404, "'tiny' is"),
        ({"messages": []}, 400, "messages must be a list"),
        (
            body("x", {"role": "assistant", "content": "y"}),
            400,
            "the last message must be the user's, or a tool's",
        ),
        (body({"role": "judge", "content": "x"}), 400, "messages[0].role must be"),
        (body({"role": "user", "content": [{"type": "image_url"}]}), 400, "messages[0].content must be text"),
        (
            body({"role": "user", "content": "x", "mood": 1}),
            400,
            "messages[0].mood is not supported: leave it out",
        ),
        (body(" "), 400, "messages[0].content must be text that is not empty"),
        ({"conversation": "../etc"}, 400, "conversation must be 1 to 64 letters"),
        ({"max_tokens": 0}, 400, "max_tokens must be"),
        ({"temperature": 3}, 400, "temperature must be a number, 0 to 2"),
        ({"temperature": 10**400}, 400, "temperature must be a number, 0 to 2"),
        ({"top_p": 0}, 400, "top_p must be a number above 0, to 1"),
        ({"n": 99}, 400, "n must be a whole number, 1 to 16"),
        ({"stop": ""}, 400, "stop"),
        ({"stop": [""]}, 400, "stop"),
        ({"logprobs": 0}, 400, "logprobs must be true or false"),
        ({"top_logprobs": 2}, 400, "top_logprobs needs logprobs: true"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias must be numbers, -100 to 100, by token id"),
        ({"logit_bias": {"9" * 10: 1}}, 400, "logit_bias must be numbers, -100 to 100, by token id"),
        ({"tools": [{}]}, 400, "tools[0]"),
        ({"tool_choice": "all"}, 400, "tool_choice must be auto, none, required, or a function by its name"),
        (
            {"response_format": {"type": "xml"}},
            400,
            "response_format.type must be text, json_object or json_schema",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            400,
            "response_format.json_schema.schema must be a JSON schema",
        ),
        ({"functions": [{}]}, 400, "functions is not supported: leave it out, or give []"),
        ({"chat_template_kwargs": {}}, 400, "chat_template_kwargs is not supported: leave it out"),
        ({"best_of": 2}, 400, "best_of is not supported: leave it out"),
        ({"best-of": 2}, 400, "best-of is not supported: leave it out"),
        ({"metadata": {"a": float("nan")}}, 400, "the body is not JSON"),
        ({"stream_options": {"every": 3}}, 400, "stream_options.every is not supported: leave it out"),
        ({"store": True}, 400, "store is not supported: leave it out, or give false"),
        (body("x" * 2000), 413, "the body is over 1024 bytes"),
    ],
)
def test_a_bad_request_is_an_openai_error(
    parts: Parts, given: dict[str, object], status: int, expected: str
) -> None:
    with serving(limited(parts, max_body_kib=1)) as client:
        answered = client.post(
            CHAT, content=json.dumps({**body(), **given}), headers={"Content-Type": "application/json"}
        )
    error = answered.json()["error"]
    assert answered.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and expected in error["message"]


def test_a_bound_above_our_own_is_lowered_and_said(parts: Parts, opening: Opening) -> None:
    request = parse_request(body(max_tokens=10**6), None, opening.config)
    assert (request.max_tokens, request.temperature, request.manner) == (48, 0.0, Manner())
    with serving(parts) as client:
        limit = said(client, body(max_tokens=10**6))["engram"]["limited"]
        assert "limited" not in said(client, body(max_tokens=4))["engram"]
    assert limit == {"max_tokens": {"asked": 10**6, "most": 48}}
    with pytest.raises(RequestError, match="differ"):
        parse_request(body(conversation="a"), "b", opening.config)


# --- tools ----------------------------------------------------------------------------------------------


def test_tools_are_told_called_and_their_results_read(parts: Parts, engine: Engine) -> None:
    with serving(parts) as client:
        engine.text = CALL
        (choice,) = said(client, body("What does a lamp cost?", tools=TOOLS))["choices"]
        assert "price" in engine.asked and choice["finish_reason"] == "tool_calls"
        message, (call,) = choice["message"], choice["message"]["tool_calls"]
        assert message["content"] == "Let me see."
        assert call["function"] == {"name": "price", "arguments": '{"item": "lamp"}'}
        engine.text = "Nine."
        result = {"role": "tool", "content": "9 euro", "tool_call_id": call["id"]}
        said(client, body("What does a lamp cost?", message, result, tools=TOOLS))
        assert "9 euro" in engine.asked and '"item": "lamp"' in engine.asked
        said(client, body("What?", tools=TOOLS, tool_choice="none"))
        assert "price" not in engine.asked


def test_a_stream_tells_text_at_once_and_a_call_as_a_call(parts: Parts, engine: Engine) -> None:
    with serving(parts) as client:
        for text, told in ((CALL, "Let me see.\n"), ("Nine euro, I think.", "Nine euro, I think.")):
            engine.text = text
            heard, given = streamed(client, body(tools=TOOLS))
            assert heard == told
            calls = [
                c["delta"]["tool_calls"] for e in given for c in e["choices"] if "tool_calls" in c["delta"]
            ]
            assert [call[0]["function"]["name"] for call in calls] == (["price"] if text == CALL else [])
            assert given[-1]["choices"][0]["finish_reason"] == ("tool_calls" if text == CALL else "stop")


def test_tools_may_change_within_a_conversation(parts: Parts, engine: Engine) -> None:
    with serving(parts) as client:
        said(client, body("Nora lives in Lisbon.", conversation="a", tools=TOOLS))
        said(client, body("Where?", conversation="a"))
        assert "Lisbon" in engine.asked and "price" not in engine.asked
        long = [{"type": "function", "function": {**PRICE, "description": "word " * 1500}}]
        refused = client.post(CHAT, json=body("Where?", conversation="a", tools=long))
        assert (
            refused.status_code == 400 and "memory.max_context_tokens" in refused.json()["error"]["message"]
        )
        said(client, body("Where?", conversation="a"))
        assert engine.asked.count("Where?") == 2


# --- half a character -----------------------------------------------------------------------------------

HALF = "Nora \ud83d lives"  # JSON can spell it; no tokenizer takes it, and no answer can hold it
WHOLE = "Nora \ufffd lives"


def half_a_call(text: str) -> dict[str, object]:
    function = {"name": "price", "arguments": json.dumps({"item": text}, ensure_ascii=False)}
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("route", "given"),
    [
        (CHAT, body(HALF)),
        (CHAT, body({"role": "user", "content": [{"type": "text", "text": HALF}]})),
        (CHAT, body({"role": "system", "content": HALF}, "Who?")),
        (CHAT, body("Who?", half_a_call(HALF), {"role": "tool", "content": "9", "tool_call_id": "1"})),
        (CHAT, body(tools=[{"type": "function", "function": {**PRICE, "description": HALF}}])),
        (CHAT, body(tools=[{"type": "function", "function": {**PRICE, "parameters": {HALF: [HALF]}}}])),
        ("/v1/responses", {"model": "tiny", "input": HALF}),
        ("/v1/responses", {"model": "tiny", "input": "Who?", "instructions": HALF}),
        (
            "/v1/responses",
            {"model": "tiny", "input": "Who?", "tools": [{"type": "function", **PRICE, "description": HALF}]},
        ),
        ("/v1/completions", {"model": "tiny", "prompt": HALF}),
    ],
)
def test_half_a_character_is_read_as_one_that_is_unknown(
    parts: Parts, engine: Engine, route: str, given: dict[str, object]
) -> None:
    with serving(parts) as client:
        answered = client.post(route, content=json.dumps(given), headers={"Content-Type": "application/json"})
    assert answered.status_code == 200, answered.text
    assert WHOLE in engine.asked


def test_half_a_character_in_a_call_of_the_models_is_told_as_one_that_is_unknown(
    parts: Parts, engine: Engine
) -> None:
    engine.text = '<tool_call>{"name": "price", "arguments": {"item": "é \\ud83d"}}</tool_call>'
    with serving(parts) as client:
        (choice,) = said(client, body(tools=TOOLS))["choices"]
        _, given = streamed(client, body(tools=TOOLS))
        tool = {"type": "function", **PRICE}
        called = client.post("/v1/responses", json={"model": "tiny", "input": "Who?", "tools": [tool]})
    told = [choice["message"]["tool_calls"][0]["function"]["arguments"]]
    told += [
        c["delta"]["tool_calls"][0]["function"]["arguments"]
        for event in given
        for c in event["choices"]
        if "tool_calls" in c["delta"]
    ]
    told += [called.json()["output"][0]["arguments"]]
    assert told == ['{"item": "é \ufffd"}'] * 3


# --- what fails -----------------------------------------------------------------------------------------


def test_a_turn_that_is_given_up_leaves_nothing_behind_not_even_its_writes(
    parts: Parts, engine: Engine
) -> None:
    async def story() -> None:
        sessions, metrics = Sessions(parts, 2), Metrics(lambda: 0, lambda: True)

        def turn(text: str) -> Any:
            request = parse_request(body(text, conversation="a", stream=True), None, parts.opening.config)
            return answer(request, parts, sessions, metrics, lambda choice, text: heard.set())

        heard = asyncio.Event()
        await turn("Nora lives in Lisbon.")
        talk = sessions.look("a")
        assert isinstance(talk, Conversation)
        before = (talk.context_tokens, talk.revision, talk.writes)
        engine.step_s = 0.05
        heard.clear()
        late = asyncio.create_task(turn("old " * 200))
        await heard.wait()
        assert talk.revision > 0
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        assert (talk.context_tokens, talk.revision, talk.writes) == before
        assert engine.installed == {}
        engine.step_s = 0.0
        assert (await turn("Who?")).reply.text == "under 0"

    asyncio.run(story())


def test_a_key_a_content_type_and_a_deadline_are_kept(parts: Parts, engine: Engine) -> None:
    with serving(limited(parts, request_timeout_s=0.2), "secret") as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert client.get("/metrics").status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
        assert client.post(CHAT, json={"messages": []}).json()["error"]["message"].startswith("model must be")
        assert client.post(CHAT, content=json.dumps(body())).status_code == 415
        engine._delay_s = 5.0
        late = client.post(CHAT, json=body(conversation="a"))
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        assert client.get("/health").json()["conversations"] == 0
        engine._delay_s, engine.step_s, engine.text = 0.0, 0.1, "one two three four"
        broken = client.post(CHAT, json=body(stream=True)).text
    assert json.loads(broken.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_client_that_goes_while_its_body_is_read_is_counted_as_gone(parts: Parts) -> None:
    async def story() -> int:
        async def receive() -> dict[str, Any]:
            return next(received)

        async def send(message: Any) -> None:
            sent.append(message)

        received = iter(
            ({"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"})
        )
        sent: list[dict[str, Any]] = []
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
        await app(scope, receive, send)
        return int(sent[0]["status"])

    app = build_app(parts, Sessions(parts, 2), "")
    assert asyncio.run(story()) == 499
    with TestClient(app, base_url="http://localhost") as client:
        figures = client.get("/metrics").text
    assert f'engram:requests_total{{route="{CHAT}",status="499"}} 1.0' in figures


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:80", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("10.1.2.3:80", 200),
        ("lab", 200),
        ("evil.com", 421),
    ],
)
def test_a_host_that_a_web_page_could_rebind_is_refused(parts: Parts, host: str, status: int) -> None:
    with serving(limited(parts, hosts=("lab",))) as client:
        assert client.get("/health", headers={"Host": host}).status_code == status


def test_of_many_connections_at_once_the_oldest_are_closed() -> None:
    """All wait before the server looks, so that it takes them in one step of its loop."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nobody has asked anything")

    async def story() -> list[int]:
        config = uvicorn.Config(app, lifespan="off", log_config=None)
        config.load()
        state, loop = ServerState(), asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening, ExitStack() as clients:
            silent = [
                clients.enter_context(socket.create_connection(listening.getsockname()))
                for _ in range(MOST_SILENT + 50)
            ]
            server = await loop.create_server(
                lambda: Protocol(config, state, {}), sock=listening, backlog=1024
            )
            async with asyncio.timeout(30), server:
                while len(state.connections) != MOST_SILENT or not select.select(silent[:1], [], [], 0)[0]:
                    await asyncio.sleep(0.01)
                return [place for place, one in enumerate(silent) if not select.select([one], [], [], 0)[0]]

    assert asyncio.run(story()) == [*range(50, MOST_SILENT + 50)]


def test_the_figures_are_prometheus(parts: Parts) -> None:
    with serving(parts) as client:
        streamed(client, body("old " * 200, conversation="a"))
        client.post(CHAT, json=body(model="other"))
        client.get("/v1/whatever/1")
        figures = client.get("/metrics").text
    for line in (
        'engram:requests_total{route="/v1/chat/completions",status="200"} 1.0',
        'engram:requests_total{route="/v1/chat/completions",status="404"} 1.0',
        'engram:requests_total{route="other",status="404"} 1.0',
        'engram:writes_total{outcome="accepted"}',
        "engram:conversations 1.0",
        "engram:engine_alive 1.0",
        "engram:time_to_first_token_seconds_count 1.0",
        "engram:turns_running 0.0",
    ):
        assert line in figures, figures


def test_an_event_is_one_line_for_every_reader() -> None:
    text = "first\u2028second\x85third\nfourth"
    chunks = Chunks("tiny")
    told = [chunks.begin(0, ""), chunks.text(0, text), chunks.end(0, SaidChoice(text, "stop"), {})]
    assert [len(event.rstrip("\n").splitlines()) for event in told] == [1, 1, 1]
    assert json.loads(told[1].removeprefix("data: "))["choices"][0]["delta"]["content"] == text


def test_a_dead_engine_is_named_by_every_route_that_needs_it(parts: Parts) -> None:
    with serving(replace(parts, failure=lambda: "out of memory")) as client:
        health = client.get("/health")
        assert (health.status_code, health.json()["reason"]) == (503, "out of memory")
        answered = client.post(CHAT, json=body())
    assert (answered.status_code, answered.json()["error"]["type"]) == (503, "server_error")
    assert "the engine is dead (out of memory)" in answered.json()["error"]["message"]


# --- a history that comes again -------------------------------------------------------------------------


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_known_history_without_a_name_is_not_read_again(parts: Parts, engine: Engine) -> None:
    with serving(parts) as client:
        engine.text = "First."
        first = said(client, body("old " * 180))["engram"]
        engine.text = "Second."
        second = said(client, body("old " * 180, says("First."), "And?"))["engram"]
        assert first["new"] and first["writes"] and not second["new"] and second["writes"] == []
        assert second["revision"] == first["revision"]
        other = said(client, body("old " * 180, says("Other."), "And?"))["engram"]
        assert other["new"] and other["writes"]
        assert client.get("/health").json()["conversations"] == 0
        assert client.get("/v1/conversations").json()["data"] == []


def test_an_edited_history_goes_back_with_the_delta_of_that_time(parts: Parts, engine: Engine) -> None:
    with serving(parts) as client:

        def turn(*messages: Any) -> dict[str, Any]:
            return said(client, body(*messages, conversation="a"))["engram"]

        engine.text = "One."
        turn("Nora lives in Lisbon.")
        engine.text = "Two."
        written = turn("Nora lives in Lisbon.", says("One."), "old " * 180)
        assert written["revision"] > 0 and len(engine.installed) == 1
        engine.text = "Three."
        edited = turn("Nora lives in Lisbon.", says("One."), "Where?")
        assert edited["revision"] == 0 and engine.installed == {}
        assert "Lisbon" in engine.asked and "old" not in engine.asked
        again = turn("Nora lives in Lisbon.", says("One."), "Where?")
        assert again["revision"] == 0 and engine.asked.count("Where?") == 1
        turn("And?")  # a client that sends its new turns alone
        assert engine.asked.count("Where?") == 1 and "Three." in engine.asked
        assert client.get("/v1/conversations").json()["data"] == [{"id": "a", "in_memory": True}]
        foreign = client.post(CHAT, json=body("Hello.", says("Hi."), "And?", conversation="a"))
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (409, "history_conflict")


def test_an_edited_history_is_refused_where_that_is_wanted(parts: Parts) -> None:
    with serving(limited(parts, edited_history="refuse")) as client:
        said(client, body("Nora lives in Lisbon.", conversation="a"))
        said(client, body("Nora lives in Lisbon.", says("under 0"), "Where?", conversation="a"))
        again = client.post(
            CHAT, json=body("Nora lives in Lisbon.", says("under 0"), "Why?", conversation="a")
        )
    assert again.status_code == 409 and "assistant.edited_history=return" in again.json()["error"]["message"]


def test_where_edits_are_refused_a_request_that_names_nothing_begins_anew(
    parts: Parts, engine: Engine
) -> None:
    with serving(limited(parts, edited_history="refuse")) as client:
        for text, messages, new in (
            ("Lisbon.", ["Where?"], True),
            ("High up.", ["Where?", says("Lisbon."), "Where there?"], False),
            ("By the river.", ["Where?", says("Lisbon."), "Where there?"], True),  # the newest turn again
            ("Why?", ["Where?", says("Lisbon."), "Thanks."], True),  # another branch
            ("Long.", ["Where?", says("Lisbon."), "Where there?", says("High up."), "How long?"], False),
        ):
            engine.text = text
            assert said(client, body(*messages))["engram"]["new"] is new, messages


def files_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_who_only_looks_saves_nothing_and_waits_no_longer_than_others(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> None:
        await asyncio.sleep(60)

    kept = limited(parts, save_dir=str(tmp_path), request_timeout_s=0.5)
    with serving(kept) as client:
        said(client, body("old " * 180, conversation="a"))
    before = files_of(tmp_path)
    for route in ("/v1/conversations/a", "/v1/conversations/a/memory"):
        with serving(kept) as client:
            assert client.get(route).json()["id"] == "a"
            assert client.get(route.replace("/a", "/b")).status_code == 404
        assert files_of(tmp_path) == before
        with monkeypatch.context() as patched, serving(kept) as client:
            patched.setattr(Conversation, "load", never)
            assert client.get(route).json()["error"]["code"] == "timeout"


def test_looking_for_a_conversation_does_not_begin_one(parts: Parts, tmp_path: Path) -> None:
    async def story() -> None:
        sessions = Sessions(limited(parts, save_dir=str(tmp_path)), 2)
        async with sessions.turn("a", None, looks_only=True):  # as if it was deleted since it was seen
            pass
        assert sessions.look("a") is None and sessions.names() == {}

    asyncio.run(story())


def test_conversations_are_listed_read_and_deleted_on_the_disk_too(parts: Parts, tmp_path: Path) -> None:
    kept = limited(parts, save_dir=str(tmp_path))
    with serving(kept) as client:
        said(client, body("old " * 180, conversation="a"))
    with serving(kept) as client:
        url = "/v1/conversations"
        assert client.get(url).json()["data"] == [{"id": "a", "in_memory": False}]
        assert client.get(f"{url}/b").status_code == 404
        assert client.get(f"{url}/a").json()["writes"][0]["flashcards"] == [
            {"question": CARD.question, "answer": CARD.answer}
        ]
        # Its lines are forgotten: the history of a client is believed.
        said(client, body("old " * 180, says("under 1"), "And?", conversation="a"))
        assert client.delete(f"{url}/a").json()["deleted"] and not (tmp_path / "a").exists()
        assert client.get(url).json()["data"] == []


# --- the other routes -----------------------------------------------------------------------------------


def test_responses_are_openais(parts: Parts, engine: Engine) -> None:
    tool = {"type": "function", **PRICE}
    with serving(parts) as client:

        def respond(**given: object) -> Any:
            answered = client.post("/v1/responses", json={"model": "tiny", **given})
            return answered.json() if not given.get("stream") else answered.text

        engine.text = "Nora, in Lisbon."
        plain = Response.model_validate(respond(input="Who?", instructions="Be kind."))
        assert plain.output_text == engine.text and plain.status == "completed" and "Be kind." in engine.asked
        parsed = [
            json.loads(event.partition("data: ")[2])
            for event in respond(input="Who?", stream=True).strip().split("\n\n")
        ]
        kinds = [event["type"] for event in parsed]
        assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
        assert kinds.count("response.output_text.delta") > 3
        assert "".join(e["delta"] for e in parsed if e["type"] == "response.output_text.delta") == engine.text
        assert [event["sequence_number"] for event in parsed] == list(range(len(parsed)))
        engine.text = CALL
        called = Response.model_validate(respond(input="What does a lamp cost?", tools=[tool]))
        message, call = called.output
        assert (message.type, call.type) == ("message", "function_call")
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "9 euro"}
        sent = [item.model_dump(exclude_unset=True) for item in called.output]
        engine.text = "Nine."
        asked = {"role": "user", "content": "What does a lamp cost?"}
        final = respond(input=[asked, *sent, result], tools=[tool])
        assert final["output"][0]["content"][0]["text"] == "Nine." and not final["engram"]["new"]
        assert "9 euro" in engine.asked
        refused = respond(input="Who?", previous_response_id="resp_1")["error"]["message"]
    assert refused == "previous_response_id is not supported: leave it out"


ITEMS = "message, function_call or function_call_output"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"input": 5}, "input must be a text, or a list of messages, calls and results"),
        ({"input": [5]}, "input[0] must be an object"),
        ({"input": " "}, "input[0].content must be text that is not empty"),
        ({"input": [{"type": "reasoning"}]}, f"input[0].type must be {ITEMS}"),
        ({"input": [{"content": "Who?"}]}, "input[0].role must be system, developer, user or assistant"),
        ({"input": [{"role": "user"}]}, "input[0].content must be text"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content must be text",
        ),
        (
            {"input": [{"role": "user", "content": "x", "mood": 1}]},
            "input[0].mood is not supported: leave it out",
        ),
        (
            {"input": [{"role": "user", "content": "x", "output": "y"}]},
            "input[0].output is not a field of a message: leave it out",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "1", "arguments": "{}"}]},
            "input[0].name must be a text",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "price"}]},
            "input[0].arguments must be JSON in a text",
        ),
        (
            {"input": [{"type": "function_call", "name": "price", "arguments": "{}"}]},
            "input[0].call_id must be a text",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input[0].output must be text"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema must be a JSON schema"),
        ({"metadata": {"a": 1}}, "metadata"),
    ],
)
def test_a_bad_response_request_names_the_place(
    parts: Parts, given: dict[str, object], expected: str
) -> None:
    with serving(parts) as client:
        answered = client.post("/v1/responses", json={"model": "tiny", "input": "Who?", **given})
    assert answered.status_code == 400 and answered.json()["error"]["message"].startswith(expected)


def test_a_response_tells_what_was_asked_and_a_text_is_read_without_its_margins(
    parts: Parts, engine: Engine
) -> None:
    tool = {"type": "function", **PRICE}
    told = {"instructions": "Be kind.", "metadata": {"a": "b"}, "tool_choice": "none", "tools": [tool]}
    with serving(parts) as client:
        plain = client.post("/v1/responses", json={"model": "tiny", "input": " Who? \n"})
        alike = engine.asked
        listed = client.post(
            "/v1/responses", json={"model": "tiny", "input": [{"role": "user", "content": "Who?"}]}
        )
        assert alike == engine.asked and listed.status_code == 200
        answered = client.post("/v1/responses", json={"model": "tiny", "input": "Who?", **told}).json()
    assert Response.model_validate(answered).metadata == {"a": "b"}
    assert {name: answered[name] for name in told} == told | {"tools": [{**tool, "strict": None}]}
    assert (plain.json()["tool_choice"], plain.json()["tools"], plain.json()["metadata"]) == ("auto", [], {})


def test_a_tool_with_a_deep_schema_is_told_again(parts: Parts, engine: Engine) -> None:
    schema: dict[str, Any] = {}
    for _ in range(150):  # pydantic writes no more than 255 levels
        schema = {"a": [schema]}
    config = parts.opening.config
    memory = replace(config.memory, max_context_tokens=1200)
    wide = replace(parts, opening=replace(parts.opening, config=replace(config, memory=memory)))
    tool = {"type": "function", "name": "price", "parameters": schema}
    with serving(wide) as client:
        for stream in (False, True):
            asked = {"model": "tiny", "input": "Who?", "tools": [tool], "stream": stream}
            answered = client.post("/v1/responses", json=asked)
            assert answered.status_code == 200, answered.text
            assert json.dumps(schema) in answered.text


def test_completions_continue_a_plain_text(parts: Parts, engine: Engine) -> None:
    engine.text = "a river runs"
    with serving(parts) as client:
        sent = {"model": "tiny", "prompt": " Once upon a time ", "logprobs": 1, "stop": "runs"}
        answered = Completion.model_validate(client.post("/v1/completions", json=sent).json())
        given = events(client.post("/v1/completions", json={**sent, "stream": True}).text)
        refused = client.post("/v1/completions", json={**sent, "echo": True}).json()["error"]["message"]
        long = client.post("/v1/completions", json={**sent, "prompt": "word " * 1600})
    (choice,) = answered.choices
    assert (choice.text, choice.finish_reason) == ("a river ", "stop")
    assert engine.asked == " Once upon a time " and choice.logprobs is not None
    assert choice.logprobs.tokens is not None and choice.logprobs.tokens[0] == "a"
    assert "".join(event["choices"][0]["text"] for event in given) == "a river "
    assert refused == "echo is not supported: leave it out, or give false"
    assert long.status_code == 400 and "engine.max_model_tokens" in long.json()["error"]["message"]


# --- what serving changes in a run's settings -----------------------------------------------------------


def test_serving_has_a_context_and_replies_of_its_own(opening: Opening) -> None:
    served, told = for_serving(opening, [])
    config = served.config
    assert (config.memory.max_context_tokens, config.sampling.max_answer_tokens) == (768, 192)
    assert config.engine.max_model_tokens == 2048
    assert "memory.max_context_tokens=768 (trained with 160)" in told
    kept, told = for_serving(opening, ["memory.max_context_tokens=160"])
    assert kept.config.memory.max_context_tokens == 160 and "max_context" not in told
    assert for_serving(opening, ["engine.max_model_tokens=1500"]) == (opening, "")


def test_a_run_with_a_small_window_is_served_with_a_larger_one(opening: Opening) -> None:
    own = opening.config
    memory = replace(own.memory, max_context_tokens=42, max_extract_tokens=128)
    small = replace(own, memory=memory, engine=replace(own.engine, max_model_tokens=512))
    served, told = for_serving(replace(opening, config=small), [])
    assert served.config.memory.max_context_tokens == 768 and "engine.max_model_tokens=2048" in told
    wide = replace(memory, max_extract_tokens=1500)
    large = replace(
        opening, config=replace(small, memory=wide, engine=replace(own.engine, max_model_tokens=1700))
    )
    assert for_serving(large, []) == (large, "")
