"""Tools and half characters in what the server is sent and sends."""

from __future__ import annotations

import json

import pytest

from cluster.assistant.opening import Parts
from tests.unit.test_serve import (
    CALL,
    CHAT,
    PRICE,
    TOOLS,
    Engine,
    body,
    chat,
    engine,
    opening,
    parts,
    said,
    serving,
    streamed,
)

__all__ = ["chat", "engine", "opening", "parts"]  # fixtures


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
