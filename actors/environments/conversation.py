"""Long conversations over many sessions, then questions: LoCoMo (arXiv 2402.17753) or LongMemEval (2410.10813), from a file the user gives.

Every session is told in pieces of whole turns, each piece under its date; then come the question or questions. Train and eval split by conversation;
in LongMemEval each question has one of its own. ``f1`` is the configured scorer's, and the reward its mean.

LoCoMo has two scorers, and both are always reported: official_f1, plain_f1, em. LongMemEval is scored plainly, as in TMEM's tables (2606.04536): its
own metric is an LLM judge, and LoCoMo's official rules are not made for it.

Our choices: a question that the conversation does not answer (LoCoMo's category 5, LongMemEval's "_abs") is asked like any other; the system prompt
says what to answer then. It is right when the answer says so: by LoCoMo's two phrases there, by `scoring.says_unknown` in LongMemEval. That counts as
f1 and em, and in LongMemEval once more as ``abstention``, a score that only these questions have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from actors.environments.base import Observation, Split
from actors.environments.conversation_types import Conversation, Question, Told
from actors.environments.locomo_file import read_locomo
from actors.environments.longmemeval_file import read_longmemeval
from actors.environments.scoring import official_f1, plain_em, plain_f1, says_not_mentioned, says_unknown
from actors.environments.splits import held_out, passes, task_seed
from actors.protocols import TaskError
from actors.types import Answer, Outcome, Task
from configs.schema import ConversationConfig

SYSTEM_PROMPT = (
    "You are shown a long conversation and then asked about it. Answer in a few words, with a date when asked when. "
    'If the conversation does not tell, answer "Not mentioned".'
)
_PIECE_CHARACTERS = 2000


class ConversationEnvironment:
    """The `conversation` task source. Reads its file once; a task's payload only names what it takes from it."""

    name = "conversation"
    system_prompt = SYSTEM_PROMPT

    def __init__(self, config: ConversationConfig) -> None:
        """Raises TaskError, one line, when the file is missing, malformed, or has too little for both splits."""
        self._config = config
        conversations = (
            read_longmemeval(config.path) if config.format == "longmemeval" else read_locomo(config.path)
        )
        if len(conversations) < 2:
            raise TaskError(
                f"{config.path}: it has {len(conversations)} conversation, and at least 2 are needed: one to train on, one held out"
            )
        self._conversations = {conversation.id: conversation for conversation in conversations}
        self._chunks: dict[Split, list[tuple[str, tuple[int, ...]]]] = {"train": [], "eval": []}
        for_eval = held_out([conversation.id for conversation in conversations], config.eval_fraction)
        for conversation in conversations:
            self._chunks["eval" if conversation.id in for_eval else "train"] += self._chunked(conversation)
        for split, chunks in self._chunks.items():
            if not chunks:
                raise TaskError(
                    f"{config.path}: the {split} conversations have no question of categories {list(config.categories)}"
                )

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        """Endless for train, in a new order every pass; one pass for eval."""
        for position, place in passes(self.name, len(self._chunks[split]), split, seed, start):
            conversation, questions = self._chunks[split][place]
            payload = {"conversation": conversation, "questions": list(questions)}
            yield Task(
                id=f"{conversation}-q{questions[0]}-{split}-{seed}-{position}",
                environment=self.name,
                payload=payload,
                seed=task_seed(split, seed, position),
            )

    def start(self, task: Task) -> ConversationSession:
        conversation = self._conversations.get(task.payload.get("conversation", ""))
        numbers = task.payload.get("questions", ())
        if conversation is None:
            raise TaskError(
                f"task {task.id}: {self._config.path} has no conversation {task.payload.get('conversation')!r}"
            )
        if not numbers or not all(
            isinstance(number, int) and 0 <= number < len(conversation.questions) for number in numbers
        ):
            raise TaskError(
                f"task {task.id}: questions={numbers!r} must be places in {conversation.id}'s {len(conversation.questions)} questions"
            )
        questions = [conversation.questions[number] for number in numbers]
        return ConversationSession(
            _shown(conversation, questions, self._config.max_sessions), questions, self._config
        )

    def _chunked(self, conversation: Conversation) -> list[tuple[str, tuple[int, ...]]]:
        categories = (*self._config.categories, None)  # None: not LoCoMo's, nothing to choose by
        wanted = [
            number
            for number, question in enumerate(conversation.questions)
            if question.locomo_category in categories
        ]
        size = self._config.questions_per_episode
        return [
            (conversation.id, tuple(wanted[place : place + size])) for place in range(0, len(wanted), size)
        ]


class ConversationSession:
    """One episode's view: the sessions in order, then the questions."""

    def __init__(
        self, sessions: Sequence[Told], questions: Sequence[Question], config: ConversationConfig
    ) -> None:
        pieces = [piece for told in sessions for piece in _pieces(told)]
        self._observations = [Observation(piece, wants_action=False) for piece in pieces]
        self._observations += [Observation(question.text, wants_action=True) for question in questions]
        self._questions = questions
        self._scorer = config.scorer
        self._next = 0
        self._predictions: list[str] = []

    @property
    def question(self) -> str:
        return " ".join(question.text for question in self._questions)

    def observe(self) -> Observation | None:
        if self._next == len(self._observations):
            return None
        self._next += 1
        return self._observations[self._next - 1]

    def act(self, text: str) -> None:
        self._predictions.append(text.strip())

    def outcome(self) -> Outcome:
        predictions = self._predictions + [""] * (len(self._questions) - len(self._predictions))
        answers = tuple(
            self._answer(question, prediction)
            for question, prediction in zip(self._questions, predictions, strict=True)
        )
        parts = {
            name: sum(answer.scores[name] for answer in answers) / len(answers) for name in answers[0].scores
        }
        return Outcome(reward=parts["f1"], reward_parts=parts, answers=answers)

    def _answer(self, question: Question, prediction: str) -> Answer:
        if question.answer:
            scores = {
                "plain_f1": plain_f1(prediction, question.answer),
                "em": plain_em(prediction, question.answer),
            }
        elif question.locomo_category is None:
            scores = dict.fromkeys(("plain_f1", "em", "abstention"), float(says_unknown(prediction)))
        else:
            scores = dict.fromkeys(("plain_f1", "em"), float(says_not_mentioned(prediction)))
        if question.locomo_category is not None:
            scores["official_f1"] = official_f1(prediction, question.answer, question.locomo_category)
        return Answer(
            question=question.text,
            gold=(question.answer or "Not mentioned",),
            prediction=prediction,
            category=question.category,
            scores={"f1": scores[f"{self._scorer}_f1"], **scores},
        )


def _shown(conversation: Conversation, questions: Sequence[Question], max_sessions: int) -> Sequence[Told]:
    """All sessions, or the last ``max_sessions`` up to the newest evidence of the questions."""
    sessions = conversation.sessions()
    if max_sessions == 0:
        return sessions
    evidence = [number for question in questions for number in question.evidence_sessions]
    newest = max(evidence, default=sessions[-1].number)
    return [told for told in sessions if told.number <= newest][-max_sessions:] or sessions[-max_sessions:]


def _pieces(told: Told) -> list[str]:
    """Whole turns up to about 500 tokens, so that a full context is noticed soon; a longer turn is a piece of its own."""
    pieces: list[str] = []
    lines: list[str] = []
    for line in told.lines:
        if lines and sum(len(kept) for kept in lines) + len(line) > _PIECE_CHARACTERS:
            pieces.append("\n".join([f"[{told.date}]", *lines]))
            lines = []
        lines.append(line)
    return [*pieces, "\n".join([f"[{told.date}]", *lines])] if lines else pieces
