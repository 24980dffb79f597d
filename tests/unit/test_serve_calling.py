"""A call that a client of ``serve`` asks for: the schema that the reply keeps to, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
import xgrammar
from xgrammar.testing import _is_grammar_accept_string as accepts

from cluster.assistant.conversation import Conversation
from cluster.assistant.opening import Parts
from tests.unit.test_serve import CHAT, PRICE, TOOLS, Engine, body, chat, engine, opening, parts, serving
from tests.unit.test_serve_clients import ASKED, client, url

__all__ = ["chat", "client", "engine", "opening", "parts", "url"]  # fixtures

ITEM = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
BUY: dict[str, Any] = {
    "name": "buy",
    "parameters": {
        "properties": {"item": {"$ref": "#/$defs/Item"}},
        "required": ["item"],
        "$defs": {"Item": ITEM},
    },
}
BOTH: Any = [*TOOLS, {"type": "function", "function": BUY}]
CALLED = '{"name": "price", "arguments": {"item": "lamp"}}'
BOUGHT = '{"name": "buy", "arguments": {"item": {"name": "lamp"}}}'


def keeps(engine: Engine, reply: str) -> bool:
    """Whether the engine could say ``reply`` under the schema of the last request."""
    grammar = xgrammar.Grammar.from_json_schema(engine.decodings[-1].json_schema)
    return bool(accepts(grammar, reply))


def allowed(mode: str, *names: str) -> dict[str, Any]:
    """OpenAI's choice of some of the tools, as chat completions have it."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


# --- a call that is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "possible"),
    [
        ("required", [CALLED, BOUGHT]),
        ({"type": "function", "function": {"name": "price"}}, [CALLED]),
        ({"type": "function", "function": {"name": "buy"}}, [BOUGHT]),
        (allowed("required", "buy"), [BOUGHT]),
        (allowed("required", "buy", "price"), [CALLED, BOUGHT]),
    ],
)
def test_a_call_that_is_asked_for_is_the_only_reply_that_can_come(
    client: openai.OpenAI, engine: Engine, choice: Any, possible: list[str]
) -> None:
    asked: Any = {"model": "tiny", "messages": ASKED, "tools": BOTH, "tool_choice": choice}
    engine.text = possible[0]
    wanted = json.loads(possible[0])
    answered = client.chat.completions.create(**asked).choices[0]
    (call,) = answered.message.tool_calls or ()
    assert call.type == "function" and answered.finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == (wanted["name"], wanted["arguments"])
    assert answered.message.content is None
    assert [keeps(engine, text) for text in (CALLED, BOUGHT)] == [
        text in possible for text in (CALLED, BOUGHT)
    ]
    unlike = ("Nine euro.", '{"name": "sell", "arguments": {}}', '{"name": "buy", "arguments": {"item": 5}}')
    assert not any(keeps(engine, text) for text in unlike)
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    assert not any(delta.content for delta in deltas)
    assert [delta.tool_calls[0].function.name for delta in deltas if delta.tool_calls] == [wanted["name"]]
    # the call and its result go on
    message = answered.message.model_dump(exclude_unset=True)
    engine.text = "Nine."
    result = {"role": "tool", "content": "9 euro", "tool_call_id": call.id}
    final = client.chat.completions.create(
        **{**asked, "messages": [*ASKED, message, result], "tool_choice": "auto"}
    )
    assert final.choices[0].message.content == "Nine." and not final.model_dump()["engram"]["new"]


def test_the_model_hears_of_the_allowed_tools_alone(client: openai.OpenAI, engine: Engine) -> None:
    """One that is not allowed is no tool of this turn: its call is text."""
    asked: Any = {"model": "tiny", "messages": ASKED, "tools": BOTH}
    for text, called in ((CALLED, True), (BOUGHT, False)):
        engine.text = text
        choice: Any = allowed("auto", "price")
        message = client.chat.completions.create(**asked, tool_choice=choice).choices[0].message
        assert bool(message.tool_calls) is called and message.content == (None if called else BOUGHT)


def test_a_response_can_be_a_call_that_is_asked_for(client: openai.OpenAI, engine: Engine) -> None:
    engine.text = CALLED
    tools: Any = [{"type": "function", "strict": True, **tool["function"]} for tool in BOTH]
    named: Any = {"type": "function", "name": "price"}
    some: Any = {"type": "allowed_tools", "mode": "required", "tools": [named]}
    for choice, told in (("required", "required"), (named, named), (some, some)):
        answered = client.responses.create(
            model="tiny", input="What?", tools=tools, tool_choice=choice, parallel_tool_calls=False
        )
        (call,) = answered.output
        assert call.type == "function_call" and call.name == "price" and keeps(engine, CALLED)
        shown = answered.model_dump(exclude_unset=True)
        assert (shown["tool_choice"], shown["parallel_tool_calls"]) == (told, False)


def test_beside_an_answer_in_a_form_a_tool_can_be_called(client: openai.OpenAI, engine: Engine) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
    asked: Any = {"model": "tiny", "messages": ASKED, "response_format": form}
    for tools in (BOTH, openai.NOT_GIVEN):
        engine.text = "9"
        answered = client.chat.completions.create(**asked, tools=tools).choices[0]
        assert answered.message.content == "9" and keeps(engine, "9") and not keeps(engine, '"nine"')
        assert keeps(engine, CALLED) == keeps(engine, BOUGHT) == (tools is BOTH)
    engine.text = CALLED
    assert client.chat.completions.create(**asked, tools=BOTH).choices[0].message.tool_calls


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "sell"}}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": allowed("auto", "sell"), "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": allowed("none", "price"), "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": allowed("required"), "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "price", "x": 1}, "tools": TOOLS}, "tool_choice"),
        ({"parallel_tool_calls": False, "tools": TOOLS}, "parallel_tool_calls"),
        (
            {"tools": [{"type": "function", "function": {**PRICE, "strict": True}}]},
            "tools[0].function.strict",
        ),
    ],
)
def test_what_cannot_be_promised_of_a_call_is_refused(
    parts: Parts, given: dict[str, object], place: str
) -> None:
    with serving(parts) as client:
        refused = client.post(CHAT, json=body(**given))
    assert refused.status_code == 400 and refused.json()["error"]["param"] == place, refused.text
    assert place in refused.json()["error"]["message"]


def test_a_model_that_thinks_first_is_asked_for_no_call(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Conversation, "thinks", True)
    with serving(parts) as client:
        for given in (
            {"tools": TOOLS, "tool_choice": "required"},
            {"response_format": {"type": "json_object"}},
        ):
            error = client.post(CHAT, json=body(**given)).json()["error"]
            assert error["param"] in given and error["message"].startswith(f"{error['param']} cannot be kept")


def test_a_schema_that_is_too_deep_is_a_bad_request(parts: Parts) -> None:
    for depth in range(100, 1000, 100):
        deep = '{"a":' * depth + "1" + "}" * depth
        tool = '{"type":"function","function":{"name":"price","parameters":' + deep + "}}"
        sent = f'{{"model":"tiny","messages":[{{"role":"user","content":"x"}}],"tools":[{tool}]'
        with serving(parts) as client:
            for more in ("}", ',"tool_choice":"required"}'):
                headers = {"Content-Type": "application/json"}
                status = client.post(CHAT, content=sent + more, headers=headers).status_code
                assert status in (200, 400), (depth, more)
