"""Flashcards: the parser takes any text, the prompt is short, an example looks like the later question."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.text.chat_template import ChatFormat
from actors.text.flashcards import (
    MAX_SIDE_CHARACTERS,
    extraction_prompt,
    parse_flashcards,
    render_flashcards,
    unused_items,
    write_example,
    write_examples,
)
from actors.types import Flashcard, WriteExample

AB = Flashcard("a", "b")
OBJECT = '{"instruction": "a", "output": "b"}'


@pytest.mark.parametrize(
    ("text", "cards", "rejected"),
    [
        (f"[{OBJECT}]", (AB,), 0),
        (f"Sure! Here they are:\n```json\n[{OBJECT}]\n```", (AB,), 0),
        ('[{"question": "a", "answer": "b"}]', (AB,), 0),
        (f'[{OBJECT}] and [{{"instruction": "c", "output": "d"}}]', (AB,), 0),  # the first array only
        (f"[1] see: [{OBJECT}]", (AB,), 0),  # an array without cards before it
        (
            '[{"instruction": "a ]}, [{", "output": "\\"b\\""}]',
            (Flashcard("a ]}, [{", '"b"'),),
            0,
        ),  # brackets and quotes in strings
        ('[{"instruction": "year?", "output": 2022}]', (Flashcard("year?", "2022"),), 0),
        ('[{"instruction": "price?", "output": 12.50}]', (Flashcard("price?", "12.50"),), 0),
        ('[{"instruction": "x", "output": -Infinity}]', (), 1),
        ('[{"instruction": "x", "output": [["b"]]}]', (), 1),
        ('[{"instruction": "x", "output": {"text": "b"}}]', (), 1),
        ('[{"instruction": "x", "output": null}]', (), 1),
        ('[{"instruction": "x", "output": NaN}]', (), 1),
        (
            '[{"instruction": "x"}, {"instruction": "", "output": "b"}, {"instruction": "x", "output": " "}]',
            (),
            3,
        ),
        (f'[{OBJECT}, [{OBJECT}], 3, "s", {OBJECT}]', (AB,), 4),  # nested, no object, duplicate
        (
            '[{"instruction": "A ", "output": "b"}, {"instruction": "a", "output": "c"}]',
            (Flashcard("A", "b"),),
            1,
        ),
        ('[{"instruction": "a\\u0000\\nb", "output": "c\\u001bd"}]', (Flashcard("a b", "c d"),), 0),
        (
            '[{"instruction": "a\nb", "output": "c"}]',
            (Flashcard("a b", "c"),),
            0,
        ),  # a raw line break in a string
        (
            '[{"instruction": "a", "output": "\\ud800b"}]',
            (AB,),
            0,
        ),  # a lone surrogate, which no tokenizer can encode
        ('[{"instruction": "誰が来た?", "output": "田中さん"}]', (Flashcard("誰が来た?", "田中さん"),), 0),
        (json.dumps([{"instruction": "x" * (MAX_SIDE_CHARACTERS + 1), "output": "b"}]), (), 1),
        # An escaped backslash ends before the quote, an escaped quote does not end the string.
        ('[{"instruction": "a\\\\", "output": "b"}, 3]', (Flashcard("a\\", "b"),), 1),
        ('[{"instruction": "a\\\\\\"]", "output": "b"}, 3]', (Flashcard('a\\"]', "b"),), 1),
        (f"[{OBJECT}, {{'instruction': 'c'}}]", (AB,), 1),
        # with a key twice nobody can say which answer is whose
        ('[{"question": "a", "answer": "b", "question": "c"}]', (), 1),
    ],
)
def test_parse(text: str, cards: tuple[Flashcard, ...], rejected: int) -> None:
    parsed = parse_flashcards(text, limit=32)
    assert (parsed.cards, parsed.rejected, parsed.repaired) == (cards, rejected, 0)
    assert cards or parsed.problem


CD = Flashcard("c", "d")


@pytest.mark.parametrize(
    ("text", "cards", "rejected", "repaired"),
    [
        ("[{'instruction': 'a', 'output': 'b'}]", (AB,), 0, 1),
        ('[{"instruction": "a", "output": "b",},]', (AB,), 0, 1),
        ('[{"Instruction": "a", "OUTPUT": "b"}]', (AB,), 0, 1),
        ('[{"q": "a", "a": "b"}, {"Q": "c", "A": "d"}]', (AB, CD), 0, 2),
        ('[{"front": "a", "back": "b"}]', (AB,), 0, 1),
        ('[{"instruction": "a", "output": ["b", "c", 3]}]', (Flashcard("a", "b, c, 3"),), 0, 1),
        ("[{'question': 'a', 'answer': True}]", (Flashcard("a", "true"),), 0, 1),
        ("[{'question': 'a', 'answer': 1e3}]", (Flashcard("a", "1e3"),), 0, 1),  # as it was written
        (OBJECT, (AB,), 0, 1),
        ('{"q": "a", "a": "b"}\n{"q": "c", "a": "d"}', (AB, CD), 0, 2),
        ('- {"q": "a", "a": "b"}\n- {"q": "c", "a": []}', (AB,), 1, 1),
        ('{question: "a", answer: "b"}', (AB,), 0, 1),
        ("[{\u201cquestion\u201d: \u201ca\u201d, \u201canswer\u201d: \u201cb\u201d}]", (AB,), 0, 1),
        ("({'question': 'a', 'answer': 'b'}, {'question': 'c', 'answer': None})", (AB,), 1, 1),
        (f"[{OBJECT} {{'q': 'c', 'a': 'd'}}]", (AB, CD), 0, 2),  # a comma is missing
        (f"[{OBJECT}, {{'q': 'c', 'a': 'd'}}, 3]", (AB, CD), 1, 1),  # one is JSON, one nearly, one nothing
        (f"{{'flashcards': [{{'q': 'a', 'a': 'b'}}, {OBJECT}]}}", (AB,), 1, 1),
        (
            "[{'q': 'Whose is Nora's dog, [Rex]?', 'a': 'It's the Okas' dog'}]",
            (Flashcard("Whose is Nora's dog, [Rex]?", "It's the Okas' dog"),),
            0,
            1,
        ),
        (
            """[{'q': 'She said "hi, [you', 'a': 'caf\\u00e9 \\ud83d\\ude42'}]""",
            (Flashcard('She said "hi, [you', "caf\u00e9 \U0001f642"),),
            0,
            1,
        ),
        ("[{'q': 'a', 'a': 'b'}]\n[]", (AB,), 0, 1),
    ],
)
def test_cards_that_are_nearly_json_are_repaired_and_counted(
    text: str, cards: tuple[Flashcard, ...], rejected: int, repaired: int
) -> None:
    parsed = parse_flashcards(text, limit=32)
    assert (parsed.cards, parsed.rejected, parsed.repaired) == (cards, rejected, repaired)
    assert parsed.problem == ""


@pytest.mark.parametrize(
    "text",
    [
        '{"q": "a", "a": "b", "q": "c"}',  # whose answer is b?
        '{"q": "a", "a": "b" "q": "c", "a": "d"}',
        '{"Q": "a", "q": "c", "a": "b"}',
        '{"q": "Where?, "a": "Oslo"}',
        "{'q': 'Where?', 'a': 'Oslo",  # cut: the answer may go on
        "{'q': 'Where?', 'a': 20",
        "{'q': 'Where?', 'a': Oslo}",
        '{"q": "a", "a": null}',
        '{"q": "a", "a": NaN}',
        '{"q": "a", "a": ["b", null]}',
        '{"q": ["a"], "b": "c"}',
        '{"name": "Nora", "home": "Lisbon"}',
        "Q: Where? A: Oslo",
    ],
)
def test_the_repair_invents_no_card(text: str) -> None:
    assert parse_flashcards(text, limit=32).cards == ()
    assert parse_flashcards(f"[{text}]", limit=32).cards == ()


def test_the_repair_keeps_the_whole_objects_of_a_list_that_breaks_off() -> None:
    parsed = parse_flashcards("[{'q': 'a', 'a': 'b'}, {'q': 'c', 'a': 'd", limit=32)
    assert (parsed.cards, parsed.rejected, parsed.repaired) == ((AB,), 0, 1)
    assert parsed.problem == "the JSON array breaks off"


def test_the_limit_counts_repaired_cards_too() -> None:
    parsed = parse_flashcards(f"[{OBJECT}, {{'q': 'c', 'a': 'd'}}, {{'q': 'e', 'a': 'f'}}]", limit=2)
    assert (parsed.cards, parsed.rejected, parsed.repaired) == ((AB, CD), 1, 1)


FORM = extraction_prompt("", ()).splitlines()[-1]


@pytest.mark.parametrize(
    "text",
    [
        f"<think>\nA draft: [{{'q': 'x', 'a': 'y'}}] or [] maybe.\n</think>\n\n[{OBJECT}]",
        f'A draft: [{{"question": "x", "answer": "y"}}], or [].</think>[{OBJECT}]',
        f"[{OBJECT}]<think>Enough? [] []",
        f"{FORM}\n[{OBJECT}]",
        f"I am to write [] if nothing is useful. There is something: [{OBJECT}]",
        f'[{{"instruction": "question", "output": "answer"}}, {OBJECT}]',
        f'[{{"Question": "Question", "answer": "answer"}}]\n[{OBJECT}]',
        f'[{{"instruction": "...", "output": "..."}}] then [{OBJECT}]',
    ],
)
def test_thoughts_and_echoes_of_the_prompt_are_no_cards_and_end_no_search(text: str) -> None:
    assert parse_flashcards(text, limit=32).cards == (AB,)


@pytest.mark.parametrize("text", [FORM, f"<think>[{OBJECT}]", f"<think>{FORM}</think>", f"[] \n[{OBJECT}]"])
def test_an_echo_or_a_thought_alone_has_no_cards(text: str) -> None:
    parsed = parse_flashcards(text, limit=32)
    assert parsed.cards == () and parsed.problem


@pytest.mark.parametrize(
    ("text", "cards"),
    [
        (f"[{OBJECT}", (AB,)),
        (f"[{OBJECT},", (AB,)),
        (f"[{OBJECT}, 3", (AB,)),
        (f'[{OBJECT}, {{"instruction": "c", "outp', (AB,)),
        (f'[{OBJECT}, {{"instruction": "c", "output": "d}}', (AB,)),
        ("[", ()),
        ('[{"instruction": "a", "output": "b"', ()),
    ],
)
def test_complete_objects_of_an_array_that_breaks_off_are_kept(
    text: str, cards: tuple[Flashcard, ...]
) -> None:
    parsed = parse_flashcards(text, limit=32)
    assert (parsed.cards, parsed.rejected) == (cards, 0)  # the broken end is no item
    assert parsed.problem == "the JSON array breaks off"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no JSON array in the text"),
        ("I cannot do that.", "no JSON array in the text"),
        ('{"name": "Nora"}', "no JSON array in the text"),
        ("[]", "the JSON array is empty"),
        ("[ \n]", "the JSON array is empty"),
        ("[1, 2]", "none of the array's 2 items is a question with an answer"),
        ("[1, 2] and [3", "none of the array's 2 items is a question with an answer"),
    ],
)
def test_an_empty_extraction_says_why(text: str, problem: str) -> None:
    parsed = parse_flashcards(text, limit=32)
    assert (parsed.cards, parsed.problem) == ((), problem)


def test_cards_are_found_behind_a_few_other_arrays() -> None:
    assert parse_flashcards("[1] " * 7 + f"[{OBJECT}]", limit=32).cards == (AB,)
    # the work is bounded
    assert parse_flashcards("[1] {2} " * 100 + f"[{OBJECT}]", limit=32).cards == ()


def test_unused_items_are_those_that_became_no_card() -> None:
    text = f'[1] [{OBJECT}, "x", {OBJECT}, {{"instruction": "c", "output": "d"}}]'
    cards = parse_flashcards(text, limit=1).cards
    assert cards == (AB,)
    assert unused_items(text, cards) == ("1", '"x"', OBJECT, '{"instruction": "c", "output": "d"}')


def test_limit() -> None:
    text = json.dumps([{"instruction": f"q{i}", "output": "a"} for i in range(5)])
    parsed = parse_flashcards(text, limit=2)
    assert [card.question for card in parsed.cards] == ["q0", "q1"]
    assert parsed.rejected == 3


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '[{"a":' * 50_000,
        "[{" + "[" * 5_000 + "]" * 5_000 + "}]",
        '["' + "\\" * 100_000,
        "[" + "9" * 100_000 + "]",
        "{'a': '" * 20_000,
        "{'a':" * 20_000,
        "[{'q': " + "[" * 50_000,
        '{"' + "'\\" * 50_000,
    ],
)
def test_deep_or_huge_texts_end_in_an_empty_extraction(text: str) -> None:
    assert parse_flashcards(text, limit=32).cards == ()


@settings(deadline=None)
@given(
    st.text(max_size=400)
    | st.text(alphabet='[]{}",:\\ab1 ', max_size=400)
    | st.text(alphabet="[](){}'\",:\\aqu1 ", max_size=400)
    | st.recursive(st.none() | st.text() | st.floats(), st.lists).map(json.dumps)
)
def test_never_raises(text: str) -> None:
    parsed = parse_flashcards(text, limit=4)
    assert len(parsed.cards) <= 4 and (parsed.cards or parsed.problem)


_SIDE = st.text(alphabet=st.characters(exclude_categories=("Cc", "Cs", "Z")), min_size=1, max_size=40)


@settings(deadline=None)
@given(st.lists(st.tuples(_SIDE, _SIDE), max_size=5, unique_by=lambda pair: pair[0].lower()))
def test_what_is_rendered_is_read_back(pairs: list[tuple[str, str]]) -> None:
    cards = tuple(Flashcard(question, answer) for question, answer in pairs)
    assert parse_flashcards(render_flashcards(cards), limit=5).cards == cards


@pytest.fixture(scope="module")
def chat(tiny_model_path: Path) -> ChatFormat:
    from transformers import AutoTokenizer

    return ChatFormat(AutoTokenizer.from_pretrained(tiny_model_path))


def test_the_prompt_is_short_and_shows_question_and_earlier_cards(chat: ChatFormat) -> None:
    assert len(chat.user(extraction_prompt("", ()))) <= 90
    prompt = extraction_prompt("Where does Nora live?", [Flashcard("Who came?", "Omar")])
    assert "Where does Nora live?" in prompt and "Who came? Omar" in prompt
    assert "Already saved" not in extraction_prompt("Where does Nora live?", ())


def test_a_written_example_has_the_form_in_which_the_question_is_asked(chat: ChatFormat) -> None:
    example = write_example(Flashcard("Where does Nora live?", "Lisbon"), "Be brief.", chat)
    assert (
        example.prompt_ids
        == chat.system("Be brief.") + chat.user("Where does Nora live?") + chat.assistant_open
    )
    assert chat.decode(example.answer_ids) == "Lisbon"
    assert example.answer_ids[-1] == chat.stop_token_ids[0]


def _behind(chat: ChatFormat, card: Flashcard, others: list[Flashcard]) -> tuple[int, ...]:
    """The prompt of ``card`` in a conversation: each reply is sampled with its stop token, then closed."""
    ids = chat.system("Be brief.")
    for other in others:
        reply = chat.reply(other.answer)
        ids += chat.user(other.question) + chat.assistant_open + reply + chat.assistant_close(reply)
    return ids + chat.user(card.question) + chat.assistant_open


def _examples(
    chat: ChatFormat,
    cards: list[Flashcard],
    others: list[Flashcard],
    depths: tuple[int, ...],
    most: int = 400,
) -> list[WriteExample]:
    return list(write_examples(cards, others, "Be brief.", chat, depths, most))


FACTS = [
    Flashcard("Where does Nora live?", "Lisbon"),
    Flashcard("What is Omar's job?", "baker"),
    Flashcard("What pet has Ida?", "a parrot"),
    Flashcard("Where did Tom go?", "Oslo"),
    Flashcard("Who came?", "Vilma"),
]


def test_without_depths_each_card_is_one_first_question(chat: ChatFormat) -> None:
    plain = [write_example(card, "Be brief.", chat) for card in FACTS]
    assert _examples(chat, FACTS, FACTS, ()) == plain


def test_each_card_is_also_learnt_behind_others_and_their_answers(chat: ChatFormat) -> None:
    cards, others = FACTS[:3], FACTS[3:]
    examples = _examples(chat, cards, others, (1, 3))
    assert len(examples) == 9 and examples[:3] == [write_example(card, "Be brief.", chat) for card in cards]
    conversations = {
        depth: {
            (_behind(chat, card, list(front)), chat.reply(card.answer))
            for card in cards
            for front in itertools.permutations([other for other in FACTS if other != card], depth)
        }
        for depth in (1, 3)
    }
    deep = [(example.prompt_ids, example.answer_ids) for example in examples[3:]]
    assert [{depth for depth in (1, 3) if form in conversations[depth]} for form in deep] == [{1}, {3}] * 3
    assert _examples(chat, cards, others, (1, 3)) == examples  # the same cards choose the same others
    assert len(set(examples)) == 9


def test_no_card_stands_behind_its_own_question_or_answer(chat: ChatFormat) -> None:
    """Two wordings of one fact are no others to each other: the model would only repeat the last answer."""
    fact = [Flashcard("Where does Nora live?", "Lisbon"), Flashcard("What is Nora's home?", "Lisbon")]
    plain = [write_example(card, "Be brief.", chat) for card in fact]
    assert _examples(chat, fact, [], (1, 3)) == plain
    outdated = Flashcard("Where does Nora live?", "Oslo")
    assert _examples(chat, fact[:1], [outdated], (1,)) == plain[:1]
    (_, example) = _examples(chat, fact[:1], [fact[1], FACTS[1]], (1,))
    assert example.prompt_ids == _behind(chat, fact[0], [FACTS[1]])


def test_a_depth_takes_what_there_is_and_different_facts_first(chat: ChatFormat) -> None:
    card, other = FACTS[0], FACTS[1]
    assert len(_examples(chat, [card], [other], (1, 3, 7))) == 2  # one deep example, not three of the same
    reworded = [other, Flashcard("How does Omar earn his money?", "baker"), FACTS[2]]
    for order in itertools.permutations(reworded):
        deep = _examples(chat, [card], list(order), (2, 3))[1:]
        fronts = [chat.decode(example.prompt_ids) for example in deep]
        assert ["parrot" in front for front in fronts] == [True, True]
        assert [front.count("baker") for front in fronts] == [1, 2]


def test_an_example_over_the_limit_leaves_its_plain_form(chat: ChatFormat) -> None:
    long = [*FACTS[:2], Flashcard("What did Ida say?", "word " * 60)]
    plain = [write_example(card, "Be brief.", chat) for card in long[:2]]
    examples = _examples(chat, long[:2], long, (1, 2), most=60)
    assert examples[:2] == plain and len(examples) < 6
    assert all(len(example.prompt_ids) + len(example.answer_ids) <= 60 for example in examples)


def test_the_prompt_asks_for_one_wording_or_two(chat: ChatFormat) -> None:
    one, two = extraction_prompt("Who?", [AB]), extraction_prompt("Who?", [AB], wordings=2)
    assert one == extraction_prompt("Who?", [AB], wordings=1) and "no duplicates" in one
    assert "twice" in two and "different words" in two and "no duplicates" not in two
    assert one.splitlines()[1:] == two.splitlines()[1:]
    assert len(chat.user(extraction_prompt("", (), wordings=2))) <= 100
