"""Multi-objective search, as MEM1 builds it (arXiv 2506.15841): several questions, a search tool, few turns.

    question:  "Who wrote Alpha?; Where is Beta?"
    reply:     "<search>Alpha novel author</search>"      ->  passages
    reply:     "<answer>Ida Holm; Oslo</answer>"          ->  the end

A task joins ``objectives`` consecutive questions of its split by "; ". The answer is split at ";". Its parts
must be as many as the questions, or everything scores 0. The score is the mean over the positions of the
plain F1 and EM; a question with several right answers takes the best. Without an answer in the last turn it
is 0. The reward is the plain F1.

official_f1 and official_em stand beside them. They follow MEM1's public evaluation (Mem1/inference/eval.py):
its own tokens, the last <answer> of all replies, and 0 where an <answer> stays open. Here they are means over
the positions, in 0..1; MEM1 prints sums, ``objectives`` times as large.

Files. Questions: HotpotQA's JSON list ({question, answer, _id, type, ...}, arXiv 1809.09600), or JSON lines
of {question, answer[, category, id]}; golden_answers or answers may stand for answer, and answer_aliases
beside it. Passages: a JSON object of title to sentences (or to one text), or JSON lines of {title, text}. A
name that ends in .jsonl means JSON lines.

Our choices. *Every turn repeats the questions and the form*, because a memory may clear the context between
any two turns. TMEM (arXiv 2606.04536) has the question in each context, c_t = (q, h_t, m_t). An agent that
forgot what it was asked could only search at random. For four questions of HotpotQA this takes about 140
tokens a turn, beside 370 tokens of results, and the same for every memory that is compared. The questions
stand below the results, where a truncated context still has them. Of a reply's tags the first closed one
counts. Left-over questions, too few for a task, stay unused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Protocol

from pydantic import AliasChoices, BeforeValidator, Field

from actors.environments.base import Observation, Split, held_out, passes, task_seed
from actors.environments.data_file import DataFile, Text, TextOrNumber, TextsOrNumbers, list_or_nothing, text
from actors.environments.hub_data import is_hub
from actors.environments.scoring import mem1_em, mem1_f1, plain_em, plain_f1
from actors.protocols import TaskError
from actors.text.retrieval import Embedder, Hit, VectorIndex, WordIndex
from actors.text.split_text import split_text
from actors.text.thoughts import visible_reply
from actors.types import Answer, Outcome, Task
from configs.schema import SearchConfig

SYSTEM_PROMPT = (
    "You are given several questions and can search a collection of passages for what they ask. "
    "Every reply of yours is one search, <search>what to look for</search>, or the end, "
    "<answer>first answer; second answer</answer>: "
    "a few words for each question, in the order of the questions."
)
Scorer = Callable[[str, str], float]  # of a prediction and a right answer
_OPENED = re.compile(r"<(search|answer)>")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_MALFORMED = "Your last reply was neither a search nor an answer in the form that is asked for."
_SHOWN_QUERY = 200  # characters
_PASSAGE_CHARACTERS = 1000  # our choice, about 250 tokens: it bounds a turn with results
_PLAIN: dict[str, Scorer] = {"f1": plain_f1, "em": plain_em}
_OFFICIAL: dict[str, Scorer] = {"official_f1": mem1_f1, "official_em": mem1_em}


@dataclass(frozen=True, slots=True)
class SearchQuestion:
    """Each of ``answers`` is right; there is at least one. ``key`` decides the side of the split."""

    key: str  # the file's id, else the text
    text: str
    answers: tuple[str, ...]
    category: str


@dataclass(frozen=True, slots=True)
class Passage:
    title: str
    text: str


class Index(Protocol):
    def search(self, query: str, count: int) -> list[Hit]: ...


class SearchEnvironment:
    """The `search` task source. A task's payload only names its questions by their places in the file."""

    name = "search"
    system_prompt = SYSTEM_PROMPT

    def __init__(self, config: SearchConfig, embedder: Callable[[], Embedder]) -> None:
        """Raises TaskError when a file is malformed or too small, or the embedder cannot be loaded."""
        self._config = config
        self._questions = read_questions(config.questions_path)
        self._passages = read_corpus(config.corpus_path)
        self._embedder = embedder() if config.retriever == "dense" else None
        self._chunks = self._chunked()

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        """Endless for train, in a new order every pass; one pass for eval."""
        chunks = self._chunks[split]
        for position, place in passes(self.name, len(chunks), split, seed, start):
            yield Task(
                id=f"search-q{chunks[place][0]}-{split}-{seed}-{position}",
                environment=self.name,
                payload={"questions": list(chunks[place])},
                seed=task_seed(split, seed, position),
            )

    def start(self, task: Task) -> SearchSession:
        numbers, count = task.payload.get("questions", ()), len(self._questions)
        if not numbers or not all(isinstance(number, int) and 0 <= number < count for number in numbers):
            path = self._config.questions_path
            raise TaskError(
                f"task {task.id}: questions={numbers!r} must be places in the {count} questions of {path}"
            )
        questions = [self._questions[number] for number in numbers]
        return SearchSession(questions, self._index, self._passages, self._config)

    def prepare(self) -> None:
        """Build the index: it takes long to embed a large corpus."""
        _ = self._index

    @cached_property
    def _index(self) -> Index:
        """Built late: a process that only lists tasks needs none."""
        texts = [f"{passage.title}: {passage.text}" for passage in self._passages]
        if self._embedder is None:
            return WordIndex(texts)
        index = VectorIndex(self._embedder)
        index.add(texts)
        return index

    def _chunked(self) -> dict[Split, list[tuple[int, ...]]]:
        size = self._config.objectives
        for_eval = held_out([question.key for question in self._questions], self._config.eval_fraction)
        chunks: dict[Split, list[tuple[int, ...]]] = {}
        splits: tuple[Split, ...] = ("train", "eval")
        for split in splits:
            numbers = [
                number
                for number, question in enumerate(self._questions)
                if (question.key in for_eval) == (split == "eval")
            ]
            chunks[split] = [
                tuple(numbers[place : place + size]) for place in range(0, len(numbers) - size + 1, size)
            ]
            if not chunks[split]:
                share = f"{len(numbers)} of its {len(self._questions)} questions are for {split}"
                raise TaskError(
                    f"{self._config.questions_path}: {share}, and a task takes environment.search.objectives="
                    f"{size}: lower it, move environment.search.eval_fraction, or give more questions"
                )
        return chunks


class SearchSession:
    """One episode. A turn shows what the last reply led to, the questions, and how many turns are left."""

    def __init__(
        self,
        questions: Sequence[SearchQuestion],
        index: Index,
        passages: Sequence[Passage],
        config: SearchConfig,
    ) -> None:
        self._questions = questions
        self._index = index
        self._passages = passages
        self._config = config
        self._turns = 0
        self._searches = 0
        self._malformed = 0
        self._replies: list[str] = []
        self._answer: str | None = None
        self._results = ""  # of the last reply

    @property
    def question(self) -> str:
        return "; ".join(question.text for question in self._questions)

    def observe(self) -> Observation | None:
        left = self._config.max_turns - self._turns
        if self._answer is not None or left == 0:
            return None
        count = len(self._questions)
        plural = "s" if count > 1 else ""
        answer = f"<answer>{'; '.join(['...'] * count)}</answer> with {count} answer{plural}"
        if left > 1:
            form = f"Reply with <search>...</search> or {answer}."
        else:
            form = f"This is the last turn: reply with {answer}."
        turn = f"Question{plural}: {self.question}\nTurns left: {left}. {form}"
        return Observation(f"{self._results}\n\n{turn}" if self._results else turn, wants_action=True)

    def act(self, text: str) -> None:
        text = visible_reply(text)
        self._turns += 1
        self._replies.append(text)
        kind, content = _first_tag(text)
        if kind == "answer":
            self._answer = content
        elif content:
            self._searches += 1
            self._results = self._search(content)
        else:
            self._malformed += 1
            self._results = _MALFORMED

    def outcome(self) -> Outcome:
        count = len(self._questions)
        whole = self._answer or ""
        predictions = _in_places(self._answer, count)
        official_predictions = _in_places(_official_answer(self._replies), count)
        answers = tuple(
            Answer(
                question=question.text,
                gold=question.answers,
                prediction=whole if prediction is None else prediction,
                category=question.category,
                scores=_best(_PLAIN, question, prediction) | _best(_OFFICIAL, question, official_prediction),
            )
            for question, prediction, official_prediction in zip(
                self._questions, predictions, official_predictions, strict=True
            )
        )
        parts = {
            name: sum(answer.scores[name] for answer in answers) / count for name in (*_PLAIN, *_OFFICIAL)
        }
        parts |= {
            "count_mismatch": float(self._answer is not None and None in predictions),
            "unanswered": float(self._answer is None),
            "searches": float(self._searches),
            "malformed": float(self._malformed),
        }
        return Outcome(reward=parts["f1"], reward_parts=parts, answers=answers)

    def _search(self, query: str) -> str:
        shown = query if len(query) <= _SHOWN_QUERY else f"{query[:_SHOWN_QUERY]}..."
        passages = [self._passages[hit.place] for hit in self._index.search(query, self._config.results)]
        if not passages:
            return f"No passage was found for: {shown}"
        lines = [
            f"[{number}] {passage.title}: {passage.text}" for number, passage in enumerate(passages, start=1)
        ]
        return "\n".join([f"Passages found for: {shown}", *lines])


def _first_tag(text: str) -> tuple[str, str]:
    """The first <search> or <answer> that is closed, and what it holds; "" without one.

    A kind whose end is missing once is missing for all later ones: so a long reply is read once.
    """
    open_ended: set[str] = set()
    for opened in _OPENED.finditer(text):
        kind, start = opened[1], opened.end()
        end = -1 if kind in open_ended else text.find(f"</{kind}>", start)
        if end >= 0:
            return kind, text[start:end].strip()
        open_ended.add(kind)
    return "", ""


def _official_answer(replies: Sequence[str]) -> str | None:
    """The answer that MEM1's evaluation takes: the last one of the episode.

    None without an answer, or where not every <answer> is closed.
    """
    said = "\n".join(replies).lower()
    opened, closed = "<answer>", "</answer>"
    if said.count(opened) != said.count(closed) or said.rfind(opened) > said.rfind(closed):
        return None
    return next(iter(reversed(_ANSWER.findall(said))), None)


def _in_places(answer: str | None, count: int) -> list[str] | list[None]:
    """The answer to each of ``count`` questions; None for all of them when the numbers differ."""
    parts = [part.strip() for part in answer.split(";")] if answer is not None else []
    return parts if len(parts) == count else [None] * count


def _best(
    scorers: Mapping[str, Scorer], question: SearchQuestion, prediction: str | None
) -> dict[str, float]:
    """Each score of the prediction against the right answer that it comes nearest to."""
    if prediction is None:
        return dict.fromkeys(scorers, 0.0)
    return {
        name: max(score(prediction, answer) for answer in question.answers) for name, score in scorers.items()
    }


# --- the files ---


@dataclass(frozen=True, slots=True)
class _Question:
    question: Text
    answer: Annotated[
        TextsOrNumbers, Field(validation_alias=AliasChoices("answer", "golden_answers", "answers"))
    ]
    id: Annotated[TextOrNumber, Field(validation_alias=AliasChoices("_id", "id"))] = ""
    answer_aliases: Annotated[tuple[TextOrNumber, ...], BeforeValidator(list_or_nothing)] = ()
    category: Annotated[Text, Field(validation_alias=AliasChoices("category", "type"))] = "search"


@dataclass(frozen=True, slots=True)
class _Passage:
    title: Text
    text: Text


def read_questions(path: str) -> list[SearchQuestion]:
    """All questions, in the file's order. Raises TaskError."""
    file = DataFile(
        path,
        "environment.search.questions_path",
        "a file of questions (HotpotQA's JSON list, or JSON lines in a .jsonl file)",
    )
    items = file.lines(_Question) if _is_lines(path) else file.items(_Question, "_id")
    return [
        SearchQuestion(
            key=item.id or item.question.strip(),
            text=item.question.strip(),
            answers=tuple(dict.fromkeys([*item.answer, *item.answer_aliases])),
            category=item.category,
        )
        for _, item in items
    ]


def _sentences(value: object) -> object:
    """Let one text stand for a list of sentences, for pydantic. A sentence of a list may be blank."""
    return value if isinstance(value, list) else [text(value)]


def read_corpus(path: str) -> list[Passage]:
    """All passages, in the file's order: at least one. A long text becomes several. Raises TaskError."""
    file = DataFile(
        path,
        "environment.search.corpus_path",
        "a file of passages (a JSON object of title to sentences, or JSON lines in a .jsonl file)",
    )
    if _is_lines(path):
        texts = [(line.title, line.text) for _, line in file.lines(_Passage)]
    else:
        corpus = file.parse(file.read(), dict[str, Annotated[list[str], BeforeValidator(_sentences)]])
        stripped = {title: [sentence.strip() for sentence in value] for title, value in corpus.items()}
        texts = [(title, " ".join(filter(None, sentences))) for title, sentences in stripped.items()]
    passages = [
        Passage(title, piece.strip())
        for title, text in texts
        for piece in split_text(text, len, _PASSAGE_CHARACTERS)
    ]
    if not passages:
        raise file.empty("passages")
    return passages


def _is_lines(path: str) -> bool:
    return is_hub(path) or re.search(r"\.jsonl(\.(gz|bz2|xz))?$", path) is not None
