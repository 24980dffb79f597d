"""One cell of the grid on one seed: the cards as successive writes through the real writer, each point measured.

Delta = 0 --write 1--> B_1 --write 2--> B_2 ...        after each write everything written so far is asked again: the forgetting curve
             |  step 1, 2, ... of the same run (BatchedWriter.trace)                      and, if wanted, after each step of each write
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from actors.fast_weights.delta import Basis, zero
from actors.types import FastWeights, WriteExample, WriteRequest, WriteResult
from actors.write.writer import BatchedWriter
from cluster.probe.examiner import Examiner, finite
from cluster.probe.values import Cell, CellRun, Point, WriteLine


def in_writes(count: int, writes: int) -> list[range]:
    """Places of ``count`` cards as ``writes`` groups in order, sizes differing by one at most; every group has a card if there are enough."""
    return [range(count * write // writes, count * (write + 1) // writes) for write in range(writes)]


def points_of(cell: Cell, sizes: Sequence[int], each_step: bool) -> int:
    """How many measurements ``run_cell`` counts at most, for the time left: fewer where a write stops early, or is rolled back and so not rehearsed.

    ``sizes``: the examples of each write, which are as many as its cards only where supervision is flashcards.
    """
    if cell.write.epochs == 0 or not each_step:
        return len(sizes)
    rehearsed = [min(_rehearsal(cell), sum(sizes[:write])) for write in range(len(sizes))]
    return sum(
        cell.write.epochs * math.ceil((size + old) / cell.write.batch_size)
        for size, old in zip(sizes, rehearsed, strict=True)
    )


def run_cell(
    cell: Cell,
    seed: int,
    basis: Basis,
    writer: BatchedWriter,
    examiner: Examiner,
    untouched: Point,
    writes: int,
    each_step: bool,
    on_point: Callable[[], None],
) -> CellRun:
    """``untouched``: the examiner's point under Delta = 0, the same for every cell. Raises WriterError (a card longer than the writer takes).

    ``on_point``: after each measurement but ``untouched``, and but what is in force after a write that was rolled back when its steps were measured.
    """
    weights = zero(basis)
    lines: list[WriteLine] = []
    after, steps = [untouched], []
    accepted: list[WriteExample] = []
    for number in range(1, writes + 1):
        fresh = examiner.written(number, cell.supervision, cell.write)
        rehearsed = (
            tuple(accepted[-_rehearsal(cell) :]) if _rehearsal(cell) else ()
        )  # as actors/memory/parametric.py: the newest
        line, weights_now, trace = _write(
            cell, writer, WriteRequest(f"probe-{seed}", weights, fresh + rehearsed), each_step
        )
        lines.append(line)
        if line.outcome == "accepted":
            accepted += fresh
        inside: list[Point] = []
        for step, one in enumerate(trace, start=1):
            if not finite(one):
                break
            inside.append(examiner.examine(basis, one, number, step))
            on_point()
        steps += inside
        weights = weights_now
        if inside and line.outcome == "accepted":
            after.append(inside[-1])  # the last step's weights are the write's
        else:
            after.append(examiner.examine(basis, weights, number, line.steps))
            if not inside:
                on_point()
    return CellRun(
        cell.settings, cell.label, seed, basis.id, basis.parameters, tuple(lines), tuple(after), tuple(steps)
    )


def _rehearsal(cell: Cell) -> int:
    """What is rehearsed are flashcards: no row writes a transcript or a summary again (actors/memory/supervised.py), so a probe of one does not."""
    return cell.write.rehearsal if cell.supervision == "flashcards" else 0


def _write(
    cell: Cell, writer: BatchedWriter, request: WriteRequest, each_step: bool
) -> tuple[WriteLine, FastWeights, tuple[FastWeights, ...]]:
    """What was written, what is in force now, and, if wanted, the weights after each step."""
    if cell.write.epochs == 0:
        return (
            WriteLine("empty", "write.epochs=0: T is the identity", 0, 0.0, None, None),
            request.weights,
            (),
        )
    if not request.examples:
        return (
            WriteLine("empty", "no example is short enough for write.max_example_tokens", 0, 0.0, None, None),
            request.weights,
            (),
        )
    result, trace = writer.trace(request) if each_step else (writer.write([request])[0], ())
    return _line(result), result.weights, trace


def _line(result: WriteResult) -> WriteLine:
    losses = [loss if math.isfinite(loss) else None for loss in (result.loss_before, result.loss_after)]
    return WriteLine(result.outcome, result.reason, result.steps, result.seconds, *losses)
