"""The benchmarks by name. Each is a module of this folder with ``run(context) -> Outcome``.

A module is imported only in the process that runs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.bounds import ConfigError

if TYPE_CHECKING:  # --help lists the benchmarks: their values bring numpy along
    from cluster.bench.values import Context, Outcome


@dataclass(frozen=True, slots=True)
class Entry:
    """``about`` says in one line what is compared with what."""

    name: str
    about: str


SUITE = (
    Entry("writer", "the batched writer against a sequential PEFT + torch.optim loop that gives the same B"),
    Entry(
        "revisions",
        "installs, decode and prefill under one adapter per sequence, against the same engine without LoRA",
    ),
    Entry(
        "refresh",
        "all weights from the learner's memory to a serving engine, against memcpy of the same bytes",
    ),
    Entry(
        "learner", "a step with per-segment Deltas against the same step without; memory of the head; padding"
    ),
    Entry(
        "rollout",
        "the quickstart's rollout side against raw vLLM that emits the same tokens without writes",
    ),
    Entry(
        "controller", "one controller over 1 to 1,000 virtual rollout workers, against their ideal throughput"
    ),
    Entry(
        "circle",
        "the quickstart's real RL steps with staleness 1 against staleness 0, all on this machine",
    ),
    Entry(
        "cost", "memory and seconds per episode against the length of the history: full context beside TMEM"
    ),
)


def find(names: Sequence[str]) -> tuple[Entry, ...]:
    """The entries of ``names`` in the suite's order, all without names. Raises ConfigError."""
    suite_names = [entry.name for entry in SUITE]
    for name in names:
        if name not in suite_names:
            raise ConfigError(f"no benchmark {name!r}: there are {', '.join(suite_names)}")
    return tuple(entry for entry in SUITE if not names or entry.name in names)


def run_one(name: str, context: Context) -> Outcome:
    """Run a benchmark in this process, with ``context.threads`` threads."""
    import torch

    torch.set_num_threads(context.threads)
    module = importlib.import_module(f"cluster.bench.{name}")
    outcome: Outcome = module.run(context)
    return outcome
