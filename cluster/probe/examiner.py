"""How well cards are known, and what became of unrelated text, under any fast weights: the measuring core of every probe.

    examiner = Examiner(Reader(model, chat.stop_token_ids), chat, SYSTEM_PROMPT, groups, pieces)
    point = examiner.examine(basis, weights, writes=2, step=5)      # the cards of the first two writes, and all unrelated text

A card is asked as it was written (system prompt, question as a user turn, assistant opening), so ``written`` is what the write trained on and
``paraphrased`` what it should generalise to. Under Delta = 0 damage and KL are exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.environments.scoring import plain_em, plain_f1
from actors.fast_weights.delta import Basis, zero
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import write_example
from actors.types import FastWeights, Flashcard, WriteExample
from actors.write.frozen_llama import FrozenLayer
from cluster.probe.reading import Block, Reader, merged_layers
from cluster.probe.supervision import examples_of
from cluster.probe.values import Asked, Card, CardScore, Point, Supervision, TextPiece, TextScore
from configs.schema import WriteConfig

RUN_ON = 2
"""An answer is cut this many tokens after the longest written one of its write: what runs on is wrong however it ends."""


@dataclass(frozen=True, slots=True)
class _Way:
    """One wording of a card's question. ``card``: its place in the group."""

    card: int
    written: bool
    example: WriteExample


@dataclass(frozen=True, slots=True)
class _Group:
    """The cards of one write: ``ways`` are all wordings of all cards, each card's own before its paraphrases. first: place of its first card."""

    first: int
    cards: tuple[Card, ...]
    ways: tuple[_Way, ...]

    @property
    def most(self) -> int:
        return max(len(way.example.answer_ids) for way in self.ways) + RUN_ON


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """All blocks for one cut, with the base model's tables of the unrelated text."""

    cut: int
    cards: tuple[tuple[Block, ...], ...]  # by group
    texts: tuple[Block, ...]
    tables: tuple[Tensor, ...]


class Examiner:
    """See the module's text. ``groups``: the cards of each write, in order. Memory: the keys of all questions below the cut (40 KB a token for
    SmolLM2-135M), and a float32 table [tokens, vocabulary] of the unrelated text."""

    def __init__(
        self,
        reader: Reader,
        chat: ChatFormat,
        system_prompt: str,
        groups: Sequence[Sequence[Card]],
        pieces: Sequence[TextPiece],
    ) -> None:
        self._reader, self._chat, self._system_prompt = reader, chat, system_prompt
        self._groups = _grouped(groups, system_prompt, chat)
        self._pieces = tuple(pieces)
        self._texts = [_text_example(piece, system_prompt, chat) for piece in pieces]
        self._prepared: _Prepared | None = None

    def examine(self, basis: Basis, weights: FastWeights, writes: int, step: int) -> Point:
        """The cards of the first ``writes`` groups (0: of all of them, as nothing was written) and all unrelated text under ``weights``."""
        prepared = self._prepare(basis)
        layers = merged_layers(self._reader.model, basis, weights)
        groups = list(enumerate(self._groups, start=1))[: writes or None]
        cards = tuple(
            score
            for number, group in groups
            for score in self._ask(group, number, prepared.cards[number - 1], layers)
        )
        return Point(writes, step, cards, self._read_texts(prepared, layers))

    def written(self, number: int, supervision: Supervision, write: WriteConfig) -> tuple[WriteExample, ...]:
        """The examples of write ``number`` (from 1), as a writer wants them."""
        return examples_of(
            supervision, self._groups[number - 1].cards, self._system_prompt, self._chat, write
        )

    def _prepare(self, basis: Basis) -> _Prepared:
        """What does not depend on B; made again only where another layer is the first that Delta touches."""
        if self._prepared is None or self._prepared.cut != basis.first_layer:
            self._prepared, cut = None, basis.first_layer  # the old one's memory goes first
            base = merged_layers(self._reader.model, basis, zero(basis))
            texts = self._reader.prepare(self._texts, cut, answered=False)
            tables = tuple(self._reader.read(block, base).table for block in texts)
            cards = tuple(
                self._reader.prepare([way.example for way in group.ways], cut, answered=True)
                for group in self._groups
            )
            self._prepared = _Prepared(cut, cards, texts, tables)
        return self._prepared

    def _ask(
        self, group: _Group, number: int, blocks: Sequence[Block], layers: Sequence[FrozenLayer]
    ) -> list[CardScore]:
        asked: dict[int, Asked] = {}  # by way
        for block in blocks:
            reading = self._reader.read(block, layers)
            logprobs = reading.table.gather(1, block.targets[:, None])[:, 0].split(block.sizes)
            said = self._reader.answer(block, reading, layers, group.most)
            for row, place in enumerate(block.numbers):
                text, gold = self._chat.decode(said[row]).strip(), group.cards[group.ways[place].card].answer
                asked[place] = Asked(_loss(logprobs[row]), plain_em(text, gold), plain_f1(text, gold), text)
        return [self._card_score(group, number, card, asked) for card in range(len(group.cards))]

    def _card_score(self, group: _Group, number: int, card: int, asked: Mapping[int, Asked]) -> CardScore:
        mine = [place for place, way in enumerate(group.ways) if way.card == card]
        tokens = len(group.ways[mine[0]].example.answer_ids)
        return CardScore(
            group.first + card, number, tokens, asked[mine[0]], tuple(asked[place] for place in mine[1:])
        )

    def _read_texts(self, prepared: _Prepared, layers: Sequence[FrozenLayer]) -> tuple[TextScore, ...]:
        scores: dict[int, TextScore] = {}
        for block, base in zip(prepared.texts, prepared.tables, strict=True):
            now = self._reader.read(block, layers).table
            kl = (base.exp() * (base - now)).sum(-1)
            damage = (base - now).gather(1, block.targets[:, None])[:, 0]
            for place, size, one, other in zip(
                block.numbers, block.sizes, damage.split(block.sizes), kl.split(block.sizes), strict=True
            ):
                scores[place] = TextScore(
                    self._pieces[place].kind, size, float(one.double().mean()), float(other.double().mean())
                )
        return tuple(scores[place] for place in sorted(scores))


def finite(weights: FastWeights) -> bool:
    """Whether there is anything to examine: a write that diverges leaves steps that are not."""
    return all(
        bool(torch.isfinite(torch.from_numpy(matrix)).all())
        for matrix in (*weights.b.values(), *weights.a.values())
    )


def _grouped(groups: Sequence[Sequence[Card]], system_prompt: str, chat: ChatFormat) -> tuple[_Group, ...]:
    made: list[_Group] = []
    first = 0
    for cards in groups:
        ways = [
            _Way(place, number == 0, write_example(Flashcard(question, card.answer), system_prompt, chat))
            for place, card in enumerate(cards)
            for number, question in enumerate((card.question, *card.paraphrases))
        ]
        made.append(_Group(first, tuple(cards), tuple(ways)))
        first += len(cards)
    return tuple(made)


def _text_example(piece: TextPiece, system_prompt: str, chat: ChatFormat) -> WriteExample:
    """Running text is read after its first token, a reply as the agent would give it."""
    if piece.kind == "reply":
        return write_example(Flashcard(piece.prompt, piece.text), system_prompt, chat)
    ids = chat.encode(piece.text)
    return WriteExample(ids[:1], ids[1:])


def _loss(logprobs: Tensor) -> float:
    return -float(logprobs.double().mean())
