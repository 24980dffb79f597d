"""The tools of a paging agent: calls are parsed with forgiveness, results come in pages, nothing raises."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.memory.paging_tools import BadCall, Call, Storage, parse_call
from actors.text.retrieval import Embedder, load_embedder
from configs.schema import EmbedderConfig, PagingConfig

PAGING = PagingConfig()


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return load_embedder(EmbedderConfig())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{"call": "recall_search", "query": "Nora"}',
            Call("recall_search", {"call": "recall_search", "query": "Nora"}, False),
        ),
        ('```json\n{"call": "done"}\n```', Call("done", {"call": "done"}, False)),
        ('I look. {"x": 1} {"call": "a", "n": {"b": 2}} so', Call("a", {"call": "a", "n": {"b": 2}}, False)),
        ('{"call": "a"} {"call": "b"}', Call("a", {"call": "a"}, True)),
        ('{"call": "a", "query": "b"', Call("a", {"call": "a", "query": "b"}, False)),
        ('{"call": "a", "text": "cut off he', BadCall("the call is no complete JSON object")),
        ("{'call': 'a'}", BadCall("the call is no complete JSON object")),
        ('{"call": 3}', BadCall('"call" names no tool')),
        ('{"call": ""}', BadCall('"call" names no tool')),
        ('{"call": "a", "n": ' + "[" * 100000, BadCall("the call is no complete JSON object")),
        ('{"answer": "a"}', None),
        ("Lisbon {", None),
        ("", None),
    ],
)
def test_calls_are_parsed_with_forgiveness(text: str, expected: object) -> None:
    assert parse_call(text) == expected


def test_the_common_form_of_a_tool_call_is_understood() -> None:
    arguments = '{"query": "Nora", "page": 2}'
    call = parse_call(f'<tool_call>\n{{"name": "recall_search", "arguments": {arguments}}}\n</tool_call>')
    assert isinstance(call, Call) and call.name == "recall_search"
    assert (call.arguments["query"], call.arguments["page"]) == ("Nora", 2)
    assert parse_call('{"name": "Nora", "arguments": {}}') is None


@settings(deadline=None)
@given(
    st.text(alphabet='{}[]":, callcorepdtxn1\\', max_size=80) | st.text(max_size=60),
    st.dictionaries(st.text(max_size=6), st.integers() | st.text(), max_size=3),
)
def test_parsing_and_running_never_raise(text: str, extra: dict[str, object]) -> None:
    storage = _storage()
    for reply in (
        text,
        f'{{"call": {text}',
        json.dumps({"call": "core_append", "block": "facts", "text": text, **extra}),
        json.dumps({"call": text, **extra}),
    ):
        call = parse_call(reply)
        if call is not None:
            assert len(storage.run(call).split()) <= 100
        storage.remember(reply)


def _storage(
    config: PagingConfig = PAGING,
    share: int = 100,
    events: Counter[str] | None = None,
    embedder: Embedder | None = None,
) -> Storage:
    def load() -> Embedder:
        assert embedder is not None
        return embedder

    return Storage(
        config, load, lambda text: len(text.split()), share, Counter() if events is None else events
    )


def _run(storage: Storage, tool: str, **arguments: object) -> str:
    return storage.run(Call(tool, arguments, False))


def test_what_the_agent_is_told_is_bounded() -> None:
    storage = _storage(share=32)
    for call in (Call("no " * 30, {}, False), Call("core_append", {"block": "no " * 30}, True)):
        assert 0 < len(storage.run(call).split()) <= 32


def test_results_come_in_pages(embedder: Embedder) -> None:
    events: Counter[str] = Counter()
    storage = _storage(PagingConfig(results=2), events=events, embedder=embedder)
    for day in range(5):
        storage.remember(f"On day {day} a boat came.")
        _run(storage, "archival_insert", text=f"On day {day} a boat came.")
    for tool in ("recall_search", "archival_search"):
        pages = [_run(storage, tool, query="boat", page=page) for page in (1, 2, "3", 4)]
        heads = [page.splitlines()[0] for page in pages[:3]]
        assert heads == [f"Found 5, page {page} of 3:" for page in (1, 2, 3)]
        shown = [line for page in pages[:3] for line in page.splitlines()[1:]]
        assert [line.split(".")[0] for line in shown] == ["1", "2", "3", "4", "5"]
        assert len({line.split(". ")[1] for line in shown}) == 5
        assert pages[3] == "Nothing on page 4: 5 found."
    assert _run(storage, "recall_search", query="zeppelin") == "Nothing found."
    assert events["empty_searches"] == 3 and events["recall_searches"] == 5


def test_a_long_message_is_found_by_passages_under_its_heading() -> None:
    storage = _storage(PagingConfig(results=3), share=120)
    lines = "\n".join(f"Ida: this is line {line} and it goes on for quite a while." for line in range(30))
    storage.remember(f"[8 May 2023]\n{lines}\nIda: my cat is called Zorro.\n{lines}")
    assert storage.messages == 1
    result = _run(storage, "recall_search", query="Zorro")
    assert result.startswith("Found 1, page 1 of 1:\n1. [8 May 2023] ")
    assert "my cat is called Zorro." in result
    assert len(result.split()) < 60


def test_core_memory_is_appended_replaced_and_bounded() -> None:
    storage = _storage(PagingConfig(core_characters=40), share=100)
    saved = _run(storage, "core_append", block="facts", text="Nora lives in\n Oslo.")
    assert saved == "Saved: block facts has 19 of 40 characters."
    _run(storage, "core_append", block="facts", text="Omar bakes.")
    refused = _run(storage, "core_append", block="facts", text="Ida sails far.")
    assert refused.startswith("Refused: block facts would be full (46 characters)")
    _run(storage, "core_replace", block="facts", old="Oslo", new="Lisbon")
    assert storage.core["facts"] == "Nora lives in Lisbon.\nOmar bakes."
    _run(storage, "core_replace", block="facts", old="Omar bakes.", new="")
    assert storage.core == {"task": "", "facts": "Nora lives in Lisbon."}
