"""The leak of a write, and what a write preserves: which questions are asked, and that the two stay apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from actors.environments.recall import SYSTEM_PROMPT
from actors.environments.recall_questions import Subject, subject_of
from actors.environments.recall_words import PEOPLE
from actors.episodes.preservation import shipped_questions
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import zero
from actors.text.chat_template import ChatFormat
from actors.types import WriteRequest, WriteResult
from actors.write.frozen_llama import read_model
from actors.write.writer import BatchedWriter
from cluster.probe.cards import cards_of
from cluster.probe.cell import Teacher, run_cell
from cluster.probe.examiner import FEWEST, Examiner, HeldApart, Stray, answers, questioner_of, strays_of
from cluster.probe.reading import Reader
from cluster.probe.values import Card, Cell, ProbeError
from configs.schema import FastWeightsConfig, PreserveConfig, WriteConfig

DATA = Path("tests/data/probe_cards.jsonl")
FAST = FastWeightsConfig(last_layers=2)
PRESERVE = PreserveConfig(weight=1.0, questions=5, extractions=1, per_step=2, reply_tokens=2)
WRITE = WriteConfig(optimizer="adam", learning_rate=3e-3, epochs=2, preserve=PRESERVE)


# --- which questions --------------------------------------------------------------------------------------


def subjects(questions: list[str]) -> set[Subject]:
    found = [subject_of(question) for question in questions]
    assert None not in found
    return {subject for subject in found if subject is not None}


@pytest.mark.parametrize(("source", "split"), [("recall:12", "eval"), ("recall:train:12", "train")])
@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_is_measured_that_is_told_or_preserved(source: str, split: str, seed: int) -> None:
    cards = cards_of(source, seed)
    strays = strays_of(source, [cards], 24, seed)
    assert strays == strays_of(source, [cards], 24, seed) != strays_of(source, [cards], 24, seed + 5)
    told = subjects([card.question for card in cards])
    people = {subject.person for subject in told}
    strangers = subjects([stray.question for stray in strays if stray.kind == "stranger"])
    same_person = subjects([stray.question for stray in strays if stray.kind == "same_person"])
    assert len(strangers) == 12 and len(same_person) == 12, "no subject is asked twice"
    assert {subject.person for subject in strangers} <= set(PEOPLE[split]) - people
    assert {subject.person for subject in same_person} <= people and not same_person & told

    questioner = questioner_of(source, cards, strays)
    assert isinstance(questioner, HeldApart)
    pool = subjects(list(questioner.other_questions(24, seed)))
    assert len(pool) == 24
    assert not {subject.person for subject in pool} & (people | {subject.person for subject in strangers})
    assert {subject.person for subject in pool} <= set(PEOPLE["train"])
    own = [card.question for card in cards]
    beside = subjects([q for card in flashcards(cards) for q in questioner.questions_beside(card, own)])
    assert {subject.person for subject in beside} == people and not beside & (told | same_person)


def flashcards(cards: tuple[Card, ...]) -> list:
    from cluster.probe.cards import flashcards_of

    return flashcards_of(cards)


def test_a_question_about_a_told_person_is_asked_from_that_write_on() -> None:
    cards = cards_of("recall:6", 0)
    strays = strays_of("recall:6", [cards[:2], cards[2:]], 0, 0)
    for stray in strays:
        subject = subject_of(stray.question)
        told = [subject_of(card.question) for card in (cards[:2] if stray.write == 1 else cards)]
        known = subject is not None and subject.person in {other.person for other in told if other}
        assert known == (stray.kind == "same_person")
    assert {stray.write for stray in strays} == {0, 1, 2}


def test_strangers_of_a_file_are_shipped_questions_that_no_pool_has() -> None:
    cards = cards_of(str(DATA), 0)
    strays = strays_of(str(DATA), [cards], 24, 0)
    assert {stray.kind for stray in strays} == {"stranger"} and len(strays) == FEWEST
    assert not {stray.question for stray in strays} & set(shipped_questions(24))
    assert questioner_of(str(DATA), cards, strays) is None
    with pytest.raises(ProbeError, match=r"write.preserve.questions=55 leaves 5 .*set it to 48 or less"):
        strays_of(str(DATA), [cards], 55, 0)


@pytest.mark.parametrize(
    ("said", "named"),
    [("Lisbon", True), ("in lisbon.", True), ("Lisbonne", False), ("", False), ("New York", False)],
)
def test_an_answer_is_named_by_whole_words(said: str, named: bool) -> None:
    assert answers(said, "Lisbon") == named
    assert not answers(said, "")
    assert answers("It is New York now", "New York")


# --- measured and preserved -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> SimpleNamespace:
    torch.set_num_threads(1)
    basis = compute_basis_from_checkpoint(tiny_model_path, FAST, seed=0)
    model = read_model(str(tiny_model_path), "float32", torch.device("cpu"))
    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_model_path))
    return SimpleNamespace(basis=basis, model=model, chat=chat, reader=Reader(model, chat.stop_token_ids))


def test_a_leak_is_an_answer_that_was_written_for_another_question(tiny: SimpleNamespace) -> None:
    """The tiny model says the same to nearly all: that is the answer of the first card."""
    strays = (Stray("stranger", "Where does Farid live?", 0), Stray("same_person", "Who is Ann?", 2))
    draft = [Card("Where does Ann live?", "Oslo", ())]
    ask = Examiner(tiny.reader, tiny.chat, SYSTEM_PROMPT, [draft], (), strays)
    untouched = ask.examine(tiny.basis, zero(tiny.basis), 0, 0)
    said = untouched.leaks[0].said
    assert answers(said, said), "the case needs a word"
    groups = [[Card("Where does Ann live?", said, ())], [Card("What is Ben's job?", "a baker of bread", ())]]
    examiner = Examiner(tiny.reader, tiny.chat, SYSTEM_PROMPT, groups, (), strays)
    first = examiner.examine(tiny.basis, zero(tiny.basis), 1, 1)
    assert first.leak("stranger") == {"Where does Farid live?": 1.0}
    assert first.leak("same_person") == {}, "Ann's question belongs to the second write"
    own = first.leak("other_card")
    assert own == {"Where does Ann live?": 0.0}, "its own answer is right"
    both = examiner.examine(tiny.basis, zero(tiny.basis), 2, 1)
    leaked = {score.question: (score.said, score.leaked) for score in both.leaks}
    assert set(leaked) == {stray.question for stray in strays} | {
        "Where does Ann live?",
        "What is Ben's job?",
    }
    for question, (reply, was_leaked) in leaked.items():
        if question != "Where does Ann live?":
            assert was_leaked == float(answers(reply, said))
    other = Examiner(tiny.reader, tiny.chat, SYSTEM_PROMPT, [draft], (), strays)
    assert other.examine(tiny.basis, zero(tiny.basis), 0, 0).leak("stranger") == {
        "Where does Farid live?": float(answers(said, "Oslo"))
    }


def requests_of(tiny: SimpleNamespace, write: WriteConfig, seed: int) -> list[WriteRequest]:
    cards = cards_of("recall:4", seed)
    groups, requests = [cards[:3], cards[3:]], []
    strays = strays_of("recall:4", groups, 5, seed)
    examiner = Examiner(tiny.reader, tiny.chat, SYSTEM_PROMPT, groups, (), strays)
    questioner = questioner_of("recall:4", cards, strays)
    teacher = Teacher(tiny.reader, tiny.chat, SYSTEM_PROMPT, groups, questioner, seed)

    class Recorded(BatchedWriter):
        def write(self, asked: list[WriteRequest]) -> list[WriteResult]:
            requests.extend(asked)
            return super().write(asked)

    writer = Recorded(tiny.model, tiny.basis, write)
    untouched = examiner.examine(tiny.basis, zero(tiny.basis), 0, 0)
    parts = (writer, teacher, examiner, untouched)
    run = run_cell(Cell((), FAST, write), seed, tiny.basis, *parts, groups, False, lambda: None)
    assert [line.outcome for line in run.writes] == ["accepted", "accepted"]
    return requests


def test_a_write_preserves_greedy_replies_of_the_untouched_model(tiny: SimpleNamespace) -> None:
    first, second = requests_of(tiny, WRITE, 0)
    assert first.seed != second.seed
    prompts = [tiny.chat.decode(reply.prompt_ids) for reply in first.preserved]
    assert sum("Save its useful facts" in prompt for prompt in prompts) == 1
    assert any("boil an egg" in prompt for prompt in prompts)
    model = tiny.model
    for reply in first.preserved:
        ended = reply.answer_ids[-1] in tiny.chat.stop_token_ids
        assert len(reply.answer_ids) in (2, 24) or ended
        ((block,),) = [tiny.reader.prepare([reply], 0, answered=False)]
        assert tiny.reader.read(block, model.layers).table.argmax(-1).tolist() == list(reply.answer_ids)

    cards = cards_of("recall:4", 0)
    people = [{s.person for card in part if (s := subject_of(card.question))} for part in (cards[:3], cards)]
    for request, told in zip((first, second), people, strict=True):
        texts = [tiny.chat.decode(reply.prompt_ids) for reply in request.preserved]
        beside = {person for person in told if any(person in text for text in texts)}
        assert beside == told, "the questions beside the cards written so far"
    assert requests_of(tiny, replace(WRITE, preserve=PreserveConfig()), 0)[0].preserved == ()


def test_a_write_learns_each_card_behind_others_and_earlier_ones_again(tiny: SimpleNamespace) -> None:
    write = replace(WRITE, depths=(1, 3), rehearsal=2, preserve=PreserveConfig())
    first, second = requests_of(tiny, write, 0)
    turns = [
        [tiny.chat.decode(example.prompt_ids).count("?") for example in request.examples]
        for request in (first, second)
    ]
    assert sorted(turns[0]) == [1, 1, 1, 2, 2, 2, 3, 3, 3], "three cards, two to stand in front"
    assert sorted(turns[1]) == [1, 1, 1, 2, 2, 2, 4, 4, 4], "one card and two rehearsed, three in front"
