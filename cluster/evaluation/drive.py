"""Run the cells that are missing, on shared workers where their configurations allow it.

    cells --> batches of one worker configuration --> workers --> cell: run_episodes --> journal --> file
                 ^                                       |
                 +-- once more, on new workers ----------+  a worker died: its finished episodes are kept;
                                                            the second time the cell is given up

A failed episode is counted in its cell, and runs again when the cell does.
Waits: every episode has a deadline on its worker and another here, so a cell ends. Starting workers have
ray.startup_timeout_s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.protocols import TaskError
from cluster.common.errors import AllFailed, ClusterError, SaveError, StartupError
from cluster.evaluation.plan import Cell
from cluster.evaluation.prepare import Comparison
from cluster.evaluation.store import worst
from cluster.fleet.ray_runtime import Demand, cancel_on_sigterm, demand, ray_runtime
from cluster.fleet.remote_worker import RemoteWorker
from cluster.measure.rows import EpisodeSource, EvaluationRow, TaskResult, run_episodes
from cluster.train.build import worker_set, worker_specs
from configs.user_code import ExtensionError

ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class Hooks:
    """Calls to the display and the recorder.

    ``begins``: with the number of tasks left. ``watch``: put the recorder between a cell and its workers.
    """

    begins: Callable[[Cell, int], None]
    advances: Callable[[], None]
    finished: Callable[[Cell], None]
    retries: Callable[[Cell, str], None]
    watch: Callable[[Cell, Sequence[EpisodeSource]], Sequence[EpisodeSource]]


def batches(cells: Sequence[Cell], basis_of: Callable[[Cell], object]) -> list[list[Cell]]:
    """Group cells by what their workers are built from, in the order of each group's first cell.

    The memory and the seed come with each episode, so they do not matter here.
    """
    groups: dict[object, list[Cell]] = {}
    for cell in cells:
        c = cell.config
        parts = (c.model, c.environment, c.fast_weights, c.write, c.engine, c.rollout, c.embedder, c.sampling)
        groups.setdefault((*parts, c.evaluation.temperature, basis_of(cell)), []).append(cell)
    return list(groups.values())


async def run_cells(comparison: Comparison, cells: Sequence[Cell], hooks: Hooks) -> dict[str, str]:
    """Run ``cells``; return the reason, by key, for each that was given up.

    Raises StartupError when Ray itself does not start, SaveError.
    """
    if not cells:
        return {}
    needs = [demand(cell.config, learner=False) for cell in cells]
    custom = sorted({resource for need in needs for resource in need.custom})  # the last has the most
    most = Demand(
        max(need.cpus for need in needs), max(need.gpus for need in needs), tuple(dict(custom).items())
    )
    given_up: dict[str, str] = {}
    with ray_runtime(comparison.plan.base, most):
        cancel_on_sigterm()
        for batch in batches(cells, lambda cell: comparison.bases[cell.key]):
            given_up |= await _run_batch(comparison, batch, hooks)
    return given_up


async def _run_batch(comparison: Comparison, batch: Sequence[Cell], hooks: Hooks) -> dict[str, str]:
    waiting = list(batch)
    attempts: dict[str, int] = {}
    given_up: dict[str, str] = {}
    failed_starts = 0  # in a row
    specs = worker_specs(
        batch[0].config, comparison.policy_path, comparison.bases[batch[0].key], comparison.version
    )
    while waiting:
        try:
            async with worker_set(specs) as workers:
                failed_starts = 0
                while waiting:
                    await _run_cell(comparison, waiting[0], workers, hooks)
                    waiting.pop(0)
        except StartupError as error:
            failed_starts += 1
            if failed_starts == ATTEMPTS:  # without workers none of the rest can run
                return given_up | dict.fromkeys((cell.key for cell in waiting), str(error))
            hooks.retries(waiting[0], str(error))
        except SaveError:  # new workers make no room on the disk
            raise
        except (TaskError, ExtensionError) as error:  # the user's code does not start in a worker
            return given_up | dict.fromkeys((cell.key for cell in waiting), str(error))
        except AllFailed as error:  # new workers run the same code
            given_up[waiting.pop(0).key] = str(error)
        except ClusterError as error:
            cell = waiting[0]
            attempts[cell.key] = attempts.get(cell.key, 0) + 1
            if attempts[cell.key] == ATTEMPTS:
                given_up[cell.key] = str(error)
                waiting.pop(0)
            else:
                hooks.retries(cell, str(error))
    return given_up


async def _run_cell(
    comparison: Comparison, cell: Cell, workers: Sequence[RemoteWorker], hooks: Hooks
) -> None:
    """Run every task that the cell's journal does not have yet."""
    store = comparison.store
    begun = store.begun(cell)
    have = {task.position for task in begun}
    left = [
        (position, task) for position, task in enumerate(comparison.tasks[cell.key]) if position not in have
    ]
    hooks.begins(cell, len(left))
    for worker in workers:
        await worker.measure()  # forget the peak of the cell before
    with store.journal(cell, begun) as journal:

        def keep(result: TaskResult) -> None:
            journal.add(result)
            hooks.advances()

        row = EvaluationRow(cell.key, cell.config.memory, cell.config.seed)
        await run_episodes(row, left, hooks.watch(cell, workers), cell.config.engine.slots, keep)
    peaks = [await worker.measure() for worker in workers]
    if (before := store.finished(cell)) is not None:  # this run repeated only the failed episodes
        peaks.append(before.peak)
    store.finish(cell, journal.tasks, worst(peaks))
    hooks.finished(cell)
