"""What a write trains on, of the same facts: the paper compares flashcards with the agent's summary and with the raw transcript.

flashcards   each card's question as a user turn, its answer as the reply
summary      all tellings as the agent's reply to being asked what it remembers: the best summary there could be, every fact and nothing else
raw          all tellings as they were read, in a user turn, between as many sentences about nothing (those of the recall environment)
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from actors.environments.recall_words import FILLERS
from actors.memory.supervised import summary_examples, text_examples
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import write_example
from actors.types import Flashcard, WriteExample
from cluster.probe.values import Card, Supervision
from configs.schema import WriteConfig


def examples_of(
    supervision: Supervision, cards: Sequence[Card], system_prompt: str, chat: ChatFormat, write: WriteConfig
) -> tuple[WriteExample, ...]:
    """Of the cards of one write. Without flashcards every card needs its telling (checked before the probe starts)."""
    if supervision == "flashcards":
        return tuple(
            write_example(Flashcard(card.question, card.answer), system_prompt, chat) for card in cards
        )
    told = [card.telling for card in cards]
    if supervision == "summary":
        return tuple(summary_examples(chat, system_prompt, " ".join(told), write))
    draw = random.Random(" ".join(told))
    sentences = told + [draw.choice(FILLERS) for _ in told]
    draw.shuffle(sentences)
    return tuple(text_examples(chat.system(system_prompt), [chat.user(" ".join(sentences))], write))
