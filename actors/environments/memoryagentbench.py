"""Reads MemoryAgentBench (arXiv 2507.05257): a long context, told once, and many questions about it.

A row of its public data (hub:ai-hyz/MemoryAgentBench@Conflict_Resolution, or the same as JSON lines):

    {"context": "0. Thomas Kyd was born in London. ...", "questions": ["Where was Thomas Kyd born?", ...],
     "answers": [["Leeds"], ...], "metadata": {"source": "factconsolidation_sh_6k"}}

    source               asks for                          scored by the benchmark's
    ruler_*, eventqa_*   accurate retrieval                substring exact match
    factconsolidation_*  the newer of two facts            substring exact match
    icl_*                test-time learning of labels      exact match
    detective_qa         long-range understanding          exact match

Other sources need a model as a judge, or a table of films: their rows are left out, with a warning. The
wording of the system prompts is our own; the benchmark's are longer.
"""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from actors.environments.conversation_files import Conversation, DatedSession, Question
from actors.environments.data_file import DataFile, Text, Texts, TextsOrNumbers, invalid

_log = logging.getLogger(__name__)
_SETTING = "environment.conversation.path"
_WHAT = "MemoryAgentBench's rows (JSON lines of context, questions, answers and metadata, or hub:...@SPLIT)"
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_ANSWER = re.compile(r"answer:\s*([^\n]*)", re.IGNORECASE)
_BRIEFLY = "Answer in a few words and say nothing else."
Rule = Literal["contains", "same"]


@dataclass(frozen=True, slots=True)
class Family:
    """Sources whose names begin alike: how an answer is scored, and what the agent is told to do."""

    rule: Rule
    system_prompt: str


_RETRIEVAL = Family("contains", f"You are shown a long text and then asked about it. {_BRIEFLY}")
FAMILIES = {
    "ruler": _RETRIEVAL,
    "eventqa": _RETRIEVAL,
    "factconsolidation": Family(
        "contains",
        "You are shown numbered facts and then asked about them. Where two facts contradict each other, the "
        f"one with the larger number is right, also where you know better. {_BRIEFLY}",
    ),
    "icl": Family(
        "same",
        "You are shown examples, each with its label. Then you are given a new text. "
        "Answer with its label, a number, and say nothing else.",
    ),
    "detective_qa": Family("same", f"You are shown a detective story and then asked about it. {_BRIEFLY}"),
}


class _Metadata(BaseModel):
    source: Text


class _Row(BaseModel):
    context: Text
    questions: Texts
    answers: list[TextsOrNumbers]
    metadata: _Metadata

    def model_post_init(self, _: object) -> None:
        questions, answers = len(self.questions), len(self.answers)
        if questions != answers:
            raise invalid(f"answers: there are {answers}, beside {questions} questions")


def read_memoryagentbench(path: str) -> list[Conversation]:
    """Each row as a conversation of one session. Raises TaskError."""
    file = DataFile(path, _SETTING, _WHAT)
    left_out: Counter[str] = Counter()
    conversations = list(_conversations(file, left_out))
    if left_out:
        counts = ", ".join(f"{source} {count}" for source, count in left_out.items())
        _log.warning("%s: rows that no rule can score are left out: %s", path, counts)
    if not conversations and not left_out:
        raise file.empty("rows")
    return conversations


def rule_score(rule: Rule, prediction: str, answers: Sequence[str]) -> float:
    """1.0 where a right answer stands in the prediction, or is the same, after lowering and so on.

    As in the benchmark, what stands behind "Answer:" on its line counts too.
    """
    if not prediction.strip():
        return 0.0
    said = [prediction, *(_ANSWER.findall(prediction)[:1])]
    pairs = [(_plain(each, rule), _plain(answer, rule)) for each in said for answer in answers]
    if rule == "same":
        return float(any(each == answer for each, answer in pairs))
    return float(any(answer and answer in each for each, answer in pairs))


def _conversations(file: DataFile, left_out: Counter[str]) -> Iterator[Conversation]:
    for number, row in file.lines(_Row):
        source = row.metadata.source
        family = next((family for name, family in FAMILIES.items() if source.startswith(name)), None)
        if family is None:
            left_out[source] += 1
            continue
        questions = tuple(
            Question(question, first, source, None, (), tuple(others), family.rule)
            for question, (first, *others) in zip(row.questions, row.answers, strict=True)
        )
        lines = tuple(line for line in row.context.splitlines() if line.strip())
        session = DatedSession(1, "", lines)
        yield Conversation(f"{source}-{number}", questions, _Told((session,)), family.system_prompt)


@dataclass(frozen=True, slots=True)
class _Told:
    sessions: tuple[DatedSession, ...]

    def __call__(self) -> Sequence[DatedSession]:
        return self.sessions


def _plain(text: str, rule: Rule) -> str:
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    bare = " ".join(_ARTICLES.sub(" ", kept).split())
    # "A" may be a choice; as a part it would stand in nearly every text
    return bare or (kept.strip() if rule == "same" else "")
