"""What the writes of one seed are asked: what they learn and what they preserve, as in an episode.

    teacher.examples(1, cell, ())          the first write's cards, behind other cards too (write.depths)
    teacher.examples(2, cell, written)     the second's, and earlier cards again (write.rehearsal)
    teacher.preserved(2, cell, written)    other questions, with the untouched model's replies to them

The reader replies here where an episode asks its engine (actors/episodes/preservation.py); the prompts and
their order are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.environments.base import Questioner
from actors.episodes.preservation import Prompt, PromptMaker, in_turn
from actors.text.chat_template import ChatFormat
from actors.types import WriteExample
from cluster.probe.cards import examples_of, flashcards_of
from cluster.probe.reading import Reader
from cluster.probe.values import Card, Cell


class Teacher:
    """Makes the material of the writes of ``groups``.

    Remembers the replies: all cells have the same base model.
    """

    def __init__(
        self,
        reader: Reader,
        chat: ChatFormat,
        system_prompt: str,
        groups: Sequence[Sequence[Card]],
        questioner: Questioner | None,
        seed: int,
    ) -> None:
        self._reader, self._chat, self._system_prompt = reader, chat, system_prompt
        self._groups, self._questioner, self._seed = groups, questioner, seed
        self._replies: dict[Prompt, WriteExample] = {}

    def examples(self, number: int, cell: Cell, earlier: Sequence[Card]) -> tuple[WriteExample, ...]:
        """What write ``number`` (from 1) learns, after the accepted cards ``earlier``, oldest first."""
        cards = self._groups[number - 1]
        return examples_of(cell.supervision, cards, earlier, self._system_prompt, self._chat, cell.write)

    def preserved(self, number: int, cell: Cell, earlier: Sequence[Card]) -> tuple[WriteExample, ...]:
        """What write ``number`` leaves as it was."""
        config = cell.write.preserve
        if config.weight == 0:
            return ()
        maker = PromptMaker(self._chat, self._system_prompt, self._questioner, config)
        # An episode that writes other texts than cards has no card to ask beside.
        cards = [*earlier, *self._groups[number - 1]] if cell.supervision == "flashcards" else []
        written = flashcards_of(cards)
        pool, beside = maker.unanswered(maker.pool(self._seed), written), maker.beside(written)
        return in_turn(self._all(pool), self._all(beside), config.per_step)

    def _all(self, prompts: Sequence[Prompt]) -> list[WriteExample]:
        for tokens in {prompt.tokens for prompt in prompts if prompt not in self._replies}:
            self._ask([p for p in prompts if p.tokens == tokens and p not in self._replies], tokens)
        return [self._replies[prompt] for prompt in prompts]

    def _ask(self, prompts: Sequence[Prompt], tokens: int) -> None:
        """Greedy replies of the model without Delta, cut at ``tokens``."""
        draft = self._chat.stop_token_ids[:1]
        layers = self._reader.model.layers
        asked = [WriteExample(prompt.ids, draft) for prompt in prompts]
        for block in self._reader.prepare(asked, 0, answered=True):
            said = self._reader.answer(block, self._reader.read(block, layers), layers, tokens)
            for place, reply in zip(block.numbers, said, strict=True):
                self._replies[prompts[place]] = WriteExample(prompts[place].ids, reply)
