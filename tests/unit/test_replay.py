"""Fast weights rebuilt from a write log by the real writer: to the bit where the episode wrote alone, to rounding where its writes were batched."""

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
from tests.unit.test_writer import ADAM, SGD, basis_of, examples, frozen, largest_difference, tiny_model

TOLERANCE = 1e-3
TEACHING = (examples(1, 5, 9), examples(2, 3, 9), examples(3, 4, 9))


def writer_of(basis: Basis, config: WriteConfig) -> BatchedWriter:
    return BatchedWriter(frozen(tiny_model()), basis, config)


def record(written: tuple[WriteExample, ...], result: WriteResult) -> WriteRecord:
    losses = (result.loss_before, result.loss_after)
    return WriteRecord(
        result.weights.revision,
        written,
        (),
        "[]",
        0,
        0,
        0,
        *losses,
        result.steps,
        0.1,
        result.outcome,
        result.reason,
    )


EMPTY = WriteRecord(1, (), (), "[]", 1, 0, 0, float("nan"), float("nan"), 0, 0.0, "empty", "no card")


def lived(
    writer: BatchedWriter, basis: Basis, companions: int
) -> tuple[list[WriteRecord], list[FastWeights]]:
    """The log and the revisions of an episode of three writes, the later ones with rehearsal, each batched with ``companions`` other episodes."""
    weights, log, revisions = zero(basis), [], []
    for number, new in enumerate(TEACHING):
        written = new + (TEACHING[number - 1][:2] if number else ())
        others = [
            WriteRequest(f"other-{place}", zero(basis), examples(50 + 10 * number + place, 4, 9))
            for place in range(companions)
        ]
        result = writer.write([*others[:1], WriteRequest("a", weights, written), *others[1:]])[
            min(1, companions)
        ]
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
    for found, lost in zip(rebuilt, revisions, strict=True):
        assert found.b.keys() == lost.b.keys() and found.a.keys() == lost.a.keys()
        assert all(np.array_equal(found.b[name], lost.b[name]) for name in lost.b)
        assert all(np.array_equal(found.a[name], lost.a[name]) for name in lost.a)
    assert max(float(np.abs(matrix).max()) for matrix in revisions[-1].b.values()) > 1e-3


@pytest.mark.parametrize("config", [SGD, ADAM], ids=lambda config: config.optimizer)
def test_writes_that_were_batched_come_back_up_to_rounding(config: WriteConfig) -> None:
    """Of the SGD write 1e-6 absolute; of Adam's, whose step is lr whatever the gradient's size, 1 % of one step for each of its writes."""
    basis = basis_of(tiny_model())
    log, revisions = lived(writer_of(basis, config), basis, companions=3)
    rebuilt = replay(writer_of(basis, config), "a", basis.id, log, TOLERANCE)
    for number, (found, lost) in enumerate(zip(rebuilt, revisions, strict=True), start=1):
        assert largest_difference(found, dict(lost.b)) <= (
            1e-6 if config is SGD else 0.01 * config.learning_rate * number
        )


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
    with pytest.raises(
        ReplayError,
        match=r"^write 3 of episode a left revision 2 in force, the replay is at 1: an earlier record is missing$",
    ):
        replay(
            writer_of(basis, SGD),
            "a",
            basis.id,
            [replace(EMPTY, revision=0), replace(EMPTY, revision=0), *log[2:]],
            TOLERANCE,
        )
    state = {name: value * 1.05 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    with pytest.raises(
        ReplayError,
        match=r"^write 1 of episode a logged a loss of \S+ before it, its replay has \S+ \(tolerance 0.001\): replay on",
    ):
        replay(BatchedWriter(frozen(model), basis, SGD), "a", basis.id, log, TOLERANCE)
    with pytest.raises(ReplayError, match=r"write 1 of episode a took 6 steps and its replay 2"):
        replay(writer_of(basis, replace(SGD, epochs=1)), "a", basis.id, log, TOLERANCE)
