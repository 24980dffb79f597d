"""Tells long conversations of many sessions, then asks questions about them. The user gives the file.

It is LoCoMo's (arXiv 2402.17753), LongMemEval's (arXiv 2410.10813) or MemoryAgentBench's (arXiv 2507.05257,
see memoryagentbench.py). A session comes in pieces of whole turns, each under the session's date. Train and
eval share no conversation. In LongMemEval each question has its own conversation.

The reward is the mean ``f1`` over the questions. ``f1`` is the score of the configured scorer:

    LoCoMo        official_f1, plain_f1 and em are all reported; the official scorer is for this benchmark
    LongMemEval   plain_f1 and em, as in TMEM's tables (arXiv 2606.04536); its own metric is an LLM judge
    MemoryAgent-  official_f1 is the benchmark's own match, 0 or 1; plain_f1 and em are those of the
    Bench         best right answer

Our choices. Questions that the conversation does not answer (LoCoMo's category 5, LongMemEval's "_abs") are
asked like the others; the system prompt gives the words for this case. An answer is right when it says so:
in LoCoMo by one of its two phrases, in LongMemEval by `scoring.says_unknown`. It then has f1 = em = 1. In
LongMemEval these questions have one more score, ``abstention``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from actors.environments.base import ReadThenAsk, Split, held_out, passes, task_seed
from actors.environments.conversation_files import (
    Conversation,
    DatedSession,
    Question,
    read_locomo,
    read_longmemeval,
)
from actors.environments.memoryagentbench import read_memoryagentbench, rule_score
from actors.environments.scoring import (
    official_f1,
    plain_em,
    plain_f1,
    says_not_mentioned,
    says_unknown,
    scored,
)
from actors.protocols import TaskError
from actors.types import Answer, Outcome, Task
from configs.schema import ConversationConfig

SYSTEM_PROMPT = (
    "You are shown a long conversation and then asked about it. "
    "Answer in a few words, with a date when asked when. "
    'If the conversation does not tell, answer "Not mentioned".'
)
_PIECE_CHARACTERS = 2000  # about 500 tokens
_READERS = {
    "locomo": read_locomo,
    "longmemeval": read_longmemeval,
    "memoryagentbench": read_memoryagentbench,
}


class ConversationEnvironment:
    """The `conversation` task source. Reads its file once; a payload names a conversation and questions."""

    name = "conversation"
    system_prompt = SYSTEM_PROMPT

    def __init__(self, config: ConversationConfig) -> None:
        """Raises TaskError when the file is missing, malformed, or has too little for both splits."""
        self._config = config
        conversations = _READERS[config.format](config.path)
        if len(conversations) < 2:
            raise TaskError(
                f"{config.path}: it has {len(conversations)} conversation, and at least 2 are needed: "
                "one to train on, one held out"
            )
        self._conversations = {conversation.id: conversation for conversation in conversations}
        self._chunks: dict[Split, list[tuple[str, tuple[int, ...]]]] = {"train": [], "eval": []}
        for_eval = held_out(list(self._conversations), config.eval_fraction)
        for conversation in conversations:
            self._chunks["eval" if conversation.id in for_eval else "train"] += self._chunked(conversation)
        for split, chunks in self._chunks.items():
            if not chunks:
                problem = (
                    f"the {split} conversations have no question of categories {list(config.categories)}"
                )
                if beyond := config.evidence_beyond:
                    problem += f" with {beyond} words told behind its evidence (evidence_beyond): lower it"
                raise TaskError(f"{config.path}: {problem}")

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        """Endless for train, in a new order every pass; one pass for eval."""
        for position, place in passes(self.name, len(self._chunks[split]), split, seed, start):
            conversation, questions = self._chunks[split][place]
            yield Task(
                id=f"{conversation}-q{questions[0]}-{split}-{seed}-{position}",
                environment=self.name,
                payload={"conversation": conversation, "questions": list(questions)},
                seed=task_seed(split, seed, position),
                system_prompt=self._conversations[conversation].system_prompt,
            )

    def start(self, task: Task) -> ConversationSession:
        name, numbers = task.payload.get("conversation", ""), task.payload.get("questions", ())
        conversation = self._conversations.get(name)
        if conversation is None:
            raise TaskError(f"task {task.id}: {self._config.path} has no conversation {name!r}")
        count = len(conversation.questions)
        if not numbers or not all(isinstance(number, int) and 0 <= number < count for number in numbers):
            raise TaskError(
                f"task {task.id}: questions={numbers!r} must be places in {name}'s {count} questions"
            )
        questions = [conversation.questions[number] for number in numbers]
        sessions = _last_sessions(conversation, questions, self._config.max_sessions)
        return ConversationSession(sessions, questions, self._config)

    def _chunked(self, conversation: Conversation) -> list[tuple[str, tuple[int, ...]]]:
        """(conversation, questions) of each episode."""
        categories = (*self._config.categories, None)  # None: LongMemEval has no categories to choose from
        beyond = self._config.evidence_beyond
        sessions = conversation.sessions() if beyond else ()
        numbers = [
            number
            for number, question in enumerate(conversation.questions)
            if question.locomo_category in categories and _words_behind(question, sessions) >= beyond
        ]
        size = self._config.questions_per_episode
        return [
            (conversation.id, tuple(numbers[place : place + size])) for place in range(0, len(numbers), size)
        ]


class ConversationSession(ReadThenAsk):
    """One episode: the sessions in order, then the questions."""

    def __init__(
        self, sessions: Sequence[DatedSession], questions: Sequence[Question], config: ConversationConfig
    ) -> None:
        pieces = [piece for session in sessions for piece in _pieces(session)]
        super().__init__(pieces, [question.text for question in questions])
        self._questions = questions
        self._scorer = config.scorer

    def outcome(self) -> Outcome:
        return scored(tuple(map(self._answer, self._questions, self.answers)))

    def _answer(self, question: Question, prediction: str) -> Answer:
        right = (question.answer, *question.aliases) if question.answer else ()
        if right:
            scores = {
                "plain_f1": max(plain_f1(prediction, answer) for answer in right),
                "em": max(plain_em(prediction, answer) for answer in right),
            }
        elif question.locomo_category is None:
            scores = dict.fromkeys(("plain_f1", "em", "abstention"), float(says_unknown(prediction)))
        else:
            scores = dict.fromkeys(("plain_f1", "em"), float(says_not_mentioned(prediction)))
        if question.locomo_category is not None:
            scores["official_f1"] = official_f1(prediction, question.answer, question.locomo_category)
        if question.rule:
            scores["official_f1"] = rule_score(question.rule, prediction, right)
        return Answer(
            question=question.text,
            gold=right or ("Not mentioned",),
            prediction=prediction,
            category=question.category,
            scores={"f1": scores[f"{self._scorer}_f1"], **scores},
        )


def _last_sessions(
    conversation: Conversation, questions: Sequence[Question], count: int
) -> Sequence[DatedSession]:
    """The last ``count`` sessions up to the newest evidence of the questions; all sessions when it is 0."""
    sessions = conversation.sessions()
    if count == 0:
        return sessions
    evidence = [number for question in questions for number in question.evidence_sessions]
    newest = max(evidence, default=sessions[-1].number)
    return [session for session in sessions if session.number <= newest][-count:] or sessions[-count:]


def _words_behind(question: Question, sessions: Sequence[DatedSession]) -> int:
    """How many words are told behind the session of the question's newest evidence; 0 where none is known.

    No tokenizer's token spans two words, so there are at least as many tokens.
    """
    newest = max(question.evidence_sessions, default=None)
    later = (session for session in sessions if newest is not None and session.number > newest)
    return sum(len(line.split()) for session in later for line in session.lines)


def _pieces(session: DatedSession) -> list[str]:
    """The session in pieces of whole turns. A turn that is longer than a piece is a piece of its own.

    Short pieces let an episode notice soon that its context is full.
    """
    pieces: list[list[str]] = []
    size = 0
    for line in session.lines:
        if not pieces or size + len(line) > _PIECE_CHARACTERS:
            pieces.append([])
            size = 0
        pieces[-1].append(line)
        size += len(line)
    heading = [f"[{session.date}]"] if session.date.strip() else []
    return ["\n".join([*heading, *lines]) for lines in pieces]
