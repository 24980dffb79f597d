"""The material of a probe: cards, what a write of them trains on, and text that no card is about.

A file of cards is JSON (a list) or JSONL of {"question", "answer"[, "paraphrases": [...]][, "telling"]}.
Flashcards' own names, "instruction" and "output", are read too.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from actors.environments.base import Split
from actors.environments.recall_words import FILLERS, PEOPLE, RELATIONS
from actors.memory.supervised import summary_examples, text_examples
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import write_examples
from actors.types import Flashcard, WriteExample
from cluster.probe.values import Card, ProbeError, Supervision, TextPiece
from configs.files import FileError, parse_json
from configs.schema import WriteConfig

_FORM = '{"question": "...", "answer": "...", "paraphrases": ["..."]}'

PARAPHRASES = {
    "home": ("In which city does {name} live now?", "Name the place that {name} calls home."),
    "job": ("What kind of work does {name} do?", "Tell me {name}'s profession."),
    "pet": ("What animal does {name} keep?", "Name the pet that {name} looks after."),
    "birthday": ("On which day was {name} born?", "Tell me the date of {name}'s birthday."),
    "instrument": ("Which instrument does {name} practice?", "Name the instrument that {name} plays."),
    "dish": ("Which food does {name} like best?", "Tell me the dish that {name} loves."),
    "purchase": ("Which thing did {name} get at the shop?", "Name the item that {name} bought."),
    "holiday": ("To which country did {name} travel?", "Tell me where {name} spent the holidays."),
    "hobby": ("What does {name} do at the weekend?", "Name the thing that {name} does for fun."),
}
"""By relation: wordings that no telling and no question of the environment uses.

They are asked, never written.
"""


# --- cards ------------------------------------------------------------------------------------------------


def cards_of(source: str, seed: int) -> tuple[Card, ...]:
    """The cards of ``source``: a file, "recall:N" (held-out words) or "recall:train:N" (training's words).

    "recall:Nx2": each fact is written in two wordings. A seed above 0 shuffles a file's order. Raises
    ProbeError.
    """
    if not source.startswith("recall:"):
        cards = read_cards(Path(source))
        return cards if seed == 0 else tuple(random.Random(f"probe/{seed}").sample(cards, len(cards)))
    *middle, count = source.removeprefix("recall:").split(":")
    count, twice, wordings = count.partition("x")
    named = count.isdecimal() and int(count) > 0 and wordings in (("1", "2") if twice else ("",))
    if middle not in ([], ["train"], ["eval"]) or not named:
        raise ProbeError(
            f"--cards {source}: write recall:N, or recall:train:N to tune on other words, "
            "with N of 1 or more; Nx2 writes each fact in two wordings"
        )
    split: Split = "train" if middle == ["train"] else "eval"
    return recall_cards(int(count), split, seed, int(wordings or 1))


def recall_cards(count: int, split: Split, seed: int, wordings: int = 1) -> tuple[Card, ...]:
    """``count`` facts, each a person and a relation, so no question has two answers.

    ``wordings`` of each are written, the others are its paraphrases. Answers repeat only when a relation's
    answers are used up. Raises ProbeError.
    """
    pairs = list(itertools.product(PEOPLE[split], RELATIONS))
    if count > len(pairs):
        raise ProbeError(
            f"--cards asks for {count} facts, the {split} words make {len(pairs)}: lower it, or give a file"
        )
    name = f"probe/recall/{split}/{seed}"
    draw, draw_telling = random.Random(name), random.Random(f"{name}/telling")
    used: set[str] = set()
    cards = []
    for person, relation in draw.sample(pairs, count):
        values = relation.values[split]
        value = draw.choice([value for value in values if value not in used] or values)
        used.add(value)
        forms = (*relation.questions, *PARAPHRASES[relation.name])
        questions = tuple(form.format(name=person) for form in forms)
        telling = draw_telling.choice(relation.tellings).format(name=person, value=value)
        cards.append(Card(questions[0], value, questions[wordings:], telling, questions[1:wordings]))
    return tuple(cards)


def _text(value: object) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value).strip():
        raise PydanticCustomError("text", "Input should be a text that is not empty")
    return str(value).strip()


_Text = Annotated[str, BeforeValidator(_text)]


class _CardItem(BaseModel):
    """A card in a file."""

    question: _Text = Field(validation_alias=AliasChoices("question", "instruction"))
    answer: _Text = Field(validation_alias=AliasChoices("answer", "output"))
    paraphrases: list[_Text] = []
    telling: _Text = ""


def read_cards(path: Path) -> tuple[Card, ...]:
    """Read a file of cards. Raises ProbeError with file, line or item, field and cure.

    A question that comes twice is refused: it would have two answers.
    """
    cards: dict[str, Card] = {}
    for place, content in _items(path):
        item = _parse(place, content, _CardItem)
        if item.question in cards:
            raise ProbeError(
                f"{place}: the question {item.question!r} was there before; leave one of them out"
            )
        cards[item.question] = Card(item.question, item.answer, tuple(item.paraphrases), item.telling)
    if not cards:
        raise ProbeError(f"{path}: holds no card; give one {_FORM} a line")
    return tuple(cards.values())


def _items(path: Path) -> Iterator[tuple[str, str]]:
    """(place for messages, JSON) of each item."""
    text = read_text(path, "--cards")
    if text.lstrip().startswith("["):
        items = _parse(str(path), text, list[Any])
        yield from (
            (f"{path}, item {number}", json.dumps(item)) for number, item in enumerate(items, start=1)
        )
        return
    lines = enumerate(text.splitlines(), start=1)
    yield from ((f"{path}, line {number}", line) for number, line in lines if line.strip())


def _parse(place: str, content: str, kind: Any) -> Any:
    try:
        return parse_json(content, kind)
    except FileError as error:
        raise ProbeError(f"{place}: {error}; write {_FORM}") from None


def read_text(path: Path, argument: str) -> str:
    """Read a UTF-8 file. Raises ProbeError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ProbeError(f"{argument} {path}: no such file") from None
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 text (byte {error.start}); save it as UTF-8"
        raise ProbeError(f"{argument} {path}: {fault}") from None
    except OSError as error:
        raise ProbeError(f"{argument} {path}: cannot be read ({error.strerror})") from None


# --- what a write trains on ---------------------------------------------------------------------------------


def examples_of(
    supervision: Supervision,
    cards: Sequence[Card],
    earlier: Sequence[Card],
    system_prompt: str,
    chat: ChatFormat,
    write: WriteConfig,
) -> tuple[WriteExample, ...]:
    """The examples of one write. The paper compares flashcards with a summary and with the raw transcript.

    flashcards   each card's question as a user turn, its answer as the reply, also behind other cards
                 (write.depths); the newest of the ``earlier`` written cards again (write.rehearsal)
    summary      all tellings as the agent's reply to "what do you remember": the best possible summary
    raw          all tellings as they were read, in a user turn, mixed with as many sentences about nothing

    summary and raw need every card's telling, which is checked before the probe starts. Neither is ever
    rehearsed (actors/memory/supervised.py).
    """
    if supervision == "flashcards":
        known, new = flashcards_of(earlier), flashcards_of(cards)
        # As in actors/memory/parametric.py: the newest are rehearsed.
        taught = [*new, *known[max(0, len(known) - write.rehearsal) :]]
        limit = write.max_example_tokens
        return write_examples(taught, known, system_prompt, chat, write.depths, limit)
    tellings = [card.telling for card in cards]
    if supervision == "summary":
        return tuple(summary_examples(chat, system_prompt, " ".join(tellings), write))
    draw = random.Random(" ".join(tellings))
    sentences = tellings + [draw.choice(FILLERS) for _ in tellings]
    draw.shuffle(sentences)
    system = chat.system(system_prompt)
    turn = chat.join(system, chat.user(" ".join(sentences)))
    return tuple(text_examples(system, [turn], write))


def flashcards_of(cards: Sequence[Card]) -> list[Flashcard]:
    """The flashcards that write ``cards``: one for each wording."""
    return [Flashcard(question, card.answer) for card in cards for question in (card.question, *card.also)]


# --- unrelated text -----------------------------------------------------------------------------------------

# Characters of a user's text that are read: about 2,000 tokens. Their table takes 400 MB at a vocabulary of
# 49k.
LONGEST_FILE = 8_000

# Written for this file, so that no model was trained on it. There are two kinds, because a small model may
# keep its prose and still give the last written answer to every question: running text, and short replies to
# questions.
_TEXTS = (
    "A kettle boils faster with its lid on, because less heat leaves with the steam. The same holds for "
    "a pot of rice. When the water begins to bubble, turn the flame down and let it rest; the grains go "
    "on drinking what is left, and nothing burns to the bottom.",
    "The ferry crosses the sound twice a day in winter and every hour in summer. From the upper deck "
    "one sees the old lighthouse, painted red and white, and behind it the low hills where sheep have "
    "cropped the grass as short as a carpet. Tickets are sold on board.",
    "To fold a letter for a narrow envelope, lay the sheet flat, bring the lower third up and press the "
    "crease with a fingernail, then bring the upper third down over it. The edges should meet without "
    "force. If they do not, the first fold was too small.",
    "Most rivers carry more sand than people think. After a storm the water runs brown for days, and "
    "when it slows down behind a bend it drops what it carried. In this way islands grow, willows take "
    "root on them, and the river must look for another path to the sea.",
    "Our neighbourhood has one small cinema with ninety seats. The owner sells the tickets, shows the "
    "film and sweeps the floor afterwards. He says that the best nights are rainy ones, when people "
    "come in early, shake their coats and stay for a talk when the lights go on.",
    "A proof by contradiction starts from the opposite of what one wants to show. One follows the "
    "consequences step by step until two of them cannot both be true. Since every step was sound, the "
    "starting point must have been wrong, and so the claim holds.",
)
_REPLIES = (
    (
        "How can I keep bread fresh?",
        "Wrap it in a clean cloth and keep it in a closed box at room temperature.",
    ),
    ("Why is the sky blue?", "The air scatters blue light from the sun more than red light."),
    (
        "Give me a tip for sleeping better.",
        "Go to bed at the same time every night and leave your phone in another room.",
    ),
    ("What is three plus four?", "Three plus four is seven."),
    (
        "How do plants get their food?",
        "They make sugar from water and carbon dioxide with the energy of sunlight.",
    ),
    ("Write a short greeting for a friend.", "Hello, my friend! I hope you are having a wonderful day."),
    ("What should I pack for the beach?", "Take sunscreen, a towel, water and a hat."),
    ("Explain what a library is.", "A library is a place where people can read and borrow books."),
)


def unrelated_pieces(path: Path | None) -> tuple[TextPiece, ...]:
    """The text to measure damage on: the shipped pieces, or a user's file. Raises ProbeError.

    A .json or .jsonl file holds questions and answers. Any other is running text; blank lines part the
    pieces.
    """
    if path is None:
        texts = (TextPiece("text", "", text) for text in _TEXTS)
        return (*texts, *(TextPiece("reply", question, reply) for question, reply in _REPLIES))
    if path.suffix in (".json", ".jsonl"):
        return tuple(TextPiece("reply", card.question, card.answer) for card in read_cards(path))
    parts = [part.split() for part in read_text(path, "--unrelated")[:LONGEST_FILE].split("\n\n")]
    pieces = tuple(TextPiece("text", "", " ".join(words)) for words in parts if len(words) > 1)
    if not pieces:
        raise ProbeError(
            f"--unrelated {path}: holds no text of two words or more; "
            "give running text, blank lines between its pieces"
        )
    return pieces
