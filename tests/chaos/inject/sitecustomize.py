"""Injects faults into a run's own processes, from outside the product.

Python imports a module of this name when it starts, if its folder is on PYTHONPATH. This one acts only in
Ray's worker processes of a trial: ENGRAM_CHAOS names the trial's folder. It changes attributes of modules
right after their import:

    always    flashcards where the model wrote none, and rewards that differ: the tiny model is random, and
              nothing would be written or learned otherwise; and a line in audit.jsonl for each trained group
    a fault   when a file fault.NAME lies in the folder, once, in the process that renames the file first

A fault breaks what breaks for users: the engine's step, the optimizer's gradients, the environment's
reward, the loading of weights.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(os.environ.get("ENGRAM_CHAOS", ""))


def claimed(fault: str) -> bool:
    """Take ``fault`` if it is wanted. False when it is not, or when another process took it."""
    try:
        (FOLDER / f"fault.{fault}").rename(FOLDER / f"done.{fault}.{os.getpid()}")
    except FileNotFoundError:
        return False
    return True


def write_flashcards(module: ModuleType) -> None:
    """Parse the text's own flashcards, or make two that follow from it."""
    parse = module.parse_flashcards
    from actors.text.flashcards import ParsedFlashcards
    from actors.types import Flashcard

    def parse_or_make(text: str, limit: int) -> ParsedFlashcards:
        parsed = parse(text, limit)
        number = hashlib.blake2b(text.encode(), digest_size=2).hexdigest()
        made = (Flashcard("Where does Nora live?", f"Lisbon {number}"), Flashcard("What is Omar?", "a baker"))
        return parsed if parsed.cards else ParsedFlashcards(made, 0, "")

    module.parse_flashcards = parse_or_make  # type: ignore[attr-defined]


def vary_rewards(module: ModuleType) -> None:
    """Let the reward follow from the answers, or be NaN when that fault is wanted."""
    outcome = module.RecallSession.outcome

    def varied(session: Any) -> Any:
        result = outcome(session)
        answers = "".join(answer.prediction for answer in result.answers)
        drawn = hashlib.blake2b(answers.encode(), digest_size=1).digest()[0] / 255
        return replace(result, reward=math.nan if claimed("nan_reward") else drawn)

    module.RecallSession.outcome = varied


def break_engine(module: ModuleType) -> None:
    step = module.LLMEngine.step

    def broken(engine: Any) -> Any:
        if claimed("engine"):
            raise RuntimeError("chaos: the engine's step fails")
        return step(engine)

    module.LLMEngine.step = broken


def break_gradients(module: ModuleType) -> None:
    """Make a gradient NaN. In a rollout worker only the writer has an optimizer."""
    import torch

    step = torch.optim.Adam.step

    def broken(optimizer: Any, closure: Any = None) -> Any:
        if claimed("nan_write"):
            for leaf in (leaf for group in optimizer.param_groups for leaf in group["params"]):
                leaf.grad.fill_(math.nan)
        return step(optimizer, closure)

    torch.optim.Adam.step = broken  # type: ignore[method-assign,assignment]


def die_while_loading(module: ModuleType) -> None:
    refresh = module.VLLMPolicy.refresh

    async def dying(policy: Any, *arguments: Any) -> Any:
        if claimed("refresh"):
            os.kill(os.getpid(), signal.SIGKILL)
        return await refresh(policy, *arguments)

    module.VLLMPolicy.refresh = dying


def audit_training(module: ModuleType) -> None:
    step = module.Learner.step

    def audited(learner: Any, groups: Sequence[Any]) -> Any:
        lines = [json.dumps(_audit_entry(group, learner.version)) for group in groups]
        with (FOLDER / "audit.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        return step(learner, groups)

    module.Learner.step = audited


def _audit_entry(group: Any, learner_version: int) -> dict[str, Any]:
    """The versions in a group: of its episodes, its segments, its tokens."""
    trajectories = group.trajectories
    segments = [segment for trajectory in trajectories for segment in trajectory.segments]
    tokens = {
        segment.policy_version if span.version is None else span.version
        for segment in segments
        for span in segment.spans
    }
    return {
        "task": group.task.id,
        "learner": learner_version,
        "version": group.policy_version,
        "episodes": sorted({trajectory.policy_version for trajectory in trajectories}),
        "segments": sorted({segment.policy_version for segment in segments}),
        "tokens": sorted(tokens),
        "revisions": sum(len(trajectory.revisions) for trajectory in trajectories),
        "finite": all(math.isfinite(trajectory.outcome.reward) for trajectory in trajectories),
    }


CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "actors.memory.parametric": write_flashcards,
    "actors.environments.recall": vary_rewards,
    "vllm.v1.engine.llm_engine": break_engine,
    "actors.write.writer": break_gradients,
    "actors.engine.policy": die_while_loading,
    "learner.learner": audit_training,
}


class AfterImport(importlib.abc.MetaPathFinder):
    """Runs a change as the last act of its module's import."""

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        change = CHANGES.pop(fullname, None)
        # The change was taken out above, so that find_spec asks the finders behind this one.
        spec = None if change is None else importlib.util.find_spec(fullname)
        if change is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


if os.environ.get("ENGRAM_CHAOS") and any("default_worker" in argument for argument in sys.orig_argv):
    sys.meta_path.insert(0, AfterImport())
