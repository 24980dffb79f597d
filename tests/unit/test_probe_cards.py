"""The probe's cards and its grid: where they come from, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.environments.recall import SYSTEM_PROMPT
from actors.environments.recall_words import PEOPLE, RELATIONS
from cluster.probe.cards import (
    PARAPHRASES,
    cards_of,
    examples_of,
    flashcards_of,
    read_cards,
    recall_cards,
    unrelated_pieces,
)
from cluster.probe.cell import in_writes, points_of
from cluster.probe.grid import load_grid
from cluster.probe.values import Cell, ProbeError
from configs.load import ConfigError
from configs.schema import WriteConfig
from tests.unit.test_probe import ADAM, DATA, FAST, QUICKSTART, tiny

__all__ = ["tiny"]  # fixtures


def test_a_file_of_cards_in_either_wording_and_form(tmp_path: Path) -> None:
    cards = read_cards(DATA)
    assert [len(card.paraphrases) for card in cards] == [2, 1, 0, 1]
    assert cards[1].question == "On which shelf does Jonas keep the maps?"
    assert cards[1].answer == "the top shelf"
    assert cards[2].answer == "14"
    whole = tmp_path / "cards.json"
    whole.write_text(json.dumps([json.loads(line) for line in DATA.read_text().splitlines()]))
    assert read_cards(whole) == cards
    assert cards_of(str(DATA), 0) == cards
    assert sorted(cards_of(str(DATA), 1), key=str) == sorted(cards, key=str)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"question": "a?", "answer": "b"}\n{"question": "a', ["line 2", "Invalid JSON"]),
        ('{"question": "a?"}', ["line 1", "answer: Field required"]),
        ('{"question": "", "answer": "b"}', ["line 1", "question: ", "not empty"]),
        ('{"question": "a?", "answer": null}', ["line 1", "answer: ", "a text that is not empty"]),
        (
            '{"question": "a?", "answer": "b", "paraphrases": "c?"}',
            ["line 1", "paraphrases: ", "a valid array"],
        ),
        ('{"question": "a?", "answer": "b", "paraphrases": [3, []]}', ["line 1", "paraphrases.1: "]),
        ('[{"question": "a?", "answer": "b"}, 7]', ["item 2", "an object"]),
        ('[{"question": "a?", "answer": "b"},]', ["Invalid JSON"]),
        (
            '{"question": "a?", "answer": "b"}\n{"question": "a?", "answer": "c"}',
            ["line 2", "was there before"],
        ),
        ("\n", ["holds no card"]),
    ],
)
def test_a_bad_card_is_named_with_its_line_and_field(text: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "cards.jsonl"
    path.write_text(text)
    with pytest.raises(ProbeError) as error:
        read_cards(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert [part for part in parts if part not in str(error.value)] == []


def test_made_up_facts_are_seeded_unique_and_held_out() -> None:
    cards = recall_cards(60, "eval", 3)
    assert cards == cards_of("recall:60", 3)
    assert cards != cards_of("recall:60", 4)
    assert len({card.question for card in cards}) == 60
    tuning = cards_of("recall:train:60", 3)
    names = {split: set(PEOPLE[split]) for split in ("train", "eval")}
    for own, other, made in (("eval", "train", cards), ("train", "eval", tuning)):
        words = {word for card in made for word in card.question.replace("'s", "").replace("?", "").split()}
        assert words & names[own]
        assert not words & names[other]


def test_paraphrases_are_wordings_that_are_never_written_or_told() -> None:
    assert set(PARAPHRASES) == {relation.name for relation in RELATIONS}
    for relation in RELATIONS:
        wordings = [*relation.tellings, *relation.questions, *PARAPHRASES[relation.name]]
        assert len(set(wordings)) == len(wordings)
    for card in recall_cards(100, "train", 0):
        assert len(card.paraphrases) == 3
        assert not any(card.answer in asked for asked in (card.question, *card.paraphrases))


def test_a_fact_is_written_in_two_wordings_where_the_source_says_so() -> None:
    once, twice = cards_of("recall:5", 1), cards_of("recall:5x2", 1)
    assert once == cards_of("recall:5x1", 1)
    for card, reworded in zip(once, twice, strict=True):
        assert (card.question, card.answer) == (reworded.question, reworded.answer)
        assert (reworded.also, reworded.paraphrases) == (card.paraphrases[:1], card.paraphrases[1:])
    written = flashcards_of(twice)
    assert [(card.question, card.answer) for card in written[:2]] == [
        (twice[0].question, twice[0].answer),
        (twice[0].also[0], twice[0].answer),
    ]
    assert len(written) == 10


@pytest.mark.parametrize(
    "source",
    ["recall:0", "recall:", "recall:test:4", "recall:9999", "nowhere.jsonl", "recall:4x3", "recall:4x"],
)
def test_a_source_without_cards_is_refused(source: str) -> None:
    with pytest.raises(ProbeError, match=f"--cards {source}|--cards asks for 9999 facts"):
        cards_of(source, 0)


def test_unrelated_text_is_shipped_or_a_users(tmp_path: Path) -> None:
    shipped = unrelated_pieces(None)
    assert {piece.kind for piece in shipped} == {"text", "reply"}
    told = {
        value for relation in RELATIONS for split in ("train", "eval") for value in relation.values[split]
    }
    assert not {piece.text for piece in shipped} & told
    path = tmp_path / "novel.txt"
    path.write_text("It was a\nlong day.\n\n\nThen came the night.\n\nEnd")
    assert [piece.text for piece in unrelated_pieces(path)] == ["It was a long day.", "Then came the night."]
    assert {piece.kind for piece in unrelated_pieces(DATA)} == {"reply"}
    path.write_text("\n \n")
    with pytest.raises(ProbeError, match="no text"):
        unrelated_pieces(path)


def test_the_grid_is_every_value_with_every_other_for_each_cell() -> None:
    cells = [["write.optimizer=sgd", "write.epochs=5"], ["write.optimizer=adam"]]
    sweeps = ["fast_weights.basis=svd,random", "fast_weights.projections=[down_proj],[up_proj,gate_proj]"]
    _, grid = load_grid(QUICKSTART, ["write.batch_size=3"], cells, sweeps)
    assert len(grid) == 8
    assert {cell.write.batch_size for cell in grid} == {3}
    first = [
        (cell.write.optimizer, cell.fast_weights.basis, len(cell.fast_weights.projections))
        for cell in grid[:5]
    ]
    sgd = [("sgd", "svd", 1), ("sgd", "svd", 2), ("sgd", "random", 1), ("sgd", "random", 2)]
    assert first == [*sgd, ("adam", "svd", 1)]
    assert len({cell.label for cell in grid}) == 8
    assert load_grid(QUICKSTART, [], [], [])[1][0].label == "as configured"


@pytest.mark.parametrize(
    ("sweep", "part"),
    [
        ("train.steps=1,2", "write.*, fast_weights.* and supervision"),
        ("supervision=raw,all", "'supervision=all': must be one of flashcards, summary, raw"),
        ("write.epochs", "key=value1,value2"),
        ("write.epochs=2,x", "whole number"),
        ("write.epoch=2", "write.epochs"),
    ],
)
def test_a_bad_sweep_is_a_config_error(sweep: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part.replace("*", r"\*")):
        load_grid(QUICKSTART, [], [], [sweep])


def test_a_key_that_is_swept_twice_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"write\.epochs is given twice: write write\.epochs=1,2"):
        load_grid(QUICKSTART, [], [], ["write.epochs=1", "write.epochs=2"])


def test_what_is_written_of_the_same_facts_is_a_setting_of_the_grid(tiny: SimpleNamespace) -> None:
    _, grid = load_grid(QUICKSTART, [], [], ["supervision=flashcards,summary,raw"])
    supervisions = [cell.supervision for cell in grid]
    assert [cell.label for cell in grid] == [f"supervision={name}" for name in supervisions]
    cards, chat = recall_cards(4, "eval", 0), tiny.chat
    write = WriteConfig()
    examples = {name: examples_of(name, cards, (), SYSTEM_PROMPT, chat, write) for name in supervisions}
    opening = chat.system(SYSTEM_PROMPT)

    answers = [chat.decode(example.answer_ids).strip() for example in examples["flashcards"]]
    assert answers == [card.answer for card in cards]
    (summary,) = examples["summary"]
    assert chat.decode(summary.answer_ids).strip() == " ".join(card.telling for card in cards)
    (raw,) = examples["raw"]
    text = chat.decode(raw.answer_ids)
    assert raw.prompt_ids == opening and all(card.telling in text for card in cards)
    assert text.count(".") == 8, "as many sentences about nothing"
    assert not any(card.question in text for card in cards)

    small = WriteConfig(max_example_tokens=len(opening) + 20)
    pieces = examples_of("raw", cards, (), SYSTEM_PROMPT, chat, small)
    assert len(pieces) > 1 and sum((piece.answer_ids for piece in pieces), ()) == raw.answer_ids


def test_cards_are_dealt_to_writes_and_measurements_counted() -> None:
    assert [len(places) for places in in_writes(10, 4)] == [2, 3, 2, 3]
    assert [place for places in in_writes(10, 4) for place in places] == list(range(10))
    cell = Cell((), FAST, ADAM)
    assert points_of(cell, [3, 5], each_step=False) == 2
    assert points_of(cell, [3, 5], each_step=True) == 3 * 2 + 3 * 3
    assert points_of(Cell((), FAST, replace(ADAM, epochs=0)), [3, 3], each_step=True) == 2
