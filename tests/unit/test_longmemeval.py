"""LongMemEval from a file: the order of the sessions, how abstention counts, large files in little memory."""

from __future__ import annotations

import copy
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.environments import data_file
from actors.environments.conversation import ConversationEnvironment
from actors.environments.conversation_files import read_longmemeval
from actors.environments.data_file import DataFile
from actors.environments.scoring import says_unknown
from actors.protocols import TaskError
from actors.types import Outcome, Task
from configs.bounds import BoundError
from configs.schema import ConversationConfig

SAMPLE = Path(__file__).parents[1] / "data" / "longmemeval_sample.json"


def _environment(path: Path = SAMPLE, **settings: Any) -> ConversationEnvironment:
    return ConversationEnvironment(ConversationConfig(path=str(path), format="longmemeval", **settings))


def _told(name: str, **settings: Any) -> list[str]:
    session = _environment(**settings).start(
        Task("t", "conversation", {"conversation": name, "questions": [0]}, 0)
    )
    texts = []
    while (observation := session.observe()) is not None and not observation.wants_action:
        texts.append(observation.text)
    return texts


def _answered(name: str, answer: str) -> Outcome:
    session = _environment().start(Task("t", "conversation", {"conversation": name, "questions": [0]}, 0))
    session.act(answer)
    return session.outcome()


def test_sessions_are_told_under_their_dates_and_the_question_under_its_own() -> None:
    first, second, third = _told("q_boat")
    assert (
        first
        == "[2023/04/02 (Sun) 10:15]\nuser: How do I boil eggs?\nassistant: Seven minutes.\nThen cold water."
    )
    assert second.splitlines()[1:] == [
        "user: I painted the name on my boat today: Sea Lark ⛵!",
        "assistant: A lovely name.",
    ]
    assert third.splitlines()[1:] == ["user: Which moss grows on roofs?"]  # nothing is said in the other turn
    session = _environment().start(Task("t", "conversation", {"conversation": "q_boat", "questions": [0]}, 0))
    assert session.question == "[2023/06/01 (Thu) 09:00] What did I name my boat?"


def test_sessions_come_in_order_of_time_and_evidence_keeps_its_session() -> None:
    assert [text.splitlines()[1] for text in _told("q_count")] == [
        "user: I bought three lamps.",
        "user: I bought two more lamps.",
    ]
    (boat, count, dog) = read_longmemeval(str(SAMPLE))
    assert [c.questions[0].evidence_sessions for c in (boat, count, dog)] == [(2,), (1, 2), (1,)]


def test_a_mark_that_is_not_true_is_no_evidence(tmp_path: Path) -> None:
    def mark(items: Any) -> None:
        for turn in items[0]["haystack_sessions"][0]:
            turn["has_answer"] = "no"

    assert read_longmemeval(str(_changed(tmp_path, mark)))[0].questions[0].evidence_sessions == (2,)


def test_dates_in_another_form_leave_the_order_alone(tmp_path: Path) -> None:
    path = _changed(tmp_path, lambda items: items[1].update(haystack_dates=["20 June", "28 June", "2 May"]))
    told = {conversation.id: conversation.sessions() for conversation in read_longmemeval(str(path))}[
        "q_count"
    ]
    assert [session.date for session in told] == ["20 June", "28 June", "2 May"]


def test_max_sessions_keeps_the_last_ones_up_to_the_evidence() -> None:
    assert [text.split("]")[0] for text in _told("q_boat", max_sessions=1)] == ["[2023/04/20 (Thu) 18:40"]
    assert len(_told("q_boat", max_sessions=2)) == 2


@pytest.mark.parametrize(
    ("name", "answer", "f1", "em", "category"),
    [
        ("q_boat", "sea lark.", 1.0, 1.0, "single-session-user"),
        ("q_boat", "The Sea Lark", 0.8, 0.0, "single-session-user"),
        ("q_boat", "Not mentioned", 0.0, 0.0, "single-session-user"),
        ("q_count", "5", 1.0, 1.0, "multi-session"),
        ("q_dog_abs", "Not mentioned", 1.0, 1.0, "single-session-user"),
        ("q_dog_abs", "You didn\u2019t mention a dog.", 1.0, 1.0, "single-session-user"),
        ("q_dog_abs", "Sea Lark", 0.0, 0.0, "single-session-user"),
        ("q_dog_abs", "", 0.0, 0.0, "single-session-user"),
    ],
)
def test_answers_are_scored_plainly_and_abstention_by_saying_so(
    name: str, answer: str, f1: float, em: float, category: str
) -> None:
    outcome = _answered(name, answer)
    (scored,) = outcome.answers
    expected = {"f1": f1, "plain_f1": f1, "em": em} | ({"abstention": f1} if name.endswith("_abs") else {})
    assert scored.scores == pytest.approx(expected)
    assert (outcome.reward, scored.category) == (pytest.approx(f1), category)


@pytest.mark.parametrize(
    ("answer", "unknown"),
    [
        ("The information is not mentioned.", True),
        ("Unknown", True),
        ("I do not know.", True),
        ("There isn't enough information to tell", True),
        ("That was never mentioned", True),
        ("It cannot be determined", True),
        ("There is enough information: Sea Lark", False),
        ("I know the well-known one", False),
        ("", False),
    ],
)
def test_ways_of_saying_that_it_is_unknown(answer: str, unknown: bool) -> None:
    assert says_unknown(answer) is unknown


def test_locomos_settings_do_not_reach_it() -> None:
    assert len(list(_environment(categories=(5,), eval_fraction=0.6).tasks("eval", 0, 0))) == 2
    with pytest.raises(
        BoundError, match="scorer='official' is not allowed: it must be plain where format is longmemeval"
    ):
        _environment(scorer="official")


@pytest.mark.parametrize("chunk", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize("form", [{"indent": 1}, {"ensure_ascii": False}, {"separators": (",", ":")}])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_list_comes_item_by_item_wherever_it_is_cut(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chunk: int, form: dict[str, Any], encoding: str
) -> None:
    monkeypatch.setattr(data_file, "_CHUNK", chunk)
    values = [{"text": "⛵ naïve", "of": [1, {"a": 'b\\"}]{'}]}, {}, {"x": {"y": {}}}, {"}": "é" * 20}]
    file = DataFile(str(tmp_path / "list.json"), "path", "a list")
    Path(file.path).write_text(f" {json.dumps(values, **form)}\n", encoding=encoding)
    items = list(file.items(dict[str, Any], "text"))
    assert [value for _, value in items] == values
    assert [place.number for place, _ in items] == [0, 1, 2, 3]
    assert [file.read_item(place, dict[str, Any]) for place, _ in items] == values
    content = Path(file.path).read_bytes()
    assert [json.loads(content[place.start : place.end]) for place, _ in items] == values


def test_what_is_harmless_is_forgiven(tmp_path: Path) -> None:
    def change(items: Any) -> None:
        items[0].update(question_id=17, answer=4, question_date=None, haystack_dates=None)
        items[0].update(answer_session_ids=None, haystack_session_ids=None)
        items[0]["haystack_sessions"][1][0]["content"] = None
        del items[1]["question_date"], items[1]["haystack_dates"]

    path = _changed(tmp_path, change)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    first, second, _ = read_longmemeval(str(path))
    assert first.id == "17" and first.questions[0].answer == "4"
    assert first.questions[0].text == "What did I name my boat?" and second.questions[0].text[0] != "["
    assert [session.date for session in first.sessions()] == ["", "", ""]
    session = _environment(path).start(Task("t", "conversation", {"conversation": "17", "questions": [0]}, 0))
    observation = session.observe()
    assert observation is not None and observation.text.startswith("user: ")


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), float("-inf")])
def test_an_answer_that_is_no_number_is_refused(tmp_path: Path, answer: float) -> None:
    _refused(_changed(tmp_path, lambda items: items[0].update(answer=answer)), "item 0: not JSON")


@pytest.mark.parametrize("content", [b"[]", b" [ \n ] "])
def test_an_empty_list_has_no_items(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.json").write_bytes(content)
    assert list(DataFile(str(tmp_path / "list.json"), "path", "a list").items(dict[str, Any], "id")) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"item 0: not JSON \(premature EOF\) after byte 0"),
        (b'{"a": 1}', "Input should be a JSON list: give a.setting the path of a list"),
        (b"3", "Input should be a JSON list"),
        (
            b'[{"a": 1}, {"b": ]',
            r"item 1: not JSON \(unallowed token at this point in JSON text\) after byte 9",
        ),
        (b"[{} 2]", "item 1: not JSON .after array element, I expect ',' or ']'. after byte 3"),
        (b"[{}", r"item 1: not JSON \(premature EOF\) after byte 3"),
        (b"[{}] {}", r"item 1: not JSON \(trailing garbage\)"),
        (b"[{}, 1]", "item 1: Input should be an object"),
        (b'[{}, "}"]', "item 1: Input should be an object"),
        (b"[[{}], {}]", "item 0: Input should be an object"),
        (b'[{"a": ' + b"7" * 5000 + b"}]", "item 0: not JSON .integer overflow"),
        (b"[" * 100_000, "item 0: not JSON"),
        (b'[{"a": ' + b"[" * 1000 + b"]" * 1000 + b"}]", "item 0: Invalid JSON: recursion limit exceeded"),
    ],
)
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(TaskError, match=rf"other\.json: {message}") as error:
        list(DataFile(str(path), "a.setting", "a list").items(dict[str, Any], "id"))
    assert "\n" not in str(error.value)


HALVES = (
    b'\xef\xbb\xbf[{"id": "a\\ud83d", "t": "x\\udc00\\ud800 \xff}"}, '
    b'{"id": "b", "t": "\\\\ud800 \\ud83d\\ude00"}]'
)


@pytest.mark.parametrize("chunk", [3, 7, 11, 1 << 16])
def test_what_cannot_be_encoded_is_replaced_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, chunk: int
) -> None:
    monkeypatch.setattr(data_file, "_CHUNK", chunk)
    path = tmp_path / "halves.json"
    path.write_bytes(HALVES)
    file = DataFile(str(path), "a.setting", "a list")
    items = list(file.items(dict[str, str], "id"))
    assert [item for _, item in items] == [
        {"id": "a\ufffd", "t": "x\ufffd\ufffd \ufffd}"},
        {"id": "b", "t": "\\ud800 \U0001f600"},
    ]
    assert [file.read_item(place, dict[str, str]) for place, _ in items] == [item for _, item in items]
    path.write_bytes(HALVES.replace(b"[", b"").replace(b"}, ", b"}\n").replace(b"}]", b"}"))
    assert [item for _, item in file.lines(dict[str, str])] == [item for _, item in items]
    said = "4 character(s) that cannot be encoded became U+FFFD"
    assert [record.message for record in caplog.records] == [f"{path}: {said}"] * 2


def test_a_fault_shows_no_more_of_the_file_than_a_line(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"id": "n\n" * 5000, "x" * 5000: 3}]))
    with pytest.raises(TaskError, match=r"long\.json: item 0 \('n\\n") as error:
        list(DataFile(str(path), "a.setting", "a list").items(dict[str, str], "id"))
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 600


def test_a_long_file_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    size, count = 200_000, 100
    with path.open("w") as file:
        file.write("[" + ", ".join(json.dumps({"id": "x", "text": "a" * size}) for _ in range(count)) + "]")
    source = DataFile(str(path), "a.setting", "a list")
    tracemalloc.start()
    places = [place for place, _ in source.items(dict[str, str], "id")]
    assert len(places) == count and tracemalloc.get_traced_memory()[1] < 10 * size
    tracemalloc.reset_peak()
    assert source.read_item(places[-1], dict[str, str]) == {"id": "x", "text": "a" * size}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * size


def test_a_missing_file_or_no_path(tmp_path: Path) -> None:
    _refused(
        tmp_path / "none.json",
        "none.json: cannot be read .*: give environment.conversation.path the path of a LongMemEval file",
    )
    with pytest.raises(TaskError, match=r"environment.conversation.path is empty"):
        read_longmemeval("")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda items: items.__setitem__(0, 3), "item 0: Input should be an object"),
        (lambda items: items[1].pop("question_id"), "item 1: question_id: Field required"),
        (lambda items: items[1].update(question_id="q_boat"), "item 1: question_id 'q_boat' occurs twice"),
        (
            lambda items: items[0].pop("question_type"),
            r"item 0 \('q_boat'\): question_type: Field required",
        ),
        (
            lambda items: items[0].update(answer=None),
            r"item 0 \('q_boat'\): answer: Input should be a text or a number",
        ),
        (lambda items: items[0].pop("haystack_sessions"), "haystack_sessions: Field required"),
        (
            lambda items: items[0].update(haystack_sessions=[[], [], []]),
            "haystack_sessions: Input should have at least one turn with a text",
        ),
        (
            lambda items: items[0]["haystack_dates"].pop(),
            "haystack_dates: 2 dates stand beside 3 haystack_sessions",
        ),
        (
            lambda items: items[0]["haystack_sessions"][1].append("x"),
            "haystack_sessions.1.2: Input should be an object",
        ),
        (
            lambda items: items[0]["haystack_sessions"][1][0].update(role="bot"),
            "haystack_sessions.1.0.role: Input should be 'user' or 'assistant'",
        ),
        (
            lambda items: items[0]["haystack_sessions"][1][0].pop("content"),
            "haystack_sessions.1.0.content: Field required",
        ),
        (lambda items: items.__delitem__(slice(1, 3)), "it has 1 conversation, and at least 2 are needed"),
    ],
)
def test_a_malformed_file_gives_item_field_and_expectation(
    tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    _refused(_changed(tmp_path, change), message)


@pytest.mark.parametrize(
    "shifted", [lambda text: f"      {text}", lambda text: text.replace("q_boat", "q_boot")]
)
def test_a_file_that_changes_under_a_run_is_noticed(tmp_path: Path, shifted: Callable[[str], str]) -> None:
    path = _changed(tmp_path, lambda items: None)
    environment = _environment(path)
    path.write_text(shifted(path.read_text()))
    with pytest.raises(TaskError, match="the file was changed after it was first read"):
        environment.start(Task("t", "conversation", {"conversation": "q_boat", "questions": [0]}, 0))


def test_a_file_that_is_gone_cannot_be_read(tmp_path: Path) -> None:
    path = _changed(tmp_path, lambda items: None)
    environment = _environment(path)
    path.unlink()
    with pytest.raises(TaskError, match=r"changed\.json: cannot be read \(No such file"):
        environment.start(Task("t", "conversation", {"conversation": "q_boat", "questions": [0]}, 0))


def test_a_real_file(longmemeval_path: Path) -> None:
    environment = _environment(longmemeval_path)
    tasks = list(environment.tasks("eval", 0, 0))
    assert len(tasks) > 100
    for task in tasks[:20]:
        assert environment.start(task).observe() is not None


def _changed(tmp_path: Path, change: Callable[[Any], object]) -> Path:
    items = copy.deepcopy(json.loads(SAMPLE.read_text()))
    change(items)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(items))
    return path


def _refused(path: Path, message: str) -> None:
    with pytest.raises(TaskError, match=message) as error:
        _environment(path)
    assert "\n" not in str(error.value)
