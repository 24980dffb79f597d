"""Multi-objective search (MEM1's construction, arXiv 2506.15841): several questions at once, a search tool, a bounded number of turns.

    question:  "Who wrote Alpha?; Where is Beta?"
    reply:     "<search>Alpha novel author</search>"      ->  passages
    reply:     "<answer>Ida Holm; Oslo</answer>"          ->  the end

A task joins ``objectives`` consecutive questions of its split by "; ". Answers are split at ";": as many as questions, or everything scores 0; else
the score is the mean over the positions, by the plain F1 and EM (of several right answers the nearest counts). Out of turns, unanswered: 0.

Beside them always official_f1 and official_em, by the rules of MEM1's public evaluation (Mem1/inference/eval.py): its own tokens, and the last
<answer> of all replies, or 0 where an <answer> stays open. Here too the mean over the positions, in 0..1: MEM1 prints the sum, ``objectives`` times
as much. The reward is the plain F1.

Our choices. *Every turn repeats the questions and the form*, because a memory may clear the context between any two turns: TMEM (2606.04536) has the
question in each context, c_t = (q, h_t, m_t), and an agent that forgot what it was asked could only search at random. For four questions of HotpotQA
that is about 140 tokens a turn, beside 370 of results, and the same for every memory that is compared. They stand below the results, where a
truncated context still has them. Of a reply's tags the first closed one counts. Fewer questions than make a task remain unused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Protocol

from actors.environments.base import Observation, Split
from actors.environments.scoring import mem1_em, mem1_f1, plain_em, plain_f1
from actors.environments.search_file import Passage, SearchQuestion, read_corpus, read_questions
from actors.environments.splits import held_out, passes, task_seed
from actors.protocols import TaskError
from actors.text.retrieval import Embedder, Hit, VectorIndex, WordIndex
from actors.types import Answer, Outcome, Task
from configs.schema import SearchConfig

SYSTEM_PROMPT = (
    "You are given several questions and can search a collection of passages for what they ask. "
    "Every reply of yours is one search, <search>what to look for</search>, or the end, <answer>first answer; second answer</answer>: "
    "a few words for each question, in the order of the questions."
)
Scorer = Callable[[str, str], float]  # of a prediction and a right answer
_REPLY = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SHOWN_QUERY = 200  # characters
_PLAIN: dict[str, Scorer] = {"f1": plain_f1, "em": plain_em}
_OFFICIAL: dict[str, Scorer] = {"official_f1": mem1_f1, "official_em": mem1_em}


class Index(Protocol):
    def search(self, query: str, count: int) -> list[Hit]: ...


class SearchEnvironment:
    """The `search` task source. A task's payload only names its questions by their places in the file."""

    name = "search"
    system_prompt = SYSTEM_PROMPT

    def __init__(self, config: SearchConfig, embedder: Callable[[], Embedder]) -> None:
        """Raises TaskError, one line, when a file cannot be used or has too few questions for both splits, or the embedder cannot be loaded."""
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
        numbers = task.payload.get("questions", ())
        if not numbers or not all(
            isinstance(number, int) and 0 <= number < len(self._questions) for number in numbers
        ):
            path = self._config.questions_path
            raise TaskError(
                f"task {task.id}: questions={numbers!r} must be places in the {len(self._questions)} questions of {path}"
            )
        return SearchSession(
            [self._questions[number] for number in numbers], self._index, self._passages, self._config
        )

    def prepare(self) -> None:
        """Build the index: embedding a large corpus takes its time."""
        _ = self._index

    @cached_property
    def _index(self) -> Index:
        """Not built by the constructor: whoever only lists tasks needs none."""
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
                raise TaskError(
                    f"{self._config.questions_path}: {len(numbers)} of its {len(self._questions)} questions are for {split}, and a task takes "
                    f"environment.search.objectives={size}: lower it, move environment.search.eval_fraction, or give more questions"
                )
        return chunks


class SearchSession:
    """One episode's view: every turn shows what the last reply led to, the questions, and the turns that are left."""

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
        self._news = ""  # what the last reply led to

    @property
    def question(self) -> str:
        return "; ".join(question.text for question in self._questions)

    def observe(self) -> Observation | None:
        left = self._config.max_turns - self._turns
        if self._answer is not None or left == 0:
            return None
        count = len(self._questions)
        answers = (
            f"<answer>{'; '.join(['...'] * count)}</answer> with {count} answer{'s' if count > 1 else ''}"
        )
        form = (
            f"Reply with <search>...</search> or {answers}."
            if left > 1
            else f"This is the last turn: reply with {answers}."
        )
        asked = f"Question{'s' if count > 1 else ''}: {self.question}\nTurns left: {left}. {form}"
        return Observation(f"{self._news}\n\n{asked}" if self._news else asked, wants_action=True)

    def act(self, text: str) -> None:
        self._turns += 1
        self._replies.append(text)
        found = _REPLY.search(text)
        content = found[2].strip() if found else ""
        if found and found[1] == "answer":
            self._answer = content
        elif content:
            self._searches += 1
            self._news = self._search(content)
        else:
            self._malformed += 1
            self._news = "Your last reply was neither a search nor an answer in the form that is asked for."

    def outcome(self) -> Outcome:
        count = len(self._questions)
        whole = self._answer or ""
        predictions = _in_places(self._answer, count)
        official = _in_places(_official_answer(self._replies), count)
        answers = tuple(
            Answer(
                question=question.text,
                gold=question.answers,
                prediction=whole if prediction is None else prediction,
                category=question.category,
                scores=_nearest(_PLAIN, question, prediction) | _nearest(_OFFICIAL, question, officially),
            )
            for question, prediction, officially in zip(self._questions, predictions, official, strict=True)
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


def _official_answer(replies: Sequence[str]) -> str | None:
    """The one that MEM1's evaluation takes: the last of the episode; None without one, or where not every <answer> is closed."""
    said = "\n".join(replies).lower()
    opened, closed = "<answer>", "</answer>"
    if said.count(opened) != said.count(closed) or said.rfind(opened) > said.rfind(closed):
        return None
    return next(iter(reversed(_ANSWER.findall(said))), None)


def _in_places(answer: str | None, count: int) -> list[str] | list[None]:
    """The answer to each of ``count`` questions; None for all of them where there are not as many."""
    parts = [part.strip() for part in answer.split(";")] if answer is not None else []
    return parts if len(parts) == count else [None] * count


def _nearest(
    scorers: Mapping[str, Scorer], question: SearchQuestion, prediction: str | None
) -> dict[str, float]:
    if prediction is None:
        return dict.fromkeys(scorers, 0.0)
    return {
        name: max(score(prediction, answer) for answer in question.answers) for name, score in scorers.items()
    }
