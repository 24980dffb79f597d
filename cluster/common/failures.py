"""Failed episodes in words: many that failed alike are one line with their count."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from actors.types import FailedEpisode

_OWNERS = ("environment", "memory")  # boundaries behind which a user's code runs
_PLACE = re.compile(r"\(([^()\s]+:\d+)\)$")  # the user's file and line, at the end of a message
_TASK = re.compile(r"^(\w+): task .*?: ")


def failure_text(failure: FailedEpisode) -> str:
    return f"{failure.boundary}: {failure.message}"


def alike(text: str) -> str:
    """The same text for failures of the same cause: one line of a user's code, or one message of any task."""
    place = _PLACE.search(text)
    return f"{text.partition(':')[0]} {place[1]}" if place else _TASK.sub(r"\1: ", text)


def most_common_failures(texts: Iterable[str], most: int) -> list[tuple[str, int]]:
    """(an example, the count) of each cause, the most frequent first."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for text in texts:
        counts[alike(text)] += 1
        examples.setdefault(alike(text), text)
    return [(examples[cause], count) for cause, count in counts.most_common(most)]


def one_cause(texts: Iterable[str]) -> str:
    """The cause of all failures in one line, where it is one, and a user's code; else ""."""
    common = most_common_failures(texts, 2)
    if len(common) != 1 or not common[0][0].startswith(_OWNERS):
        return ""
    text, count = common[0]
    return f"all {count} episodes failed alike: {text}" if count > 1 else f"the only episode failed: {text}"
