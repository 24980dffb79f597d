"""Tasks whose answers are judged by rubrics, from a file in CL-Bench's schema (arXiv 2602.03587).

It has JSON lines; the last message is the request. A metadata field that is missing is filled: the line's
number is the id, the item is its own context.

    {"messages": [{"role": "system" | "user" | "assistant", "content": text}, ...],
     "rubrics": [text, ...],
     "metadata": {"task_id": text, "context_id": text, "context_category": text}}

The agent reads the messages in their order and answers the request. Each rubric is checked. An answer that
meets all rubrics scores 1, any other 0, as in the benchmark. An empty answer scores 0 and is not sent to a
judge. Of an answer with thoughts only the rest counts.

``Answer.scores``: ``solved`` is that score and the reward. ``f1`` and ``em``, which every report shows, equal
it: a share of the rubrics in a main column would be taken for the benchmark's result. That share is
``rubrics_met``. ``Outcome.reward_parts`` has the judge's cost: ``judge_requests``, ``judge_usd``
(`Cost`).

Our choices. Items that share a context are on the same side of the train and eval split. The system prompt is
Engram's; an item's system message is read like the other messages, under its role. Of a long last message
only the end is the request; the part before it is read first. Memory and judge are shown the request.

With ``rubric.score=share`` the share is the reward and ``f1``: BEAM's rule (beam.py), which adds up points.

CL-Bench's licence allows evaluation only. Train on your own files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from actors.environments.base import ReadThenAsk, Split, held_out, passes, task_seed
from actors.environments.beam import read_beam_items
from actors.environments.judge.cached_endpoint import NO_COST
from actors.environments.judge.judge import EndpointJudge, Judge, Verdict
from actors.environments.rubric_files import Message, RubricItem, read_rubric_items
from actors.environments.rubric_rules import RuleChecker, RuleError, parse_rule
from actors.protocols import TaskError
from actors.types import Answer, Outcome, Task
from configs.schema import RubricConfig

SYSTEM_PROMPT = (
    "You are shown instructions and material, and then asked for something. Follow the instructions, "
    "and take what you need from the material, also where it differs from what you know. "
    "Do all that is asked: the answer is checked point by point."
)
_LABELS = {"system": "[Instructions]", "user": "[User]", "assistant": "[Assistant]"}
_REQUEST_CHARACTERS = 2000  # about 500 tokens
_BREAKS = ("\n\n", "\n", ". ", " ")
_SHOWN_RUBRIC = 80  # characters


class RubricEnvironment:
    """The `rubric` task source. Reads its file once; a task's payload only names its item."""

    name = "rubric"
    system_prompt = SYSTEM_PROMPT

    def __init__(self, config: RubricConfig) -> None:
        """Raises TaskError when the file is missing or malformed, or has a single context.

        Also when a rubric is not one that the checker ``rules`` can check.
        """
        self._path = config.path
        items = read_beam_items(config.path) if config.format == "beam" else read_rubric_items(config.path)
        if config.checker == "rules":
            _check_rules(config.path, items)
        self._by_share = config.score == "share"
        self._judge: Judge = RuleChecker() if config.checker == "rules" else EndpointJudge(config.judge)
        self._items = {item.id: item for item in items}
        contexts = [item.context_id for item in items]
        if len(set(contexts)) < 2:
            raise TaskError(
                f"{config.path}: all its items share one context, and at least 2 are needed: "
                "one to train on, one held out"
            )
        for_eval = held_out(contexts, config.eval_fraction)
        self._ids: dict[Split, list[str]] = {
            "train": [item.id for item in items if item.context_id not in for_eval],
            "eval": [item.id for item in items if item.context_id in for_eval],
        }

    def tasks(self, split: Split, seed: int, start: int) -> Iterator[Task]:
        """Endless for train, in a new order every pass; one pass for eval."""
        ids = self._ids[split]
        for position, place in passes(self.name, len(ids), split, seed, start):
            yield Task(
                id=f"{ids[place]}-{split}-{seed}-{position}",
                environment=self.name,
                payload={"item": ids[place]},
                seed=task_seed(split, seed, position),
                system_prompt=self._items[ids[place]].system_prompt,
            )

    def start(self, task: Task) -> RubricSession:
        item = self._items.get(task.payload.get("item", ""))
        if item is None:
            raise TaskError(f"task {task.id}: {self._path} has no item {task.payload.get('item')!r}")
        return RubricSession(task.id, item, self._judge, self._by_share)


class RubricSession(ReadThenAsk):
    """One episode: the messages, then the request."""

    def __init__(self, task_id: str, item: RubricItem, judge: Judge, by_share: bool = False) -> None:
        material, request = split_request(item.request)
        messages = [*item.messages, *([Message("user", material)] if material else [])]
        super().__init__([f"{_LABELS[message.role]}\n{message.content}" for message in messages], [request])
        self._task_id = task_id
        self._item = item
        self._judge = judge
        self._by_share = by_share

    def outcome(self) -> Outcome:
        """Blocks while the judge decides. Raises TaskError when it cannot."""
        (prediction,) = self.answers
        verdict = self._verdict(prediction)
        solved, share = float(all(verdict.met)), sum(verdict.met) / len(verdict.met)
        reward = share if self._by_share else solved
        scores = {"f1": reward, "em": solved, "solved": solved, "rubrics_met": share}
        answer = Answer(
            question=self.question,
            gold=self._item.rubrics,
            prediction=prediction,
            category=self._item.category,
            scores=scores,
        )
        costs = {f"judge_{name}": float(value) for name, value in asdict(verdict.cost).items()}
        return Outcome(reward=reward, reward_parts=scores | costs, answers=(answer,))

    def _verdict(self, answer: str) -> Verdict:
        rubrics = self._item.rubrics
        if not answer:
            return Verdict(
                met=(False,) * len(rubrics), reasons=("the answer is empty",) * len(rubrics), cost=NO_COST
            )
        try:
            return self._judge.verdict(self.question, answer, rubrics)
        except TaskError as error:
            raise TaskError(f"task {self._task_id}: {error}") from None


def split_request(text: str) -> tuple[str, str]:
    """Split a long message into (what is read before, the request).

    The request is the last 1000 to 2000 characters. It begins with a paragraph, a line, a sentence or a word:
    the first of these that begins there.
    """
    text = text.strip()
    if len(text) <= _REQUEST_CHARACTERS:
        return "", text
    first, last = len(text) - _REQUEST_CHARACTERS, len(text) - _REQUEST_CHARACTERS // 2
    starts = (place + len(mark) for mark in _BREAKS if (place := text.find(mark, first, last)) >= 0)
    cut = next(starts, first)
    return text[:cut].rstrip(), text[cut:].lstrip()


def _check_rules(path: str, items: list[RubricItem]) -> None:
    for item in items:
        for number, rubric in enumerate(item.rubrics):
            try:
                parse_rule(rubric)
            except RuleError as error:
                shown = rubric if len(rubric) < _SHOWN_RUBRIC else f"{rubric[: _SHOWN_RUBRIC - 4]}..."
                where = f"{path}: {item.place}: rubrics.{number}"
                message = f"{where}: {shown!r} {error}; or take environment.rubric.checker=judge"
                raise TaskError(" ".join(message.split())) from None
