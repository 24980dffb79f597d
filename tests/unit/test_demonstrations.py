"""Where a warm start's flashcards come from: a user's file, or a teacher behind a real HTTP server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.environments.recall import RecallEnvironment
from actors.environments.records import RecordsEnvironment
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import parse_flashcards
from actors.types import Flashcard, Segment
from cluster.train.demonstrations import Demonstrations, require_demonstrations, require_sources, warm_start
from configs.bounds import ConfigError
from configs.load import flatten, load_config, to_yaml
from configs.schema import FastWeightsConfig, RunConfig
from learner.types import WarmStartReport
from tests.unit.endpoint_server import KEY, Script, Served, Server, completion, error_reply, reached
from tests.unit.learner_cases import free, learner

KEY_VARIABLE = "ENGRAM_TEST_TEACHER_KEY"
PLACES = ("Lisbon", "Oslo", "Cairo", "Quito", "Hanoi", "Accra")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    yield from reached(monkeypatch, KEY_VARIABLE)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Of an environment that knows no flashcards."""
    records = [
        {"texts": [f"Nora has moved to {place}. " * 3], "question": "Where is Nora?", "answer": place}
        for place in PLACES
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return _config(tmp_path)


def _config(folder: Path, *settings: str) -> RunConfig:
    own = ["environment.name=records", f"environment.records.path={folder / 'records.jsonl'}"]
    own += [f"output_dir={folder / 'runs'}", "warm_start.steps=2", "warm_start.tasks_per_step=4"]
    return load_config(None, [*own, "memory.max_context_tokens=30", *settings])


def _taught_by(server: Server, folder: Path, *settings: str) -> RunConfig:
    teacher = {"url": server.url, "model": "teacher-1", "api_key_env": KEY_VARIABLE, "retries": "1"}
    own = [f"warm_start.teacher.{name}={value}" for name, value in teacher.items()]
    return _config(folder, *own, *settings)


def _demonstrations(config: RunConfig, model_path: Path) -> Demonstrations:
    environment = RecordsEnvironment(config.environment.records)
    require_demonstrations(config, environment)
    return Demonstrations(config, environment, model_path)


def _cards(chat: ChatFormat, segment: Segment) -> tuple[Flashcard, ...]:
    return parse_flashcards(chat.decode(segment.token_ids[segment.action_mask]), 32).cards


def _asked(body: Mapping[str, Any]) -> str:
    return str(body["messages"][1]["content"])


def _place(body: Mapping[str, Any]) -> str:
    return next(place for place in PLACES if place in _asked(body))


def _teach(*answers: Callable[[str], str]) -> Script:
    def script(body: dict[str, Any]) -> Served:
        cards = [
            {"instruction": f"Where is Nora? ({number})", "output": answer(_place(body))}
            for number, answer in enumerate(answers)
        ]
        return completion(json.dumps(cards))

    return script


# --- a teacher ---


def test_a_teacher_writes_the_cards_of_any_environment_and_what_is_not_told_is_dropped(
    serve: Callable[..., Server], tmp_path: Path, config: RunConfig, model_path: Path, chat: ChatFormat
) -> None:
    server = serve(_teach(str, lambda place: f"{place} in 1999"))
    config = _taught_by(server, tmp_path)
    demonstrations = _demonstrations(config, model_path)
    segments = demonstrations.of_step(0)
    assert len(segments) == 4
    for segment in segments:
        (card,) = _cards(chat, segment)
        assert f"Nora has moved to {card.answer}" in chat.decode(segment.token_ids)
        assert {span.kind for span in segment.spans} == {"extract"}
    request, headers = server.requests[0], server.headers[0]
    assert request["model"] == "teacher-1" and headers["authorization"] == f"Bearer {KEY}"
    told, _, rest = _asked(request).partition("\n\n")
    assert told == " ".join([f"Nora has moved to {_place(request)}."] * 3)
    assert "They should help with: Where is Nora?" in rest  # the very request that the policy gets
    figures, asked = demonstrations.figures(), len(server.requests)
    assert (figures["teacher_cards"], figures["teacher_ungrounded"], figures["failed_tasks"]) == (4, 4, 0)
    assert figures["teacher_requests"] == asked and figures["teacher_prompt_tokens"] == 200 * asked
    assert "the teacher gave 4 flashcard(s), 4 dropped: their answer is not in their" in demonstrations.note()


def test_what_a_teacher_said_is_kept_for_later_runs(
    serve: Callable[..., Server], tmp_path: Path, config: RunConfig, model_path: Path
) -> None:
    server = serve(_teach(str))
    config = _taught_by(server, tmp_path)
    first = _demonstrations(config, model_path).of_step(0)
    asked = len(server.requests)
    later = _demonstrations(config, model_path)
    again = later.of_step(0)
    assert [s.token_ids.tolist() for s in again] == [s.token_ids.tolist() for s in first]
    assert len(server.requests) == asked and later.figures()["teacher_cached"] > 0
    assert (tmp_path / "runs" / "teacher").is_dir()


def test_a_teacher_is_asked_at_the_same_time(
    serve: Callable[..., Server], tmp_path: Path, config: RunConfig, model_path: Path
) -> None:
    def slow(body: dict[str, Any]) -> Served:
        return replace(_teach(str)(body), delay_s=0.3)

    server = serve(slow)
    _demonstrations(_taught_by(server, tmp_path), model_path).of_step(0)
    assert server.most_at_once >= 2


def test_a_reply_that_is_no_list_is_asked_for_again_and_none_is_a_list(
    serve: Callable[..., Server], tmp_path: Path, config: RunConfig, model_path: Path, chat: ChatFormat
) -> None:
    server = serve(lambda _: completion("Gladly!"), lambda _: completion("[]"))
    config = _taught_by(server, tmp_path, "warm_start.tasks_per_step=1")
    (segment,) = _demonstrations(config, model_path).of_step(0)
    assert chat.decode(segment.token_ids[segment.action_mask]) == "[]"
    assert "no JSON array in the text. Reply with the JSON list only." in _asked(server.requests[1])


def test_where_all_that_a_teacher_gives_is_dropped_the_run_says_so(
    serve: Callable[..., Server], tmp_path: Path, config: RunConfig, model_path: Path
) -> None:
    server = serve(_teach(lambda _: "somewhere else"))
    with pytest.raises(TaskError, match=r"all 4 flashcards of the teacher were dropped \(4 answer what"):
        _demonstrations(_taught_by(server, tmp_path), model_path).of_step(0)


def test_a_task_without_an_answer_of_the_teacher_fails_and_is_counted(
    serve: Callable[..., Server], tmp_path: Path, config: RunConfig, model_path: Path
) -> None:
    def down_for_one(body: dict[str, Any]) -> Served:
        return error_reply(500, "boom")(body) if _place(body) == bad else _teach(str)(body)

    server = serve(down_for_one)
    config = _taught_by(server, tmp_path, "warm_start.tasks_per_step=3", "warm_start.teacher.retries=0")
    environment = RecordsEnvironment(config.environment.records)
    bad = next(environment.tasks("train", Demonstrations(config, environment, model_path)._seed, 0)).payload[
        "answers"
    ][0]
    demonstrations = _demonstrations(config, model_path)
    assert len(demonstrations.of_step(0)) == 2
    assert demonstrations.figures()["failed_tasks"] == 1
    assert "the teacher teacher-1 at http://127.0.0.1" in demonstrations.note()
    refused = _taught_by(serve(error_reply(401)), tmp_path, "warm_start.teacher.cache_dir=" + str(tmp_path))
    with pytest.raises(TaskError, match=r"all 4 tasks of .* refuses the key \(401\).* warm_start.teacher"):
        _demonstrations(refused, model_path).of_step(0)


def test_the_log_and_the_metrics_show_what_the_teacher_gave(
    serve: Callable[..., Server], tmp_path: Path, config: RunConfig, model_path: Path
) -> None:
    class Trainer:
        def warm_start_step(self, segments: Sequence[Segment], learning_rate: float) -> WarmStartReport:
            return WarmStartReport(1, 0.5, 1.0, len(segments), 0.1)

    class Kept:
        def __init__(self) -> None:
            self.logged: list[dict[str, float]] = []

        def log(self, figures: Mapping[str, float], step: int) -> None:
            self.logged.append(dict(figures))

    server, tracker = serve(_teach(str, lambda _: "elsewhere")), Kept()
    lines: list[str] = []
    config = _taught_by(server, tmp_path)
    demonstrations = _demonstrations(config, model_path)
    trainer: Any = Trainer()
    asyncio.run(warm_start(demonstrations, trainer, config, tracker, lines.append, range(2)))
    assert len(lines) == 2 and "4 dropped: their answer is not in their text" in lines[0]
    assert tracker.logged[1]["warm_start/teacher_ungrounded"] == 8
    assert tracker.logged[1]["warm_start/teacher_cards"] == 8
    saved = to_yaml(config) + repr(flatten(config)) + repr(config)
    assert KEY not in saved and KEY not in "".join(lines)


def test_a_teacher_that_is_not_there_and_secrets_in_settings_are_refused_at_once(
    tmp_path: Path, config: RunConfig, chat: ChatFormat
) -> None:
    nobody = _config(
        tmp_path, "warm_start.teacher.url=http://127.0.0.1:9/v1", "warm_start.teacher.model=teacher-1"
    )
    environment = RecordsEnvironment(config.environment.records)
    with pytest.raises(TaskError, match=r"the teacher teacher-1 at http://127\.0\.0\.1:9/v1 is unreachable"):
        require_sources(nobody, environment, chat)
    for setting in (
        "url=http://nora:hunter2@host/v1",
        "url=http://host/v1?key=hunter2",
        "api_key_env=sk-hunter2",
    ):
        with pytest.raises(ConfigError, match=r"teacher\.\w+='\(hidden\)' is not allowed"):
            _config(tmp_path, "warm_start.teacher.model=m", f"warm_start.teacher.{setting}")
    with pytest.raises(ConfigError, match=r"warm_start\.teacher\.model='' is not allowed"):
        _config(tmp_path, "warm_start.teacher.url=http://host/v1")


def test_without_a_source_the_cure_is_named(config: RunConfig) -> None:
    with pytest.raises(TaskError, match=r"records has no demonstrations; .*warm_start\.teacher\.url"):
        require_demonstrations(config, RecordsEnvironment(config.environment.records))


def test_questions_by_lot_need_questions_beside_a_card(tmp_path: Path) -> None:
    by_lot = "warm_start.asking=by_lot"
    recall = load_config(None, ["environment.name=recall", "warm_start.steps=1", by_lot])
    environment = RecallEnvironment(recall.environment.recall)
    require_demonstrations(recall, environment)

    class NoQuestioner:
        name = "mine"
        demonstrate_flashcards = environment.demonstrate_flashcards

    with pytest.raises(
        TaskError, match=r"by_lot is not possible: mine has no questions beside a card .*=gold"
    ):
        require_demonstrations(recall, NoQuestioner())  # type: ignore[arg-type]
    filed = _config(
        tmp_path, f"warm_start.demonstrations={_file(tmp_path, {'told': 'x', 'cards': []})}", by_lot
    )
    with pytest.raises(TaskError, match="by_lot is not possible: cards of a file or a teacher"):
        require_demonstrations(filed, environment)


def test_a_context_that_never_fills_is_said(
    serve: Callable[..., Server], tmp_path: Path, config: RunConfig, model_path: Path
) -> None:
    config = _taught_by(serve(_teach(str)), tmp_path, "memory.max_context_tokens=2000")
    with pytest.raises(TaskError, match=r"memory\.max_context_tokens=2000, so no flashcards were asked for"):
        _demonstrations(config, model_path).of_step(0)


# --- a file ---


def _file(folder: Path, *lines: object) -> str:
    path = folder / "shown.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return str(path)


CARD = {"question": "Where does Nora live?", "answer": "Lisbon"}


def test_the_real_learner_learns_what_a_file_shows(
    tmp_path: Path, config: RunConfig, tiny_model_path: Path
) -> None:
    lines = [{"told": f"Omar has {count} cats.", "cards": [CARD | {"answer": count}]} for count in range(2)]
    config = _config(tmp_path, f"warm_start.demonstrations={_file(tmp_path, *lines)}")
    demonstrations = _demonstrations(config, tiny_model_path)
    basis = compute_basis_from_checkpoint(tiny_model_path, FastWeightsConfig(), seed=0)
    made = learner(tiny_model_path, basis, free())
    losses = [made.warm_start_step(demonstrations.of_step(step), 3e-3).loss for step in range(6)]
    assert losses[-1] < 0.7 * losses[0]
