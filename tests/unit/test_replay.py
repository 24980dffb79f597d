"""Fast weights rebuilt from a write log by the real writer.

They are equal to the bit if the episode wrote alone, and to rounding if its writes were batched.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from actors.episodes.recovery import ReplayError, replay
from actors.fast_weights.basis import make_basis
from actors.fast_weights.delta import Basis, zero
from actors.types import FastWeights, WriteExample, WriteRecord, WriteRequest, WriteResult
from actors.write.writer import BatchedWriter
from configs.schema import WriteConfig
from tests.unit.test_writer import ADAM, SGD, largest_difference
from tests.unit.write_cases import basis_of, examples, frozen, tiny_model

TOLERANCE = 1e-3
TEACHING = (examples(1, 5, 9), examples(2, 3, 9), examples(3, 4, 9))


def writer_of(basis: Basis, config: WriteConfig) -> BatchedWriter:
    return BatchedWriter(frozen(tiny_model()), basis, config)


def record(written: tuple[WriteExample, ...], result: WriteResult) -> WriteRecord:
    return replace(
        EMPTY,
        revision=result.weights.revision,
        examples=written,
        rejected_flashcards=0,
        loss_before=result.loss_before,
        loss_after=result.loss_after,
        steps=result.steps,
        outcome=result.outcome,
        reason=result.reason,
    )


EMPTY = WriteRecord(1, (), (), "[]", 1, 0, 0, float("nan"), float("nan"), 0, 0.0, "empty", "no card")


def lived(
    writer: BatchedWriter, basis: Basis, companions: int
) -> tuple[list[WriteRecord], list[FastWeights]]:
    """Make the log and the revisions of an episode of three writes, the later ones with rehearsal.

    Each write is batched with those of ``companions`` other episodes.
    """
    weights, log, revisions = zero(basis), [], []
    for number, new in enumerate(TEACHING):
        written = new + (TEACHING[number - 1][:2] if number else ())
        others = [
            WriteRequest(f"other-{place}", zero(basis), examples(50 + 10 * number + place, 4, 9))
            for place in range(companions)
        ]
        request = WriteRequest("a", weights, written)
        results = writer.write([*others[:1], request, *others[1:]])
        result = results[min(1, companions)]
        assert result.outcome == "accepted"
        weights = result.weights
        revisions.append(weights)
        log.append(record(written, result))
        if number == 0:
            log.append(EMPTY)
    return log, revisions


@pytest.mark.parametrize("train_a", [False, True])
@pytest.mark.parametrize("config", [SGD, ADAM], ids=lambda config: config.optimizer)
def test_a_replayed_log_gives_the_very_weights_of_an_episode_that_wrote_alone(
    config: WriteConfig, train_a: bool
) -> None:
    frozen_basis = basis_of(tiny_model())
    basis = make_basis(frozen_basis.kind, frozen_basis.a, frozen_basis.d_out, train_a=train_a)
    log, revisions = lived(writer_of(basis, config), basis, companions=0)
    rebuilt = replay(writer_of(basis, config), "a", basis.id, log, TOLERANCE)
    assert [weights.revision for weights in rebuilt] == [1, 2, 3]
    for replayed, lost in zip(rebuilt, revisions, strict=True):
        assert replayed.b.keys() == lost.b.keys() and replayed.a.keys() == lost.a.keys()
        assert all(np.array_equal(replayed.b[name], lost.b[name]) for name in lost.b)
        assert all(np.array_equal(replayed.a[name], lost.a[name]) for name in lost.a)
    assert max(float(np.abs(matrix).max()) for matrix in revisions[-1].b.values()) > 1e-3


@pytest.mark.parametrize("config", [SGD, ADAM], ids=lambda config: config.optimizer)
def test_writes_that_were_batched_come_back_up_to_rounding(config: WriteConfig) -> None:
    """Rounding is 1e-6 with SGD. Adam steps by lr whatever the gradient: 1 % of a step for each write."""
    basis = basis_of(tiny_model())
    log, revisions = lived(writer_of(basis, config), basis, companions=3)
    rebuilt = replay(writer_of(basis, config), "a", basis.id, log, TOLERANCE)
    for number, (replayed, lost) in enumerate(zip(rebuilt, revisions, strict=True), start=1):
        rounding = 1e-6 if config is SGD else 0.01 * config.learning_rate * number
        assert largest_difference(replayed, dict(lost.b)) <= rounding


def test_a_write_that_was_rolled_back_changes_nothing_in_the_replay() -> None:
    basis = basis_of(tiny_model())
    log, revisions = lived(writer_of(basis, SGD), basis, companions=0)
    hopeless = replace(log[0], outcome="rolled_back", reason="the loss rose", revision=1)
    rebuilt = replay(writer_of(basis, SGD), "a", basis.id, [*log[:1], hopeless, *log[1:]], TOLERANCE)
    assert all(np.array_equal(rebuilt[-1].b[name], revisions[-1].b[name]) for name in revisions[-1].b)
    assert replay(writer_of(basis, SGD), "a", basis.id, [replace(EMPTY, revision=0)], TOLERANCE) == ()


def test_a_log_of_another_base_or_with_a_gap_is_refused_in_one_line() -> None:
    model = tiny_model()
    basis = basis_of(model)
    log, _ = lived(writer_of(basis, SGD), basis, companions=0)
    gap = [replace(EMPTY, revision=0), replace(EMPTY, revision=0), *log[2:]]
    missing = (
        "write 3 of episode a left revision 2 in force, the replay is at 1: an earlier record is missing"
    )
    with pytest.raises(ReplayError, match=f"^{missing}$"):
        replay(writer_of(basis, SGD), "a", basis.id, gap, TOLERANCE)
    state = {name: value * 1.05 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    other = r"write 1 of episode a logged a loss of \S+ before it, its replay has \S+ \(tolerance 0.001\)"
    with pytest.raises(ReplayError, match=f"^{other}"):
        replay(BatchedWriter(frozen(model), basis, SGD), "a", basis.id, log, TOLERANCE)
    with pytest.raises(ReplayError, match=r"write 1 of episode a took 6 steps and its replay 2"):
        replay(writer_of(basis, replace(SGD, epochs=1)), "a", basis.id, log, TOLERANCE)
