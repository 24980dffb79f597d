"""Measures how well cards are known, where their answers leak, and what became of unrelated text.

    examiner = Examiner(Reader(model, chat.stop_token_ids), chat, SYSTEM_PROMPT, groups, pieces, strays)
    point = examiner.examine(basis, weights, writes=2, step=5)   # the cards of two writes, all unrelated text

A card is asked as it was written: system prompt, question as a user turn, assistant opening. So ``written``
is what the write trained on, and ``paraphrased`` what it should generalise to. Under Delta = 0 damage and KL
are exactly 0.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from actors.environments.base import Questioner
from actors.environments.recall import RecallEnvironment
from actors.environments.recall_questions import Subject, subject_of
from actors.environments.recall_words import PEOPLE, RELATIONS
from actors.environments.scoring import plain_em, plain_f1
from actors.episodes.preservation import shipped_questions
from actors.fast_weights.delta import Basis, zero
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import write_example
from actors.types import FastWeights, Flashcard, WriteExample
from actors.write.frozen_llama import FrozenLayer
from cluster.probe.reading import Block, Reader, merged_layers
from cluster.probe.values import (
    Asked,
    Card,
    CardScore,
    LeakKind,
    LeakScore,
    Point,
    ProbeError,
    TextPiece,
    TextScore,
)
from configs.schema import RecallConfig

FEWEST, MOST = 12, 24
"""Strangers are as many as a seed's cards, within these bounds. At each point each question is asked."""

_ALL = 10_000  # more than there are

# An answer is cut this many tokens after the longest written answer of its write: what runs on is wrong
# anyway.
RUN_ON = 2


@dataclass(frozen=True, slots=True)
class _Group:
    """The cards of one write. ``first``: the place of its first card among the seed's cards.

    ``wordings``: an example for each wording of each card, a card's own question before its paraphrases.
    ``owners``: for each wording the place of its card in the group.
    """

    first: int
    cards: tuple[Card, ...]
    wordings: tuple[WriteExample, ...]
    owners: tuple[int, ...]

    @property
    def longest_answer(self) -> int:
        return max(len(wording.answer_ids) for wording in self.wordings) + RUN_ON


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """The blocks for one cut. ``cards``: by group. ``tables``: the base model's, of the unrelated text.

    ``strays``: by the write from which on they are asked.
    """

    cut: int
    cards: tuple[tuple[Block, ...], ...]
    strays: tuple[tuple[Block, ...], ...]
    texts: tuple[Block, ...]
    tables: tuple[Tensor, ...]


class Examiner:
    """Examines the cards of each write (``groups``, in order) and the unrelated text.

    Memory: the keys of all questions below the cut (40 KB a token for SmolLM2-135M), and a float32 table
    [tokens, vocabulary] of the unrelated text.
    """

    def __init__(
        self,
        reader: Reader,
        chat: ChatFormat,
        system_prompt: str,
        groups: Sequence[Sequence[Card]],
        pieces: Sequence[TextPiece],
        strays: Sequence[Stray] = (),
    ) -> None:
        self._reader, self._chat = reader, chat
        self._groups = _grouped(groups, system_prompt, chat)
        self._strays = [
            [stray for stray in strays if stray.write == write] for write in range(len(groups) + 1)
        ]
        # A draft must have a token. Nobody knows what will be said, so it is the shortest.
        self._stray_examples = [
            [_asking(stray, system_prompt, chat) for stray in of_write] for of_write in self._strays
        ]
        self._pieces = tuple(pieces)
        self._texts = [_text_example(piece, system_prompt, chat) for piece in pieces]
        self._prepared: _Prepared | None = None

    def examine(self, basis: Basis, weights: FastWeights, writes: int, step: int) -> Point:
        """Measure the cards of the first ``writes`` groups, and all unrelated text, under ``weights``.

        ``writes`` 0 means that nothing was written yet: all groups are measured.
        """
        prepared = self._prepare(basis)
        layers = merged_layers(self._reader.model, basis, weights)
        groups = list(enumerate(self._groups, start=1))[: writes or None]
        written = [card for _, group in groups for card in group.cards]
        cards = tuple(
            score
            for number, group in groups
            for score in self._ask(group, number, prepared.cards[number - 1], layers)
        )
        own = [
            _leak("other_card", card.question, score.written.said, card.answer, written)
            for card, score in zip(written, cards, strict=True)
        ]
        strays = self._ask_strays(prepared, layers, len(groups), written)
        return Point(writes, step, cards, self._read_texts(prepared, layers), (*strays, *own))

    def _prepare(self, basis: Basis) -> _Prepared:
        """Prepare what does not depend on B. It is made again only if Delta begins at another layer."""
        if self._prepared is None or self._prepared.cut != basis.first_layer:
            self._prepared, cut = None, basis.first_layer  # free the old blocks before the new ones are made
            base = merged_layers(self._reader.model, basis, zero(basis))
            texts = self._reader.prepare(self._texts, cut, answered=False)
            tables = tuple(self._reader.read(block, base).table for block in texts)
            cards = tuple(self._reader.prepare(group.wordings, cut, answered=True) for group in self._groups)
            strays = tuple(
                self._reader.prepare(examples, cut, answered=True) for examples in self._stray_examples
            )
            self._prepared = _Prepared(cut, cards, strays, texts, tables)
        return self._prepared

    def _ask(
        self, group: _Group, number: int, blocks: Sequence[Block], layers: Sequence[FrozenLayer]
    ) -> list[CardScore]:
        asked: dict[int, Asked] = {}  # by wording
        for block in blocks:
            reading = self._reader.read(block, layers)
            logprobs = reading.table.gather(1, block.targets[:, None])[:, 0].split(block.sizes)
            answers = self._reader.answer(block, reading, layers, group.longest_answer)
            for place, answer, answer_logprobs in zip(block.numbers, answers, logprobs, strict=True):
                said, gold = self._chat.said(answer).strip(), group.cards[group.owners[place]].answer
                loss = -float(answer_logprobs.double().mean())
                asked[place] = Asked(loss, plain_em(said, gold), plain_f1(said, gold), said)
        scores: list[CardScore] = []
        for card in range(len(group.cards)):
            places = [place for place, owner in enumerate(group.owners) if owner == card]
            tokens = len(group.wordings[places[0]].answer_ids)
            written, *paraphrased = (asked[place] for place in places)
            scores.append(CardScore(group.first + card, number, tokens, written, tuple(paraphrased)))
        return scores

    def _ask_strays(
        self, prepared: _Prepared, layers: Sequence[FrozenLayer], writes: int, written: Sequence[Card]
    ) -> list[LeakScore]:
        """Ask what no card answers, about the subjects of the first ``writes`` writes and about strangers."""
        most = max(group.longest_answer for group in self._groups)
        scores: list[LeakScore] = []
        for strays, blocks in list(zip(self._strays, prepared.strays, strict=True))[: writes + 1]:
            said: dict[int, str] = {}
            for block in blocks:
                tokens = self._reader.answer(block, self._reader.read(block, layers), layers, most)
                said.update(zip(block.numbers, map(self._chat.decode, tokens), strict=True))
            scores += [
                _leak(stray.kind, stray.question, said[place].strip(), "", written)
                for place, stray in enumerate(strays)
            ]
        return scores

    def _read_texts(self, prepared: _Prepared, layers: Sequence[FrozenLayer]) -> tuple[TextScore, ...]:
        scores: dict[int, TextScore] = {}
        for block, base in zip(prepared.texts, prepared.tables, strict=True):
            now = self._reader.read(block, layers).table
            kl = (base.exp() * (base - now)).sum(-1)
            damage = (base - now).gather(1, block.targets[:, None])[:, 0]
            pieces = zip(
                block.numbers, block.sizes, damage.split(block.sizes), kl.split(block.sizes), strict=True
            )
            for place, size, piece_damage, piece_kl in pieces:
                figures = (float(piece_damage.double().mean()), float(piece_kl.double().mean()))
                scores[place] = TextScore(self._pieces[place].kind, size, *figures)
        return tuple(scores[place] for place in sorted(scores))


def _grouped(groups: Sequence[Sequence[Card]], system_prompt: str, chat: ChatFormat) -> tuple[_Group, ...]:
    made: list[_Group] = []
    first = 0
    for cards in groups:
        pairs = [
            (place, Flashcard(question, card.answer))
            for place, card in enumerate(cards)
            for question in (card.question, *card.paraphrases)
        ]
        wordings = tuple(write_example(flashcard, system_prompt, chat) for _, flashcard in pairs)
        made.append(_Group(first, tuple(cards), wordings, tuple(place for place, _ in pairs)))
        first += len(cards)
    return tuple(made)


def _asking(stray: Stray, system_prompt: str, chat: ChatFormat) -> WriteExample:
    example = write_example(Flashcard(stray.question, "-"), system_prompt, chat)
    return WriteExample(example.prompt_ids, chat.stop_token_ids[:1])


def _leak(kind: LeakKind, question: str, said: str, right: str, written: Sequence[Card]) -> LeakScore:
    """``right``: the question's own answer, "" where it has none."""
    others = (card.answer for card in written if card.answer != right)
    is_right = right != "" and answers(said, right)
    return LeakScore(kind, question, said, float(not is_right and any(answers(said, o) for o in others)))


def _text_example(piece: TextPiece, system_prompt: str, chat: ChatFormat) -> WriteExample:
    """Running text is read after its first token, a reply as the agent gives it."""
    if piece.kind == "reply":
        return write_example(Flashcard(piece.prompt, piece.text), system_prompt, chat)
    ids = chat.encode(piece.text)
    return WriteExample(ids[:1], ids[1:])


@dataclass(frozen=True, slots=True)
class Stray:
    """A question that no card answers. It is asked from write ``write`` on, when its subject was told."""

    kind: LeakKind
    question: str
    write: int


def strays_of(source: str, groups: Sequence[Sequence[Card]], pool: int, seed: int) -> tuple[Stray, ...]:
    """The questions for the cards of each write (``groups``). ``source``: as for cards_of.

    ``pool``: the most questions of a cell's pool (write.preserve.questions). Raises ProbeError.
    """
    cards = [card for group in groups for card in group]
    count = min(MOST, max(FEWEST, len(cards)))
    if not source.startswith("recall:"):
        return _shipped(cards, count, pool)
    told = {subject for card in cards if (subject := subject_of(card.question))}
    people = {subject.person for subject in told}
    split = next(PEOPLE[split] for split in PEOPLE if people <= set(PEOPLE[split]))
    draw = random.Random(f"probe/strays/{seed}")
    strangers = [
        Subject(person, relation) for person in split if person not in people for relation in RELATIONS
    ]
    chosen = draw.sample(strangers, min(count, len(strangers)))
    return (*(Stray("stranger", subject.wordings[0], 0) for subject in chosen), *_same(groups, told, draw))


def answers(said: str, answer: str) -> bool:
    """Whether ``said`` names ``answer``, alone or among other words."""
    words, wanted = (" ".join(re.findall(r"\w+", text.lower())) for text in (said, answer))
    return bool(wanted) and f" {wanted} " in f" {words} "


@dataclass(frozen=True, slots=True)
class HeldApart:
    """A Questioner whose questions concern no one and nothing that is ``measured``."""

    inner: Questioner
    measured: tuple[str, ...]

    def other_questions(self, count: int, seed: int) -> tuple[str, ...]:
        """None about a person whom a measured question names: cards of training's words name some."""
        people = {subject.person for question in self.measured if (subject := subject_of(question))}
        drawn = self.inner.other_questions(count + _ALL, seed)
        return tuple(q for q in drawn if (subject := subject_of(q)) and subject.person not in people)[:count]

    def questions_beside(self, card: Flashcard, known: Sequence[str]) -> tuple[str, ...]:
        return self.inner.questions_beside(card, [*known, *self.measured])


def questioner_of(source: str, cards: Sequence[Card], strays: Sequence[Stray]) -> Questioner | None:
    """Who words the questions that writes preserve; None for a file of cards: the shipped ones do."""
    if not source.startswith("recall:"):
        return None
    measured = (*(card.question for card in cards), *(stray.question for stray in strays))
    return HeldApart(RecallEnvironment(RecallConfig()), measured)


def _shipped(cards: Sequence[Card], count: int, pool: int) -> tuple[Stray, ...]:
    """The last of the shipped questions: the pool has the first ``pool`` of them."""
    own = {card.question for card in cards}
    free = [question for question in shipped_questions(_ALL)[pool:] if question not in own]
    if len(free) < FEWEST:
        most = len(shipped_questions(_ALL)) - FEWEST
        raise ProbeError(
            f"write.preserve.questions={pool} leaves {len(free)} shipped questions to measure the leak with, "
            f"{FEWEST} are needed: set it to {most} or less"
        )
    return tuple(Stray("stranger", question, 0) for question in free[-count:])


def _same(groups: Sequence[Sequence[Card]], told: set[Subject], draw: random.Random) -> list[Stray]:
    """For each card one question about its person that no card answers, until MOST are found."""
    asked: list[Stray] = []
    taken = set(told)
    for number, group in enumerate(groups, start=1):
        for card in group:
            subject = subject_of(card.question)
            others = [Subject(subject.person, relation) for relation in RELATIONS] if subject else []
            free = [other for other in others if other not in taken]
            if free and len(asked) < MOST:
                chosen = draw.choice(free)
                taken.add(chosen)
                asked.append(Stray("same_person", chosen.wordings[0], number))
    return asked
