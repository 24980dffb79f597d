"""The ``pool`` subcommand: training runs over seeds, side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_EXAMPLES = """examples:
  for seed in 0 1 2; do python -m cluster train configs/quickstart.yaml name=tmem seed=$seed; done
  for seed in 0 1 2; do python -m cluster train configs/quickstart.yaml name=memory-off memory.policy=truncation seed=$seed; done
  python -m cluster pool runs/tmem-* runs/memory-off-* --output runs/pool

Runs of one name= are one group. They may differ in nothing but seed, model.name (the policy that a seed starts from: a note names them) and what
changes no result: output_dir, resume, tracking.*, ray.*, episodes.*. The first run's group is compared with each other.
"""


def add_pool(commands: Any) -> None:
    text = "training runs pooled over seeds: what training gained, and whether one kind of run gained more than another"
    command = commands.add_parser(
        "pool",
        help=text,
        description=text.capitalize() + ".",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders of finished training runs"
    )
    command.add_argument(
        "--output",
        type=Path,
        default=Path("runs/pool"),
        metavar="FOLDER",
        help="where the tables and the plot go (runs/pool)",
    )
    command.set_defaults(overrides=[])


def run_pool(options: argparse.Namespace) -> None:
    """Raises CheckpointError, before any table is shown where the output folder cannot be written."""
    from cluster.common.display import Display
    from cluster.compare.report import open_output, pool_groups, save_pool
    from cluster.compare.runs import load_groups
    from cluster.measure.report import show

    groups = load_groups(options.runs)
    open_output(options.output)
    config = groups[0].runs[0].config
    pool, display = pool_groups(groups, config.evaluation.bootstrap_samples, config.seed), Display()
    show(pool.document(), display)
    for path in save_pool(pool, options.output):
        display.say(f"saved: {path}")
