"""The HTTP side of ``serve`` with a scripted engine; tests/integration/test_serve.py has a real one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from openai.types.chat import ChatCompletion

from actors.endpoint.requests import RequestError
from actors.episodes.rollout import WriteBatcher
from actors.fast_weights.basis import make_basis
from actors.speech import Decoding
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import render_flashcards
from actors.types import AdapterKey, Flashcard, Generation, Sampling
from cluster.assistant.answering import Manner
from cluster.assistant.openai_format import parse_request
from cluster.assistant.opening import Opening, Parts, for_serving
from cluster.assistant.serve import build_app
from cluster.assistant.sessions import Sessions
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
        (
            {"tool_choice": "all"},
            400,
            "tool_choice must be auto, none, required, a function by its name, or allowed_tools",
        ),
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
