"""The benchmarks by name. Each is a module of this folder with ``run(context) -> Outcome``.

A module is imported only in the process that runs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from configs.bounds import ConfigError

if TYPE_CHECKING:  # --help lists the benchmarks: their values bring numpy along
    from cluster.bench.values import Context, Outcome


ABOUT = {
    "writer": "the batched writer against a sequential PEFT + torch.optim loop that gives the same B",
    "revisions": (
        "installs, decode and prefill under one adapter per sequence, against the same engine without LoRA"
    ),
    "refresh": "all weights from the learner's memory to a serving engine, against memcpy of the same bytes",
    "learner": "a step with per-segment Deltas against the same step without; memory of the head; padding",
    "rollout": "the quickstart's rollout side against raw vLLM that emits the same tokens without writes",
    "agentic": "a turn of 64 siblings that wait for a tool of 1 s, against one tool call beside the engine",
    "serve": "64 conversations at once, each under its own Delta, against stock vLLM's server with one LoRA",
    "controller": "one controller over 1 to 1,000 virtual rollout workers, against their ideal throughput",
    "circle": "the quickstart's real RL steps with staleness 1 against staleness 0, all on this machine",
    "cost": "memory and seconds per episode against the length of the history: full context beside TMEM",
}
"""What each benchmark compares with what, in the order in which they run."""


def find(names: Sequence[str]) -> tuple[str, ...]:
    """The ``names`` in the suite's order, all without names. Raises ConfigError."""
    for name in names:
        if name not in ABOUT:
            raise ConfigError(f"no benchmark {name!r}: there are {', '.join(ABOUT)}")
    return tuple(name for name in ABOUT if not names or name in names)


class Runner:
    """The object in a benchmark's process, which runs it with ``context.threads`` threads."""

    def run(self, name: str, context: Context) -> Outcome:
        import torch

        torch.set_num_threads(context.threads)
        outcome: Outcome = importlib.import_module(f"cluster.bench.{name}").run(context)
        return outcome
