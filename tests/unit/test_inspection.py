"""The record of a scripted episode: its file, its two views, its recorder, and hostile text in all of it."""

from __future__ import annotations

import asyncio
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from actors.environments.recall import RecallEnvironment
from actors.episodes.episode import EpisodeSpec
from actors.episodes.rollout import WriteBatcher
from actors.memory.build import build_memory
from actors.text.chat_template import ChatFormat
from actors.types import (
    AdapterKey,
    Answer,
    FailedEpisode,
    Flashcard,
    Generation,
    Sampling,
    Trajectory,
    WriteExample,
)
from cluster import cli
from cluster.inspection.compare import Compared
from cluster.inspection.page import render
from cluster.inspection.record import (
    FOLDER,
    EpisodeRecord,
    Origin,
    describe,
    describe_failure,
    list_records,
    load,
    save,
)
from cluster.inspection.terminal import mark, show, show_list, write_line
from configs.schema import MemoryConfig, MemoryPolicy, RecallConfig, WriteConfig
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, run_episode, sampled

ENVIRONMENT = RecallEnvironment(
    RecallConfig(sessions=2, facts_per_session=4, questions=2, filler_sentences=1)
)
TASK = next(ENVIRONMENT.tasks("train", 0, 0))
ORIGIN = Origin("quickstart-1", "train", "", 12, "worker-0", "smollm2-135m", "parametric", "settings-0.yaml")
SAID = 'Cards: [{"instruction": "Who moved?", "output": "Nora"}, {"instruction": "no answer"}, "what?"]'
HOSTILE = (
    "</pre></style><script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x1b[2J\x00\u202e[red]&lt; ]]>"
)


@pytest.fixture(scope="module")
def chat(model_path: Path) -> ChatFormat:
    from transformers import AutoTokenizer

    return ChatFormat(AutoTokenizer.from_pretrained(model_path))


@pytest.fixture(scope="module")
def play(chat: ChatFormat) -> Callable[..., Trajectory]:
    def run(
        policy: MemoryPolicy = "parametric",
        said: str = SAID,
        answer: str = "Lisbon",
        episode_id: str = "train-4.0",
    ) -> Trajectory:
        def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
            return sampled(chat.reply(said if sampling.max_tokens > 8 else answer))

        async def episode() -> Trajectory:
            settings = MemoryConfig(policy=policy, max_context_tokens=50)
            memory = build_memory(settings, WriteConfig(), SURROUNDINGS)
            spec = EpisodeSpec(
                task=TASK, episode_id=episode_id, temperature=1.0, max_answer_tokens=8, max_turns=9, seed=5
            )
            engine, writer = ScriptedPolicy(script), WriteBatcher(ScriptedWriter())
            return await run_episode(spec, ENVIRONMENT, engine, writer, chat, memory, "basis")

        return asyncio.run(episode())

    return run


@pytest.fixture(scope="module")
def record(play: Callable[..., Trajectory], chat: ChatFormat) -> EpisodeRecord:
    return describe(play(), chat, ORIGIN, receipts=True, siblings=(0.0, 0.5))


@pytest.fixture(scope="module")
def hostile(record: EpisodeRecord) -> EpisodeRecord:
    """The record with an attack in every text that a model, a data file or a user can put there."""
    segments = tuple(
        replace(segment, passages=tuple(replace(passage, text=HOSTILE) for passage in segment.passages))
        for segment in record.segments
    )
    cards = (Flashcard(HOSTILE, HOSTILE),)
    logs = (
        replace(write.log, extraction=HOSTILE, reason=HOSTILE, flashcards=cards, outcome=outcome)
        for write, outcome in zip(record.writes, ("accepted", "rolled_back"), strict=True)
    )
    writes = tuple(
        replace(write, unused=(HOSTILE,), log=log) for write, log in zip(record.writes, logs, strict=True)
    )
    answer = Answer(HOSTILE, (HOSTILE,), HOSTILE, HOSTILE, {HOSTILE: 1.0})
    outcome = replace(record.outcome, answers=(answer,), reward_parts={HOSTILE: 0.5})
    origin = replace(ORIGIN, run=HOSTILE, label=HOSTILE, worker=HOSTILE, model=HOSTILE, source="evaluation")
    record = replace(record, segments=segments, writes=writes, outcome=outcome, origin=origin)
    return replace(record, task_id=HOSTILE, environment=HOSTILE, memory_events={HOSTILE: 1})


def test_the_record_tells_the_episode_as_the_agent_saw_it(record: EpisodeRecord) -> None:
    kinds = [[passage.kind for passage in segment.passages] for segment in record.segments]
    assert kinds == [["system", "user", "user", "extract"]] * 2 + [["system", "user", "act", "user", "act"]]
    first, _, last = record.segments
    assert first.passages[1].text == TASK.payload["sessions"][0]
    assert first.passages[3].text == SAID
    assert [passage.text for passage in last.passages if passage.kind == "act"] == ["Lisbon", "Lisbon"]
    assert [segment.revision for segment in record.segments] == [0, 1, 2]
    writes = [(write.after, write.log.revision, write.receipt) for write in record.writes]
    assert writes == [(0, 1, "passed"), (1, 2, "passed")]
    assert record.writes[0].log.flashcards == (Flashcard("Who moved?", "Nora"),)
    assert record.writes[0].unused == ('{"instruction": "no answer"}', '"what?"')
    assert (record.writes[0].log.loss_before, record.writes[0].log.loss_after) == (2.0, 1.0)
    assert record.siblings == (0.0, 0.5)


def test_passages_are_the_tokens_themselves(record: EpisodeRecord, chat: ChatFormat) -> None:
    for segment in record.segments:
        for passage in segment.passages:
            assert chat.decode(segment.token_ids[passage.start : passage.end]) == passage.text


def test_a_truncated_context_is_said_to_be_cut(play: Callable[..., Trajectory], chat: ChatFormat) -> None:
    trajectory = play("truncation")
    shown = render(describe(trajectory, chat, replace(ORIGIN, memory="truncation"), True, ()), ())
    assert shown.count("context cut") == len(trajectory.segments) - 1
    assert "context cleared" not in shown
    assert "Contexts in which the agent said nothing are not recorded" in shown


def test_an_empty_write_stands_behind_the_context_that_it_came_from(
    play: Callable[..., Trajectory], chat: ChatFormat
) -> None:
    record = describe(play(said="I know nothing."), chat, ORIGIN, True, ())
    writes = [(write.after, write.log.outcome, write.receipt) for write in record.writes]
    assert writes == [(0, "empty", "none"), (1, "empty", "none")]
    assert render(record, ()).count("Nothing was written: no JSON array in the text") == 2


def test_a_file_gives_the_record_back(record: EpisodeRecord, tmp_path: Path) -> None:
    nan = replace(record.writes[0], log=replace(record.writes[0].log, loss_after=math.nan))
    path = save(replace(record, writes=(nan, record.writes[1])), tmp_path)
    assert path.name == "step-000012--train-4.0.json"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # nothing beside it
    again = load(path)
    assert isinstance(again, EpisodeRecord)
    assert math.isnan(again.writes[0].log.loss_after)
    assert replace(again, writes=record.writes) == record
    failure = describe_failure(FailedEpisode("t1", "train-4.1", "engine", "it died"), 3, ORIGIN)
    assert load(save(failure, tmp_path)) == failure


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "is no episode record of format engram-episode-1"),
        ('{"format": "engram-run-1"}', "is no episode record of format engram-episode-1"),
        ('{"format": "engram-episode-1", "kind": "episode"}', "origin: Field required"),
        ('{"format": "engram-episode-1", "kind": []}', "is no episode record"),
    ],
)
def test_a_foreign_file_is_one_line(
    tmp_path: Path, content: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    assert cli.main(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"error: {path}: " in error
    assert says in error


class Page(HTMLParser):
    """Collects tags and texts. A tag that is not closed in order is an error."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def well_formed(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def attributes(page: Page) -> set[str]:
    return {name for _, attrs in page.tags for name in attrs}


def test_the_page_needs_nothing_else_and_holds_all_parts(record: EpisodeRecord) -> None:
    compared = [Compared(2, "Lisbon", "Lisbon!", "I don't know")]
    html = render(record, compared)
    page = well_formed(html)
    assert html.startswith("<!DOCTYPE html>")
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "a", "svg"}
    assert not attributes(page) & {"src", "href", "srcset", "action"}
    assert not [name for name in attributes(page) if name.startswith("on")]
    assert "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html
    (policy,) = (attrs for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none';")
    text = "\n".join(page.texts)
    written = ("Who moved?", "Nora", "not a flashcard: ", "loss 2 -> 1", "receipt passed", "context cleared")
    states = ("no fast weights (Delta = 0)", "fast weights of revision 2", "policy version")
    for part in (*TASK.payload["sessions"], *written, *states, "I don't know", "reward", "write 2, after"):
        assert part in text
    assert text.count("context cleared") == 2


def test_a_long_passage_that_was_read_is_folded(record: EpisodeRecord) -> None:
    def folds(kind: str, text: str) -> int:
        first, *rest = record.segments
        passages = tuple(
            replace(passage, text=text) if passage.kind == kind else passage for passage in first.passages
        )
        return render(replace(record, segments=(replace(first, passages=passages), *rest)), ()).count(
            "<details"
        )

    assert folds("system", "x" * 1200) == 0
    assert folds("system", "x" * 1201) == 1
    assert folds("extract", "x" * 1201) == 0  # what the agent said is always shown


def test_a_bar_is_as_long_as_its_loss(record: EpisodeRecord) -> None:
    widths = re.findall(r"width:([\d.]+)%", render(record, ()))
    assert widths == ["100.0", "50.0"] * 2  # each write: loss 2 -> 1


def test_hostile_text_stays_text_on_the_page(hostile: EpisodeRecord, record: EpisodeRecord) -> None:
    html = render(hostile, [Compared(0, HOSTILE, HOSTILE, HOSTILE)])
    page = well_formed(html)
    clean = well_formed(render(record, [Compared(0, "a", "b", "c")]))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in clean.tags}
    assert attributes(page) == attributes(clean)
    assert html.count("<style") == html.count("</style>") == 1
    assert "<script" not in html and "<img" not in html
    assert not any(char in html for char in "\x1b\x00\u202e")
    assert sum("<script>alert(1)</script>" in text for text in page.texts) > 20  # shown as what it is


def test_hostile_text_cannot_steer_the_terminal(hostile: EpisodeRecord) -> None:
    output = io.StringIO()
    console = Console(file=output, width=4000, force_terminal=True, color_system=None)
    show(hostile, [Compared(0, HOSTILE, HOSTILE, HOSTILE)], console)
    text = output.getvalue()
    assert "\x1b" not in text and "\x00" not in text and "\u202e" not in text
    assert text.count("\\x1b[2J") > 20
    assert "[red]" in text  # no markup either


def test_the_terminal_shows_the_same(record: EpisodeRecord) -> None:
    output = io.StringIO()
    show(record, [], Console(file=output, width=200))
    text = output.getvalue()
    parts = ("Context 1", "no fast weights (Delta = 0)", "Who moved?", "Write: revision 1", "context cleared")
    for part in (*parts, "Lisbon", "reward", "siblings"):
        assert part in text
    failed = io.StringIO()
    failure = describe_failure(FailedEpisode("t1", "train-4.1", "engine", "it died"), 3, ORIGIN)
    show(failure, [], Console(file=failed, width=200))
    assert "failed at" in failed.getvalue() and "it died" in failed.getvalue()


@pytest.mark.parametrize(("used", "told"), [(6, "6 of 26"), (0, "up to 26")])  # 0: an older record
def test_of_preserved_replies_those_are_told_that_a_write_came_to(
    record: EpisodeRecord, used: int, told: str
) -> None:
    entry = next(entry for entry in record.writes if entry.log.outcome == "accepted")
    offered = (WriteExample((1,), (2,)),) * 26
    log = replace(entry.log, preserved=offered, preserved_kl=0.25, preserved_used=used)
    assert f"0.25 nats from {told} offered replies" in write_line(replace(entry, log=log))


@pytest.fixture
def run_dir(record: EpisodeRecord, tmp_path: Path) -> Path:
    save(record, tmp_path / FOLDER)
    save(replace(record, episode_id="train-5.1", origin=replace(ORIGIN, step=13)), tmp_path / FOLDER)
    return tmp_path


def test_the_command_lists_picks_and_writes_a_page(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(run_dir)]) == 0
    assert "2 kept episodes" in capsys.readouterr().out
    for wanted in ("2", "train-5.1"):
        assert cli.main(["inspect", str(run_dir), "--episode", wanted]) == 0
        assert "step 13" in capsys.readouterr().out
    page = run_dir / "pages" / "episode.html"
    assert cli.main(["inspect", str(list_records(run_dir)[0]), "--html", str(page)]) == 0
    well_formed(page.read_text())
    assert [file.name for file in page.parent.iterdir()] == ["episode.html"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["RUN/nowhere"], "does not exist: give the folder of a run"),
        (["RUN/pages"], "holds no episode"),
        (
            ["RUN", "--episode", "9"],
            "0 of the 2 episodes fit; give a number from 1 to 2, or one of step-000012--train-4.0",
        ),
        (["RUN", "--episode", "train"], "2 of the 2 episodes fit"),
        (["RUN", "--html", "x.html"], "need one episode: choose it with --episode N"),
        (["RUN", "--policy", "x"], "belongs to --compare"),
        (["RUN", "--episode", "1", "--compare"], "its settings 'settings-0.yaml' are not beside it"),
        (["RUN", "--episode", "1", "--html", "RUN/episodes"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_line(
    run_dir: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "pages").mkdir()
    assert cli.main(["inspect", *(argument.replace("RUN", str(run_dir)) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1 and error.startswith("error: ")


def test_a_real_browser_shows_the_page_and_runs_nothing(hostile: EpisodeRecord, tmp_path: Path) -> None:
    loads = [sys.executable, "-c", "import PySide6.QtWebEngineWidgets"]
    tried = subprocess.run(loads, capture_output=True, text=True, timeout=120, check=False)
    if missing := tried.stderr.splitlines():
        pytest.skip(f"the browser does not load here (see CONTRIBUTING.md): {missing[-1]}")
    page = tmp_path / "episode.html"
    page.write_text(render(hostile, ()), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).with_name("browser_page.py")), page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    assert shown["requests"] == [page.as_uri()] and shown["alerts"] == [], shown
    assert "<script>alert(1)</script>" in shown["text"] and "context cleared" in shown["text"].lower()


def test_the_page_and_the_terminal_colour_answers_by_their_score(record: EpisodeRecord) -> None:
    question, *_ = record.outcome.answers
    said = question.prediction
    answers = (replace(question, scores={"f1": 1.0}), replace(question, scores={"f1": 0.0}))
    scored = replace(record, outcome=replace(record.outcome, answers=answers))
    page = render(scored, ())
    assert page.count('<div class="passage act right">') == page.count('<div class="passage act wrong">') == 1
    assert f'<td class="right">{said}</td>' in page and f'<td class="wrong">{said}</td>' in page
    output = io.StringIO()
    show(scored, (), Console(file=output, width=100, force_terminal=True, color_system="standard"))
    assert f"\x1b[1;32m{said}" in output.getvalue() and f"\x1b[1;31m{said}" in output.getvalue()
    assert mark({"f1": 0.5, "em": 0.0}) == "partly" and mark({}) == "" and mark({"rubric": 1.0}) == "right"


def test_the_list_of_episodes_keeps_its_words_at_80_columns(record: EpisodeRecord, tmp_path: Path) -> None:
    origin = replace(record.origin, source="evaluation", label="TMEM, question-blind after warm start")
    save(replace(record, origin=origin), tmp_path / FOLDER)
    output = io.StringIO()
    show_list(tmp_path, list_records(tmp_path), Console(file=output, width=80))
    text = output.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert all(word in text for word in ("question-blind", record.task_id, "writes", "reward"))
