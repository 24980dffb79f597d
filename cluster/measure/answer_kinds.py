"""How questions were answered that were told, and how those that nobody told, as a table beside the scores.

A memory that gives a written answer to any question looks good on told questions alone. The environment's
scores say what kind of reply each is (actors/environments/recall_scoring.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from actors.environments.recall_scoring import KINDS, UNTOLD
from actors.types import Answer
from cluster.measure.report import Table, interval_text, percent
from cluster.measure.rows import Chosen, EpisodeScore, answers_mean, told_and_untold
from cluster.measure.statistics import mean_interval

LEGEND = (
    "told, stranger, same_person: questions whose answer was told, about a person of whom nothing was told, "
    "about another relation of a told person; each F1 / told elsewhere (a leak) / says that it does not know "
    "/ made up, in %; what is left to 100 was right or empty · leak: share of the untold questions that got "
    "a told answer, a mean over episodes with its 95 % interval"
)


def kinds_table(rows: Mapping[str, Sequence[EpisodeScore]]) -> Table:
    """``rows``: the episodes of each row. A table without lines where no question was untold."""
    answers = {label: [answer for e in episodes for answer in e.answers] for label, episodes in rows.items()}
    groups = told_and_untold(answer for of_row in answers.values() for answer in of_row)
    counts = {
        name: max(answers_mean(of_row, "f1", chosen)[1] for of_row in answers.values())
        for name, chosen in groups.items()
    }
    lines = [
        (label, *(_shares(answers[label], chosen) for chosen in groups.values()), _leak(episodes))
        for label, episodes in rows.items()
        if groups
    ]
    header = ("row", *(f"{name} ({count})" for name, count in counts.items()), "leak % [95% CI]")
    return Table("Told and untold questions", header, tuple(lines), LEGEND)


def _shares(answers: Sequence[Answer], chosen: Chosen) -> str:
    return "/".join(percent(answers_mean(answers, score, chosen)[0], 0) for score in ("f1", *KINDS))


def _leak(episodes: Sequence[EpisodeScore]) -> str:
    shares = [episode.mean(KINDS[0], lambda answer: answer.category in UNTOLD) for episode in episodes]
    return interval_text(mean_interval([share for share in shares if math.isfinite(share)]))
