"""What is made of evaluation rows: figures for the tracker, and the table of told and untold questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from actors.environments.recall_questions import KINDS, UNTOLD
from actors.types import Answer
from cluster.measure.collapse import collapse_figures
from cluster.measure.report import Table, interval_text, percent
from cluster.measure.rows import (
    Chosen,
    EpisodeScore,
    RowResult,
    answers_mean,
    categories,
    primary_score,
    told_and_untold,
)
from cluster.measure.scores import REWARD, SUMMARY
from cluster.measure.statistics import mean_interval

LEGEND = (
    "told, stranger, same_person: questions whose answer was told, about a person of whom nothing was told, "
    "about another relation of a told person; each F1 / told elsewhere (a leak) / says that it does not know "
    "/ made up, in %; what is left to 100 was right or empty · leak: share of the untold questions that got "
    "a told answer, a mean over episodes with its 95 % interval"
)


def row_metrics(result: RowResult, key: str) -> dict[str, float]:
    """The row's figures for the tracker: eval/<key>/f1 ..., by category where there is more than one."""
    figures = {
        score: float(np.mean(values)) for score in result.score_names if (values := result.values(score))
    }
    for category, chosen in categories(result.answers).items():
        figures[f"f1_{category}"] = answers_mean(result.answers, "f1", chosen)[0]
    for group, chosen in told_and_untold(result.answers).items():
        shares = {score: answers_mean(result.answers, score, chosen) for score in result.score_names}
        figures |= {f"{score}_{group}": mean for score, (mean, count) in shares.items() if count}
    if result.episodes:
        figures[REWARD] = result.per_episode(REWARD)
    figures |= {f"writes_{outcome}": float(count) for outcome, count in result.writes.items()}
    figures["failed_episodes"] = float(len(result.failed))
    figures |= collapse_figures(result.answers, result.extractions)
    figures |= result.cards.shares if result.cards is not None else {}
    if result.episodes:
        costs = ("prompt_tokens", "generated_tokens", "seconds")
        figures |= {field: result.per_episode(field) for field in costs}
    figures |= {f"reward_part_{name}": mean for name, mean in result.weighed_parts().items()}
    for member in result.members:
        own = result.of_member(member)
        shown = {score: own.values(score) for score in own.score_names}
        figures |= {f"{member}_{score}": float(np.mean(values)) for score, values in shown.items() if values}
        figures[f"{member}_failed_episodes"] = float(len(own.failed))
    return {f"eval/{key}/{name}": value for name, value in figures.items()}


def summary_metrics(result: RowResult) -> dict[str, float]:
    """The held-out score of the trained policy, for its chart over the run's steps. {} without one."""
    score = primary_score(result.episodes)
    values = result.values(score)
    return {f"{SUMMARY}/held_out_{score}": float(np.mean(values))} if values else {}


def kinds_table(rows: Mapping[str, Sequence[EpisodeScore]]) -> Table:
    """How told questions were answered, and untold ones, beside the scores.

    A memory that gives a written answer to any question looks good on told questions alone. ``rows``: the
    episodes of each row. The table has no lines where no question was untold.
    """
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
