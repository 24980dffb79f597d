"""One cell of the grid on one seed: the cards come as successive real writes, and each point is measured.

Delta = 0 --write 1--> B_1 --write 2--> B_2 ...   after each write all cards written so far are asked again:
              |                                   the forgetting curve
              step 1, 2, ... of the same run      measured too, if asked for (BatchedWriter.trace)

The teacher's reader replies where an episode asks its engine (actors/episodes/preservation.py); the prompts
and their order are the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

from actors.environments.base import Questioner
from actors.episodes.episode import derived_seed
from actors.episodes.preservation import Prompt, PromptMaker, in_turn
from actors.fast_weights.delta import Basis, zero
from actors.text.chat_template import ChatFormat
from actors.types import FastWeights, WriteExample, WriteRequest, WriteResult
from actors.write.writer import BatchedWriter
from cluster.probe.cards import examples_of, flashcards_of
from cluster.probe.examiner import Examiner
from cluster.probe.reading import Reader
from cluster.probe.values import Card, Cell, CellRun, Point, WriteLine


def in_writes(count: int, writes: int) -> list[range]:
    """Deal the places of ``count`` cards in order to ``writes`` groups; sizes differ by at most one."""
    return [range(count * write // writes, count * (write + 1) // writes) for write in range(writes)]


def points_of(cell: Cell, sizes: Sequence[int], each_step: bool) -> int:
    """The most measurements that ``run_cell`` counts, for the time left.

    They are fewer where a write stops early, or is rolled back and so not rehearsed. ``sizes``: the examples
    of each write if all earlier ones are accepted.
    """
    if cell.write.epochs == 0 or not each_step:
        return len(sizes)
    return sum(cell.write.epochs * math.ceil(count / cell.write.batch_size) for count in sizes)


def run_cell(
    cell: Cell,
    seed: int,
    basis: Basis,
    writer: BatchedWriter,
    teacher: Teacher,
    examiner: Examiner,
    untouched: Point,
    groups: Sequence[Sequence[Card]],
    each_step: bool,
    on_point: Callable[[], None],
) -> CellRun:
    """Write and measure. ``untouched``: the examiner's point under Delta = 0, the same for every cell.

    ``groups``: the cards of each write, those of ``teacher`` and ``examiner``.

    ``on_point`` is called after each measurement, with two exceptions: ``untouched``, and the state after a
    rolled-back write whose steps were measured. Raises WriterError (a card is longer than the writer takes).
    """
    weights = zero(basis)
    lines: list[WriteLine] = []
    after, steps = [untouched], []
    accepted: list[Card] = []
    for number, cards in enumerate(groups, start=1):
        examples = teacher.examples(number, cell, accepted)
        preserved = teacher.preserved(number, cell, accepted)
        of_write = derived_seed(seed, "write", number - 1)
        request = WriteRequest(f"probe-{seed}", weights, examples, preserved, of_write)
        line, weights_after, trace = _write(cell, writer, request, each_step)
        lines.append(line)
        if line.outcome == "accepted":
            accepted += cards
        inside: list[Point] = []
        for step, step_weights in enumerate(trace, start=1):
            if not _is_finite(step_weights):  # a write that diverges
                break
            inside.append(examiner.examine(basis, step_weights, number, step))
            on_point()
        steps += inside
        weights = weights_after
        if inside and line.outcome == "accepted":
            after.append(inside[-1])  # the last step's weights are the write's
        else:
            after.append(examiner.examine(basis, weights, number, line.steps))
            if not inside:
                on_point()
    figures = (tuple(lines), tuple(after), tuple(steps))
    return CellRun(cell.settings, cell.label, seed, basis.id, basis.parameters, *figures)


def _write(
    cell: Cell, writer: BatchedWriter, request: WriteRequest, each_step: bool
) -> tuple[WriteLine, FastWeights, tuple[FastWeights, ...]]:
    """Returns the write, the weights now in force and, if ``each_step``, the weights after each step."""
    if cell.write.epochs == 0:
        reason = "write.epochs=0: T is the identity"
    elif not request.examples:
        reason = "no example is short enough for write.max_example_tokens"
    else:
        started = time.process_time()
        result, trace = writer.trace(request) if each_step else (writer.write([request])[0], ())
        return _line(result, time.process_time() - started), result.weights, trace
    return WriteLine("empty", reason, 0, 0.0, None, None), request.weights, ()


def _line(result: WriteResult, cpu_s: float) -> WriteLine:
    before, after = (
        loss if math.isfinite(loss) else None for loss in (result.loss_before, result.loss_after)
    )
    return WriteLine(result.outcome, result.reason, result.steps, result.seconds, before, after, cpu_s)


def _is_finite(weights: FastWeights) -> bool:
    matrices = (*weights.b.values(), *weights.a.values())
    return all(bool(torch.isfinite(torch.from_numpy(matrix)).all()) for matrix in matrices)


class Teacher:
    """Makes the material of the writes of ``groups``.

    Remembers the replies: all cells have the same base model.
    """

    def __init__(
        self,
        reader: Reader,
        chat: ChatFormat,
        system_prompt: str,
        groups: Sequence[Sequence[Card]],
        questioner: Questioner | None,
        seed: int,
    ) -> None:
        self._reader, self._chat, self._system_prompt = reader, chat, system_prompt
        self._groups, self._questioner, self._seed = groups, questioner, seed
        self._replies: dict[Prompt, WriteExample] = {}

    def examples(self, number: int, cell: Cell, earlier: Sequence[Card]) -> tuple[WriteExample, ...]:
        """What write ``number`` (from 1) learns, after the accepted cards ``earlier``, oldest first."""
        cards = self._groups[number - 1]
        return examples_of(cell.supervision, cards, earlier, self._system_prompt, self._chat, cell.write)

    def preserved(self, number: int, cell: Cell, earlier: Sequence[Card]) -> tuple[WriteExample, ...]:
        """What write ``number`` leaves as it was."""
        config = cell.write.preserve
        if config.weight == 0:
            return ()
        maker = PromptMaker(self._chat, self._system_prompt, self._questioner, config)
        # An episode that writes other texts than cards has no card to ask beside.
        cards = [*earlier, *self._groups[number - 1]] if cell.supervision == "flashcards" else []
        written = flashcards_of(cards)
        pool, beside = maker.unanswered(maker.pool(self._seed), written), maker.beside(written)
        return in_turn(self._all(pool), self._all(beside), config.per_step)

    def _all(self, prompts: Sequence[Prompt]) -> list[WriteExample]:
        for tokens in {prompt.tokens for prompt in prompts if prompt not in self._replies}:
            self._ask([p for p in prompts if p.tokens == tokens and p not in self._replies], tokens)
        return [self._replies[prompt] for prompt in prompts]

    def _ask(self, prompts: Sequence[Prompt], tokens: int) -> None:
        """Greedy replies of the model without Delta, cut at ``tokens``."""
        draft = self._chat.stop_token_ids[:1]
        layers = self._reader.model.layers
        asked = [WriteExample(prompt.ids, draft) for prompt in prompts]
        for block in self._reader.prepare(asked, 0, answered=True):
            said = self._reader.answer(block, self._reader.read(block, layers), layers, tokens)
            for place, reply in zip(block.numbers, said, strict=True):
                self._replies[prompts[place]] = WriteExample(prompts[place].ids, reply)
