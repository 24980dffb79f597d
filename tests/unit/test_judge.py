"""The judge against a real HTTP server: what is sent, what counts as a verdict, and every way to fail."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from actors.environments.judge import cached_endpoint
from actors.environments.judge.cached_endpoint import Cost
from actors.environments.judge.judge import EndpointJudge
from actors.protocols import TaskError
from configs.bounds import BoundError
from configs.schema import JudgeConfig
from tests.unit.endpoint_server import KEY, Script, Served, Server, completion, error_reply, reached

KEY_VARIABLE = "ENGRAM_TEST_JUDGE_KEY"
RUBRICS = ("names the city", "gives the year", "has no more than ten words")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    yield from reached(monkeypatch, KEY_VARIABLE)


def _config(server: Server | str, **changes: Any) -> JudgeConfig:
    values: dict[str, Any] = {
        "model": "judge-1",
        "api_key_env": KEY_VARIABLE,
        "timeout_s": 30.0,
        "retries": 2,
    } | changes
    return JudgeConfig(url=server if isinstance(server, str) else server.url, **values)


def _verdict_text(body: dict[str, Any], met: list[bool], **extra: Any) -> str:
    asked = json.JSONDecoder().raw_decode(body["messages"][1]["content"])[0]
    entries = [
        {"rubric": number, "reason": f"because {number}", "met": value}
        for number, value in enumerate(met, start=1)
    ]
    return json.dumps({"id": asked["id"], "verdicts": entries, **extra})


def _decide(*met: bool) -> Script:
    return lambda body: completion(_verdict_text(body, list(met)))


def _failure(judge: EndpointJudge, answer: str = "Oslo") -> str:
    with pytest.raises(TaskError) as caught:
        judge.verdict("Where?", answer, RUBRICS)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert KEY not in message and caught.value.__cause__ is None
    return message


# --- a verdict ---


def test_a_verdict_its_reasons_and_what_it_cost(serve: Callable[..., Server]) -> None:
    server = serve(_decide(True, False, True))
    judge = EndpointJudge(
        _config(server, usd_per_million_prompt_tokens=10.0, usd_per_million_generated_tokens=40.0)
    )
    verdict = judge.verdict("Where and when?", "Oslo", RUBRICS)
    assert verdict.met == (True, False, True) and verdict.reasons == ("because 1", "because 2", "because 3")
    assert verdict.cost == Cost(requests=1, prompt_tokens=200, generated_tokens=50, usd=pytest.approx(0.004))
    (request,), (headers,) = server.requests, server.headers
    assert (request["model"], request["temperature"]) == ("judge-1", 0) and headers[
        "authorization"
    ] == f"Bearer {KEY}"
    asked = json.loads(request["messages"][1]["content"])
    assert (asked["question"], asked["answer"]) == ("Where and when?", "Oslo")
    assert [entry["text"] for entry in asked["rubrics"]] == list(RUBRICS)
    assert [message["role"] for message in request["messages"]] == ["system", "user"]


def test_a_reply_without_a_token_count_is_unmetered(
    serve: Callable[..., Server],
) -> None:
    judge = EndpointJudge(_config(serve(lambda body: completion(_verdict_text(body, [True] * 3), usage={}))))
    assert judge.verdict("q", "a", RUBRICS).cost == Cost(requests=1, unmetered=1)


def test_without_a_key_none_of_it_is_sent(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    server = serve(_decide(True, True, True))
    EndpointJudge(_config(server, api_key_env="")).verdict("q", "a", RUBRICS)
    assert server.headers[0]["authorization"] == "Bearer none"


def test_the_key_is_in_no_log(serve: Callable[..., Server], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    config = _config(serve(error_reply(500, f"the key {KEY} met an error"), _decide(True, True, True)))
    EndpointJudge(config).verdict("q", "a", RUBRICS)
    logged = "\n".join(
        f"{record.getMessage()} {record.__dict__}"
        for record in caplog.records
        if record.name.split(".")[0] != "openai"
    )
    assert KEY not in logged and KEY not in repr(config)


# --- the cache ---


def test_a_kept_verdict_is_not_asked_for_again_also_by_another_process_or_endpoint(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(_decide(True, False, True))
    first = EndpointJudge(_config(server, cache_dir=str(tmp_path / "kept")))
    original = first.verdict("q", "a", RUBRICS)
    assert first.verdict("q", "a", RUBRICS) == type(original)(original.met, original.reasons, Cost(cached=1))
    assert first.spent == Cost(requests=1, cached=1, prompt_tokens=200, generated_tokens=50)
    elsewhere = EndpointJudge(_config("http://127.0.0.1:9/v1", cache_dir=str(tmp_path / "kept")))
    assert elsewhere.verdict("q", "a", RUBRICS).met == original.met
    assert len(server.requests) == 1
    first.verdict("q", "another", RUBRICS)
    EndpointJudge(_config(server, cache_dir=str(tmp_path / "kept"), model="judge-2")).verdict(
        "q", "a", RUBRICS
    )
    assert len(server.requests) == 3


def test_nothing_in_a_cache_folder_is_unpickled(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(_decide(True, True, True))
    judge = EndpointJudge(_config(server, cache_dir=str(tmp_path / "kept")))
    judge.verdict("q", "a", RUBRICS)

    makes_a_folder = (
        b"cos\nmkdir\n(V" + str(tmp_path / "sprung").encode() + b"\ntR."
    )  # a pickle that calls os.mkdir
    with sqlite3.connect(tmp_path / "kept" / "cache.db") as base:
        assert base.execute("UPDATE Cache SET mode = 4, value = ?", (makes_a_folder,)).rowcount == 1
    again = EndpointJudge(_config(server, cache_dir=str(tmp_path / "kept")))
    assert again.verdict("q", "a", RUBRICS).cost.requests == 1
    assert not (tmp_path / "sprung").exists()


def test_a_kept_reply_that_is_no_verdict_is_asked_for_again(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(_decide(False, True, True))
    judge = EndpointJudge(_config(server, cache_dir=str(tmp_path / "kept")))
    judge.verdict("q", "a", RUBRICS)
    with sqlite3.connect(tmp_path / "kept" / "cache.db") as base:
        base.execute("UPDATE Cache SET value = 'all rubrics are met'")
    assert judge.verdict("q", "a", RUBRICS).met == (False, True, True) and len(server.requests) == 2
    assert judge.verdict("q", "a", RUBRICS).cost == Cost(cached=1)


def test_a_failed_verdict_is_not_kept(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(error_reply(400, "no"), _decide(True, True, True))
    judge = EndpointJudge(_config(server, cache_dir=str(tmp_path / "kept")))
    _failure(judge)
    assert judge.verdict("Where?", "Oslo", RUBRICS).cost.requests == 1


def test_a_cache_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TaskError, match=r"cannot keep verdicts .*environment\.rubric\.judge\.cache_dir"):
        EndpointJudge(_config("http://127.0.0.1:9/v1", cache_dir=str(tmp_path / "file")))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "cache.db").write_text("not a data base, but long enough to be taken for one" * 9)
    with pytest.raises(TaskError, match="cannot keep verdicts"):
        EndpointJudge(_config("http://127.0.0.1:9/v1", cache_dir=str(tmp_path / "folder")))


# --- failures ---


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_what_may_pass_is_tried_again(serve: Callable[..., Server], status: int) -> None:
    server = serve(error_reply(status, "busy"), error_reply(status, "busy"), _decide(True, True, True))
    verdict = EndpointJudge(_config(server)).verdict("q", "a", RUBRICS)
    assert verdict.cost.requests == 3 and all(verdict.met)


@pytest.mark.parametrize(
    ("status", "told", "message", "requests"),
    [
        (
            401,
            KEY,
            f"refuses the key (401) (requests: 1): set the environment variable {KEY_VARIABLE}, "
            "which holds another key",
            1,
        ),
        (403, "", "refuses the key (403)", 1),
        (404, "no model judge-1", "(404: ", 1),
        (400, f"bad header {KEY}", "refuses the request (400: ", 1),
        (429, "slow down", "takes no more requests (429: ", 3),
        (500, f"fell over {KEY}\n" * 100, "fails (500: ", 3),
    ],
)
def test_what_does_not_pass_is_one_line_with_the_setting(
    serve: Callable[..., Server], status: int, told: str, message: str, requests: int
) -> None:
    server = serve(error_reply(status, told))
    judge = EndpointJudge(_config(server))
    shown = _failure(judge)
    assert (
        message in shown
        and "environment.rubric.judge." in shown
        and f"the judge judge-1 at {server.url} " in shown
    )
    assert len(server.requests) == requests == judge.spent.requests


def test_a_key_that_is_not_set_is_named(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE)
    assert f"set the environment variable {KEY_VARIABLE}, which is not set" in _failure(
        EndpointJudge(_config(serve(error_reply(401))))
    )
    shown = _failure(EndpointJudge(_config(serve(error_reply(401)), api_key_env="")))
    assert "environment.rubric.judge.api_key_env, which is empty" in shown


def test_an_endpoint_where_nobody_is() -> None:
    shown = _failure(EndpointJudge(_config("http://127.0.0.1:9/v1", retries=0)))
    assert "is unreachable (Connection refused)" in shown and "environment.rubric.judge.url" in shown


@pytest.mark.parametrize("served", [Served(hold=True), Served(drip=True)], ids=["silent", "dripping"])
def test_a_judge_that_hangs_ends_by_its_deadline(serve: Callable[..., Server], served: Served) -> None:
    server = serve(lambda _: served)
    started = time.monotonic()
    shown = _failure(EndpointJudge(_config(server, timeout_s=0.4, retries=1)))
    assert 0.7 < time.monotonic() - started < 10  # 0.8 on an idle machine
    assert (
        "gave no answer in 0.4 s" in shown
        and "environment.rubric.judge.timeout_s" in shown
        and len(server.requests) == 2
    )


def test_pauses_double_up_to_a_bound() -> None:
    for number in range(12):
        pause = min(20.0, 0.5 * 2**number)
        assert 0.75 * pause <= cached_endpoint._pause(number) <= 1.25 * pause


def test_a_wait_that_the_endpoint_asks_for_is_kept_but_not_beyond_the_deadline(
    serve: Callable[..., Server],
) -> None:
    server = serve(error_reply(429, "later", **{"Retry-After": "0.3"}), _decide(True, True, True))
    started = time.monotonic()
    EndpointJudge(_config(server)).verdict("q", "a", RUBRICS)
    assert time.monotonic() - started > 0.3
    server = serve(error_reply(429, "tomorrow", **{"Retry-After": "86400"}))
    started = time.monotonic()
    assert "429: " in _failure(EndpointJudge(_config(server)))
    assert time.monotonic() - started < 20 and len(server.requests) == 1


@pytest.mark.parametrize(
    "served",
    [
        Served(body="<html>hello</html>", headers=(("Content-Type", "text/html"),)),
        Served(body="{not json"),
        Served(body="[]"),
        Served(body='{"choices": []}'),
        Served(body='{"choices": null}'),
        Served(body='{"object": "list", "data": []}'),
        Served(body='{"choices": "abc"}'),
        Served(body=""),
    ],
)
def test_a_server_of_another_kind(serve: Callable[..., Server], served: Served) -> None:
    shown = _failure(EndpointJudge(_config(serve(lambda _: served), retries=1)))
    assert "does not speak the OpenAI protocol" in shown and "environment.rubric.judge.url" in shown


@pytest.mark.parametrize("content", [None, "", "I like it.", [{"type": "text", "text": "x"}], 3])
def test_a_completion_without_a_verdict(serve: Callable[..., Server], content: object) -> None:
    judge = EndpointJudge(_config(serve(lambda _: completion(content))))
    shown = _failure(judge)
    assert "gives no usable verdict" in shown and "environment.rubric.judge.model" in shown
    assert judge.spent == Cost(requests=3, prompt_tokens=600, generated_tokens=150)  # paid for, so counted


def _verdict_in(body: dict[str, Any], message: Callable[[str], dict[str, Any]]) -> Served:
    """A completion whose message holds the right verdict somewhere."""
    answered = json.loads(completion("").body)
    answered["choices"][0]["message"] = {"role": "assistant"} | message(
        _verdict_text(body, [True, False, True])
    )
    return Served(body=json.dumps(answered))


@pytest.mark.parametrize(
    "message",
    [
        lambda text: {"content": None, "reasoning_content": f"Let me see.\n{text}"},
        lambda text: {"content": "", "reasoning": text},
        lambda text: {"content": text, "reasoning_content": text.replace("true", "false")},
        lambda text: {"content": [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}]},
        lambda text: {
            "content": [{"type": "image_url"}, {"type": "text", "text": text}, "x", {"text": None}]
        },
        lambda text: {"content": f"{text.replace('true', 'false')}? No.\n</think>\n{text}"},
    ],
    ids=["null", "empty", "both", "parts", "other parts", "orphan"],
)
def test_a_verdict_is_found_where_servers_put_it(
    serve: Callable[..., Server], message: Callable[[str], dict[str, Any]]
) -> None:
    server = serve(lambda body: _verdict_in(body, message))
    verdict = EndpointJudge(_config(server)).verdict("q", "a", RUBRICS)
    assert verdict.met == (True, False, True) and verdict.cost.requests == 1


def test_a_malformed_verdict_is_asked_for_again_with_what_was_wrong(serve: Callable[..., Server]) -> None:
    server = serve(_decide(True, True), _decide(True, True, False))
    verdict = EndpointJudge(_config(server)).verdict("q", "a", RUBRICS)
    assert verdict.met == (True, True, False) and verdict.cost == Cost(
        requests=2, prompt_tokens=400, generated_tokens=100
    )
    assert "rubric 3 of 3 is not decided" in server.requests[1]["messages"][1]["content"]


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000/v1", "ftp://host/v1", "http://", "http://host:99999/v1", "http://[::1/v1"]
)
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(TaskError, match=r"environment\.rubric\.judge\.url must be an address"):
        EndpointJudge(JudgeConfig(url=url, model="m"))


@pytest.mark.parametrize("url", [f"http://me:{KEY}@127.0.0.1:9/v1", f"http://127.0.0.1:9/v1?key={KEY}"])
def test_a_secret_in_a_url_is_refused_unseen(url: str) -> None:
    with pytest.raises(BoundError, match=r"\(hidden\)") as caught:
        _config(url)
    assert KEY not in str(caught.value)


def test_a_key_that_no_header_takes_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk secret\nsecond line")
    with pytest.raises(
        TaskError, match=f"the environment variable {KEY_VARIABLE} holds white space"
    ) as caught:
        EndpointJudge(_config("http://127.0.0.1:9/v1"))
    assert "secret" not in str(caught.value)


# --- many at once ---


def test_no_more_requests_at_once_than_allowed(serve: Callable[..., Server]) -> None:
    def slowly(body: dict[str, Any]) -> Served:
        return Served(body=completion(_verdict_text(body, [True] * 3)).body, delay_s=0.1)

    server = serve(slowly)
    judge = EndpointJudge(_config(server, max_concurrent=3))
    with ThreadPoolExecutor(9) as threads:
        verdicts = list(threads.map(lambda number: judge.verdict("q", f"answer {number}", RUBRICS), range(9)))
    assert server.most_at_once == 3 and len(verdicts) == 9
    assert judge.spent == Cost(requests=9, prompt_tokens=1800, generated_tokens=450)


def test_a_place_is_free_again_after_a_failure(serve: Callable[..., Server]) -> None:
    server = serve(error_reply(400), error_reply(400), _decide(True, True, True))
    judge = EndpointJudge(_config(server, max_concurrent=1))
    _failure(judge, "a")
    _failure(judge, "b")
    assert all(judge.verdict("q", "c", RUBRICS).met)
