"""What fails while a turn is served, and what is left behind: nothing."""

from __future__ import annotations

import asyncio
import json
import select
import socket
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient
from uvicorn.server import ServerState

from actors.endpoint.answers import SaidChoice
from cluster.assistant.connections import MOST_SILENT, Protocol
from cluster.assistant.conversation import Conversation
from cluster.assistant.metrics import Metrics
from cluster.assistant.openai_answers import Chunks
from cluster.assistant.openai_format import parse_request
from cluster.assistant.opening import Parts
from cluster.assistant.serve import build_app
from cluster.assistant.sessions import Sessions
from cluster.assistant.turns import answer
from tests.unit.test_serve import CHAT, Engine, body, chat, engine, limited, opening, parts, serving, streamed

__all__ = ["chat", "engine", "opening", "parts"]  # fixtures


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
