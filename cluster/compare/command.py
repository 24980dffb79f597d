"""The ``compare`` command: training runs over seeds, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """examples:
  engram train quickstart name=tmem --seeds 0,1,2
  engram train quickstart name=memory-off memory.policy=truncation \\
      --seeds 0,1,2
  engram compare runs/tmem-* runs/memory-off-* --output runs/compared

Runs with the same name= are one group. They may differ only in seed, in model.name (the policy that a seed
starts from; a note names them), in model.date (the day on which a run began) and in what changes no result:
output_dir, resume, tracking.*, store.*, ray.*, episodes.*. The first run's group is compared with each other
group.

The run (its seed) is the unit of what is claimed about training: t over seeds, two-sided. So many seeds find
a gain with 80 % power at p < 0.05 / p < 0.01, by the standard deviation between seeds (all in points):

  spread     +2 points    +5 points   +10 points   +20 points
       2       10 / 16        4 / 6        3 / 4        3 / 3
       4       34 / 51       8 / 11        4 / 6        3 / 4
       8     128 / 191      23 / 34       8 / 11        4 / 6
"""


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN", help="folders, or addresses in a store, of finished runs")
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="where tables and plots go")] = Path(
        "runs/compared"
    ),
) -> None:
    """Compare training runs, pooled over seeds.

    Curves, what training gained, and whether one kind of run gained more than another.
    """
    from cluster.common.display import Display
    from cluster.compare.report import open_output, show_compared
    from cluster.compare.runs import load_groups
    from cluster.runs.from_store import local_copy

    groups = load_groups([local_copy(run, weights=False) for run in runs])
    open_output(output)
    show_compared(groups, output, Display())
