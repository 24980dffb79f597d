"""The timeline that a run keeps: what is passed on, what is kept, what is drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cluster.tracking.tracker import NullTracker
from cluster.train.timeline import KeptTimeline, save_timeline


class Recorder(NullTracker):
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logged.append((step, dict(metrics)))


def test_a_runs_timeline_is_kept_beside_the_tracker_and_drawn(tmp_path: Path) -> None:
    path, inner = tmp_path / "timeline.jsonl", Recorder()
    assert save_timeline(path, tmp_path) == []
    for step, act in ((1, 0.25), (2, 0.5)):
        KeptTimeline(inner, path).log(
            {"timeline/worker_act": act, "timeline/worker_idle": 1 - act}, step
        )  # the second run resumes the first
    KeptTimeline(inner, path).log({"reward/mean": 0.5}, 2)
    assert [step for step, _ in inner.logged] == [1, 2, 2] and inner.logged[2][1] == {"reward/mean": 0.5}
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert kept == [
        {"step": 1, "shares": {"act": 0.25, "idle": 0.75}},
        {"step": 2, "shares": {"act": 0.5, "idle": 0.5}},
    ]
    (plot,) = save_timeline(path, tmp_path)
    assert plot.name == "timeline.png" and plot.read_bytes().startswith(b"\x89PNG")
