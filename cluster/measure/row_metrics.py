"""The figures of an evaluation row for the tracker."""

from __future__ import annotations

import numpy as np

from cluster.measure.collapse import collapse_figures
from cluster.measure.rows import RowResult, answers_mean, categories, primary_score, told_and_untold
from cluster.measure.scores import REWARD, SUMMARY


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
