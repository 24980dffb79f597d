"""Context learning judged by rubrics: CL-Bench's schema (arXiv 2602.03587) from a file the user gives.

The item's messages are read in their order, then comes what the user's last one asks, and the answer is checked against every rubric: all of them met
scores 1, anything less 0, and so does an empty answer, which is not sent to a judge (the benchmark's rules). Of an answer that begins with a
``<think>`` block only what follows it counts, also by the benchmark's rules.

``Answer.scores``: ``solved`` is that score, and so are ``f1`` and ``em``, the two that every table has: there is nothing to overlap here, and a share
of the rubrics in a table's main column would be taken for the benchmark's result. That share is ``rubrics_met``. The reward is ``solved``.
What a judge took stands in ``Outcome.reward_parts`` as ``judge_requests``, ``judge_usd`` and so on (`JudgeCost`).

Our choices: items that share a context (``metadata.context_id``) are on the same side of the train and eval split. The agent's system prompt is
Engram's; an item's system message is read like the rest, under its role. A last message that is long, as where it holds context and task at once, is
read too, but for its end: that is the turn that wants the answer and the question that the memory writing and the judge are shown.

CL-Bench's licence allows evaluation only; training is for files of your own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from actors.environments.base import Observation, Split
from actors.environments.judge.judge import NO_COST, EndpointJudge, Judge, Verdict
from actors.environments.rubric_file import RubricItem, read_rubric_items
from actors.environments.rubric_rules import RuleChecker, RuleError, parse_rule
from actors.environments.splits import held_out, passes, task_seed
from actors.protocols import TaskError
from actors.types import Answer, Outcome, Task
from configs.schema import RubricConfig

SYSTEM_PROMPT = (
    "You are shown instructions and material, and then asked for something. Follow the instructions, and take what you need from the material, "
    "also where it differs from what you know. Do all that is asked: the answer is checked point by point."
)
_LABELS = {"system": "[Instructions]", "user": "[User]", "assistant": "[Assistant]"}
_REQUEST_CHARACTERS = 2000  # about 500 tokens
_BREAKS = ("\n\n", "\n", ". ", " ")


class RubricEnvironment:
    """The `rubric` task source. Reads its file once; a task's payload only names its item."""

    name = "rubric"
    system_prompt = SYSTEM_PROMPT

    def __init__(self, config: RubricConfig) -> None:
        """Raises TaskError, one line, when the file is missing, malformed, has one context only, or a rubric that its checker cannot check."""
        self._path = config.path
        items = read_rubric_items(config.path)
        if config.checker == "rules":
            _check_rules(config.path, items)
        self._judge: Judge = RuleChecker() if config.checker == "rules" else EndpointJudge(config.judge)
        self._items = {item.id: item for item in items}
        contexts = [item.context_id for item in items]
        if len(set(contexts)) < 2:
            raise TaskError(
                f"{config.path}: all its items share one context, and at least 2 are needed: one to train on, one held out"
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
            )

    def start(self, task: Task) -> RubricSession:
        item = self._items.get(task.payload.get("item", ""))
        if item is None:
            raise TaskError(f"task {task.id}: {self._path} has no item {task.payload.get('item')!r}")
        return RubricSession(task.id, item, self._judge)


class RubricSession:
    """One episode's view: the messages, then what is asked."""

    def __init__(self, task_id: str, item: RubricItem, judge: Judge) -> None:
        self._task_id = task_id
        self._item = item
        self._judge = judge
        material, self._request = split_request(item.request)
        told = [(message.role, message.content) for message in item.told] + (
            [("user", material)] if material else []
        )
        self._observations = [
            Observation(f"{_LABELS[role]}\n{content}", wants_action=False) for role, content in told
        ]
        self._observations.append(Observation(self._request, wants_action=True))
        self._next = 0
        self._prediction = ""

    @property
    def question(self) -> str:
        return self._request

    def observe(self) -> Observation | None:
        if self._next == len(self._observations):
            return None
        self._next += 1
        return self._observations[self._next - 1]

    def act(self, text: str) -> None:
        self._prediction = text.strip()

    def outcome(self) -> Outcome:
        """Blocks while the judge decides. Raises TaskError when it cannot."""
        verdict = self._verdict(final_answer(self._prediction))
        solved, share = float(all(verdict.met)), sum(verdict.met) / len(verdict.met)
        scores = {"f1": solved, "em": solved, "solved": solved, "rubrics_met": share}
        answer = Answer(
            question=self._request,
            gold=self._item.rubrics,
            prediction=self._prediction,
            category=self._item.category,
            scores=scores,
        )
        costs = {f"judge_{name}": float(value) for name, value in asdict(verdict.cost).items()}
        return Outcome(reward=solved, reward_parts=scores | costs, answers=(answer,))

    def _verdict(self, answer: str) -> Verdict:
        rubrics = self._item.rubrics
        if not answer:
            return Verdict(
                met=(False,) * len(rubrics), reasons=("the answer is empty",) * len(rubrics), cost=NO_COST
            )
        try:
            return self._judge.verdict(self._request, answer, rubrics)
        except TaskError as error:
            raise TaskError(f"task {self._task_id}: {error}") from None


def split_request(text: str) -> tuple[str, str]:
    """(what is read before, what is asked): the last 1000 to 2000 characters of a long message, from a paragraph's start, a line's or a word's."""
    text = text.strip()
    if len(text) <= _REQUEST_CHARACTERS:
        return "", text
    first, last = len(text) - _REQUEST_CHARACTERS, len(text) - _REQUEST_CHARACTERS // 2
    starts = (place + len(mark) for mark in _BREAKS if (place := text.find(mark, first, last)) >= 0)
    cut = next(starts, first)
    return text[:cut].rstrip(), text[cut:].lstrip()


def final_answer(text: str) -> str:
    """What follows a thinking block at the front; "" where that does not end."""
    text = text.strip()
    return text.partition("</think>")[2].strip() if text.startswith("<think>") else text


def _check_rules(path: str, items: list[RubricItem]) -> None:
    for item in items:
        for number, rubric in enumerate(item.rubrics):
            try:
                parse_rule(rubric)
            except RuleError as error:
                shown = rubric if len(rubric) < 80 else f"{rubric[:76]}..."
                cure = "or take environment.rubric.checker=judge"
                raise TaskError(
                    " ".join(
                        f"{path}: line {item.line}, rubrics[{number}]: {shown!r} {error}; {cure}".split()
                    )
                ) from None
