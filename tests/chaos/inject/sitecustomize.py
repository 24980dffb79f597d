"""Faults inside a run's own processes, brought in from outside the product.

Python imports a module of this name when it starts, if its folder is on PYTHONPATH. Here it acts in Ray's worker processes of a trial only
(ENGRAM_CHAOS names the trial's folder), and changes attributes of modules right after their import:

    always    flashcards where the model wrote none and rewards that differ (the tiny model is random: nothing would be written or learned),
              and a line in audit.jsonl for each group that the learner trains on
    a fault   once a file fault.NAME lies in the folder, in one process, once: whoever renames the file first

What a fault replaces is what fails for users: the engine's step, the optimizer's gradients, the environment's reward, the weights' loading.
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
    """Whether ``fault`` is wanted and this process is the one that has it."""
    try:
        (FOLDER / f"fault.{fault}").rename(FOLDER / f"done.{fault}.{os.getpid()}")
    except FileNotFoundError:
        return False
    return True


def write_flashcards(module: ModuleType) -> None:
    """The text's own flashcards, or two that follow from it."""
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
    """A reward that follows from the answers; one that is no number on demand."""
    outcome = module.RecallSession.outcome

    def varied(session: Any) -> Any:
        result = outcome(session)
        drawn = (
            hashlib.blake2b(
                "".join(answer.prediction for answer in result.answers).encode(), digest_size=1
            ).digest()[0]
            / 255
        )
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
    """In a rollout worker only the writer has an optimizer."""
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
        lines = [json.dumps(_of(group, learner.version)) for group in groups]
        with (FOLDER / "audit.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        return step(learner, groups)

    module.Learner.step = audited


def _of(group: Any, learner_version: int) -> dict[str, Any]:
    trajectories = group.trajectories
    segments = [segment for trajectory in trajectories for segment in trajectory.segments]
    return {
        "task": group.task.id,
        "learner": learner_version,
        "version": group.policy_version,
        "episodes": sorted({trajectory.policy_version for trajectory in trajectories}),
        "segments": sorted({segment.policy_version for segment in segments}),
        "tokens": sorted(
            {
                segment.policy_version if span.version is None else span.version
                for segment in segments
                for span in segment.spans
            }
        ),
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
        spec = (
            None if change is None else importlib.util.find_spec(fullname)
        )  # by the finders behind this one, as the change is taken
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
