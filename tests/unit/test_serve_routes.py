"""The server's other routes: responses, completions, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from openai.types import Completion
from openai.types.responses import Response

from cluster.assistant.opening import Parts
from tests.unit.test_serve import CALL, PRICE, Engine, chat, engine, events, opening, parts, serving

__all__ = ["chat", "engine", "opening", "parts"]  # fixtures


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


def test_a_model_is_called_by_its_folders_name(parts: Parts) -> None:
    opening = replace(parts.opening, title=str(parts.opening.model.path))  # an absolute path
    with serving(replace(parts, opening=opening)) as client:
        (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == parts.opening.model.path.name
