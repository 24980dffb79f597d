"""The replies that a write leaves as they were: a pool of other questions, answered by the policy itself.

    questions: the environment's (Questioner) or shipped ones    -+
    memory-writing prompts over shipped texts                     |
    everyday requests                                             +-- policy, Delta = 0, greedy --> replies
    questions beside the new cards (Questioner), or theirs       -+    once a policy version
    under other names

Why: a write that trains cards alone answers every question with them. The pool holds the replies to questions
of the same form still; the questions beside a card teach that its answer is not the subject's only one.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from actors.environments.base import Environment, Questioner, Rephraser
from actors.protocols import Policy, TaskError
from actors.text.chat_template import ChatFormat, Ids
from actors.text.flashcards import extraction_prompt
from actors.text.plain_text import encodable
from actors.types import AdapterKey, Flashcard, PolicyVersion, Sampling, WriteExample
from configs.schema import PreserveConfig, RunConfig
from configs.user_code import owned

_NAMES = ("Ada", "Bram", "Celine", "Dario", "Esme", "Farid")
_FORMS = (
    "Where does {name} live?",
    "What does {name} do for a living?",
    "When is {name}'s birthday?",
    "Which pet does {name} have?",
    "What is {name}'s favourite food?",
    "What did {name} buy last week?",
    "Who is {name}'s best friend?",
    "What is the name of {name}'s sister?",
    "What is my {thing}?",
    "When is my next {event}?",
)
_THINGS = ("favourite colour", "phone number", "job", "brother's name", "car", "plan for the summer")
_EVENTS = ("meeting", "flight", "appointment", "exam", "holiday", "concert")
_TEXTS = (
    "Maren has moved to Utrecht. The bus was late again. Jonas adopted a parrot.",
    "It rained all day. Petra works as a welder. My sister Anneke will visit on May 3.",
    "The shop had no bread left. Ruben plays the oboe. Silke bought a lamp.",
    "I like strong tea. My train leaves at nine. Falk spent the holidays in Peru.",
)
# a name within a question: a capital letter behind another word
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*")
_MOST_POOLS = 64  # a task may have a system prompt of its own
_EVERYDAY = (
    "How do I boil an egg?",
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "Which is larger, the sun or the moon?",
    "How can I learn to cook?",
    "Give me three words that rhyme with house.",
    "Why do leaves turn brown in autumn?",
    "Tell me a short joke.",
)
_MOST_REPLIES = 4096  # remembered; a conversation never changes its version


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, and how many tokens of the reply to it are preserved."""

    ids: Ids
    tokens: int


def shipped_questions(count: int) -> tuple[str, ...]:
    """At most ``count`` questions about people and things that nobody was told of."""
    return tuple(
        form.format(name=name, thing=thing, event=event)
        for name, thing, event in zip(_NAMES, _THINGS, _EVENTS, strict=True)
        for form in _FORMS
    )[:count]


class OtherNames:
    """The Questioner of conversations and of environments that have none: the cards' own, of other people."""

    def other_questions(self, count: int, seed: int) -> tuple[str, ...]:
        return ()

    def questions_beside(self, card: Flashcard, known: Sequence[str]) -> tuple[str, ...]:
        """The card's question under each shipped name in turn; none where it has no name."""
        if not _NAME.search(card.question):
            return ()
        names = random.Random(card.question).sample(_NAMES, len(_NAMES))
        others = (_NAME.sub(name, card.question) for name in names)
        return tuple(other for other in others if other not in known)


class PromptMaker:
    """Makes the prompts of a pool, in the form of an episode's own."""

    def __init__(
        self,
        chat: ChatFormat,
        system_prompt: str,
        questioner: Questioner | None,
        config: PreserveConfig,
        wordings: int = 1,
    ) -> None:
        self._chat, self._system_prompt, self._opening = chat, system_prompt, chat.system(system_prompt)
        self._questioner: Questioner = questioner or OtherNames()
        self._config, self._wordings = config, wordings

    def under(self, system_prompt: str) -> PromptMaker:
        """The maker for a task with a system prompt of its own; this one where it has none."""
        if system_prompt in ("", self._system_prompt):
            return self
        return PromptMaker(self._chat, system_prompt, self._questioner, self._config, self._wordings)

    def pool(self, seed: int) -> list[Prompt]:
        """The prompts that all writes of a version share, memory-writing prompts among the questions."""
        count, config = self._config.questions, self._config
        questions = _asked_of(self._questioner.other_questions, count, seed)
        questions += shipped_questions(count - len(questions))
        prompts = [self._asked(question) for question in questions]
        wanted = self._chat.user(extraction_prompt("", (), self._wordings))
        passages = [
            *(self._chat.user(text) + wanted for text in _TEXTS[: config.extractions]),
            *(self._chat.user(request) for request in _EVERYDAY[: config.everyday]),
        ]
        # Spread over the pool: a step takes few of it, in turn.
        for number, turns in enumerate(passages):
            ids = self._opening + self._chat.join(self._opening, turns) + self._chat.assistant_open
            prompts.insert(
                number * (len(questions) // len(passages) + 1), Prompt(ids, config.extraction_tokens)
            )
        return prompts

    def beside(self, cards: Sequence[Flashcard]) -> list[Prompt]:
        """Questions on the subjects of an episode's ``cards``, so far, that none of them answers."""
        known = [card.question for card in cards]
        questions = dict.fromkeys(
            question
            for card in cards
            for question in _asked_of(self._questioner.questions_beside, card, known)[: self._config.beside]
        )
        return [self._asked(question) for question in questions]

    def unanswered(self, pool: Sequence[Prompt], cards: Sequence[Flashcard]) -> list[Prompt]:
        """The ``pool`` without the questions of ``cards``, also in the environment's other words."""
        questions = {card.question for card in cards}
        environment: object = self._questioner
        if isinstance(environment, Rephraser):
            wordings = environment.wordings
            questions |= {other for question in questions for other in _asked_of(wordings, question)}
        answered = {self._asked(question).ids for question in questions}
        return [prompt for prompt in pool if prompt.ids not in answered]

    def _asked(self, question: str) -> Prompt:
        asked = self._chat.join(self._opening, self._chat.user(question))
        ids = self._opening + asked + self._chat.assistant_open
        return Prompt(ids, self._config.reply_tokens)


def _asked_of(function: Callable[..., Sequence[str]], *arguments: object) -> tuple[str, ...]:
    """The questions that a method of the user's environment gives. Raises TaskError."""
    with owned(f"the environment's {function.__name__}", TaskError, function):
        return tuple(encodable(question) for question in function(*arguments))


def in_turn(
    pool: Sequence[WriteExample], beside: Sequence[WriteExample], per_step: int
) -> tuple[WriteExample, ...]:
    """The replies in the order in which steps take them, ``per_step`` each.

    Where there are questions beside the cards, they are half of every step's.
    """
    own = min(per_step // 2, len(beside))
    shared = per_step - own
    if not pool:
        return tuple(beside)
    steps = ceil(len(pool) / shared) if shared else 1
    order: list[WriteExample] = []
    for step in range(steps):
        order += [beside[(step * own + i) % len(beside)] for i in range(own)]
        order += [pool[(step * shared + i) % len(pool)] for i in range(shared)]
    return tuple(order)


class Preservation:
    """The pool of one worker. Bound to the event loop of its first use.

    Everything follows from version, seed and cards, so that a lost episode can be replayed elsewhere.
    """

    def __init__(self, policy: Policy, maker: PromptMaker, config: PreserveConfig, seed: int) -> None:
        self._policy, self._maker, self._config, self._seed = policy, maker, config, seed
        self._version: PolicyVersion | None = None
        self._pools: OrderedDict[str, list[Prompt]] = OrderedDict()  # by a task's own system prompt
        self._replies: OrderedDict[Ids, WriteExample | None] = OrderedDict()
        self._asking: dict[Ids, asyncio.Task[WriteExample | None]] = {}

    async def replies(self, cards: Sequence[Flashcard], system_prompt: str = "") -> tuple[WriteExample, ...]:
        """What a write preserves when the episode's cards are ``cards``. Raises EngineError, TaskError.

        ``system_prompt``: the task's own, if it has one.
        """
        if self._config.weight == 0:
            return ()
        if self._version != self._policy.version:
            self._version = self._policy.version
            self._replies.clear()
            self._asking = {}  # the older tasks hold on to theirs
        maker = self._maker.under(system_prompt)
        shared = maker.unanswered(self._prompts(maker, system_prompt), cards)
        pool, beside = await asyncio.gather(self._all(shared), self._all(maker.beside(cards)))
        return in_turn(pool, beside, self._config.per_step)

    def _prompts(self, maker: PromptMaker, system_prompt: str) -> list[Prompt]:
        if system_prompt not in self._pools:
            self._pools[system_prompt] = maker.pool(self._seed)
            if len(self._pools) > _MOST_POOLS:
                self._pools.popitem(last=False)
        return self._pools[system_prompt]

    async def _all(self, prompts: Iterable[Prompt]) -> list[WriteExample]:
        replies = await asyncio.gather(*(self._reply(prompt) for prompt in prompts))
        return [reply for reply in replies if reply is not None]

    async def _reply(self, prompt: Prompt) -> WriteExample | None:
        """The beginning of the policy's own reply; None where it says nothing."""
        if prompt.ids in self._replies:
            self._replies.move_to_end(prompt.ids)
            return self._replies[prompt.ids]
        if prompt.ids not in self._asking:
            self._asking[prompt.ids] = asyncio.create_task(self._ask(prompt))
        # Shielded: an episode that gives up must not take the reply from the others that wait for it.
        return await asyncio.shield(self._asking[prompt.ids])

    async def _ask(self, prompt: Prompt) -> WriteExample | None:
        asking, version = self._asking, self._policy.version
        try:
            generation = await self._policy.generate(
                prompt.ids,
                Sampling(0.0, prompt.tokens, self._seed, "act"),
                AdapterKey(version, "preserved", 0),
            )
        finally:
            asking.pop(prompt.ids, None)
        reply = WriteExample(prompt.ids, generation.token_ids) if generation.token_ids else None
        if version == self._version:
            self._replies[prompt.ids] = reply
            if len(self._replies) > _MOST_REPLIES:
                self._replies.popitem(last=False)
        return reply


def preservation(
    policy: Policy, environment: Environment | None, chat: ChatFormat, system_prompt: str, config: RunConfig
) -> Preservation:
    """The pool for episodes of ``environment``; None: for conversations."""
    questioner = environment if isinstance(environment, Questioner) else None
    preserve = config.write.preserve
    maker = PromptMaker(chat, system_prompt, questioner, preserve, config.memory.wordings)
    return Preservation(policy, maker, preserve, config.seed)
