"""How questions were answered that were told, and how those that nobody told, as a table beside the scores.

A memory that gives a written answer to any question looks good on told questions alone. The environment's
scores say what kind of reply each is (actors/environments/recall_scoring.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actors.environments.recall_scoring import KINDS
from actors.types import Answer
from cluster.measure.report import Table, percent
from cluster.measure.rows import Chosen, answers_mean, told_and_untold

LEGEND = (
    "told, stranger, same_person: questions whose answer was told, about a person of whom nothing was told, "
    "about another relation of a told person; each F1 / told elsewhere (a leak) / says that it does not know "
    "/ made up, in %; what is left to 100 was right or empty"
)


def kinds_table(rows: Mapping[str, Sequence[Answer]]) -> Table:
    """``rows``: the answers of each row. A table without lines where no question was untold."""
    groups = told_and_untold(answer for answers in rows.values() for answer in answers)
    counts = {
        name: max(answers_mean(answers, "f1", chosen)[1] for answers in rows.values())
        for name, chosen in groups.items()
    }
    lines = [
        (label, *(_shares(answers, chosen) for chosen in groups.values()))
        for label, answers in rows.items()
        if groups
    ]
    header = ("row", *(f"{name} ({count})" for name, count in counts.items()))
    return Table("Told and untold questions", header, tuple(lines), LEGEND)


def _shares(answers: Sequence[Answer], chosen: Chosen) -> str:
    return "/".join(percent(answers_mean(answers, score, chosen)[0], 0) for score in ("f1", *KINDS))
