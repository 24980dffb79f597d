"""The fleet's pure parts: states of workers, the ledger, the choice of a lane, the wanted number."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.fleet.contract import Lane, Openings, may_issue
from cluster.fleet.ledger import Ledger, LedgerSnapshot
from cluster.fleet.state import ALIVE, FleetState
from cluster.runs.run_lock import held
from cluster.runs.wanted_workers import (
    ScaleError,
    WantedWorkers,
    ask_for,
    forget_wanted,
    newest_run,
    read_wanted,
    scheduled,
)
from tests.unit.cluster_cases import ScriptedWorker


def fleet(target: int, healthy: int = 0) -> FleetState:
    state = FleetState(target)
    for _ in range(healthy):
        serve(state, state.next_name(), 0)
    return state


def serve(state: FleetState, name: str, version: int) -> None:
    if name not in state.members:
        state.launch(name)
    state.ready(name)
    state.refreshed(name, version)


def test_a_worker_serves_only_after_it_holds_the_weights() -> None:
    state = fleet(1)
    state.launch("worker-0")
    with pytest.raises(ValueError, match="starting and cannot become healthy"):
        state.refreshed("worker-0", 3)
    state.ready("worker-0")
    assert state.members["worker-0"].state == "refreshing" and state.members["worker-0"].version is None
    state.refreshed("worker-0", 3)
    assert state.members["worker-0"].version == 3
    with pytest.raises(ValueError, match="go back from version 3 to 2"):
        state.refreshed("worker-0", 2)


def test_a_lost_worker_is_replaced_under_a_new_name() -> None:
    state = fleet(2, healthy=2)
    assert state.plan().launch == 0
    assert state.lose("worker-1", "died") and not state.lose("worker-1", "died again")
    assert state.plan().launch == 1 and state.next_name() == "worker-2"
    state.launch("worker-2")
    assert state.plan().launch == 0 and (state.lost, state.replaced) == (1, 1)
    with pytest.raises(ValueError, match="used before"):
        state.launch("worker-1")
    assert state.reasons() == ["worker-1: died"]


def test_one_missed_check_makes_a_worker_suspect_and_the_second_in_a_row_loses_it() -> None:
    state = fleet(1, healthy=1)
    assert not state.missed("worker-0") and state.members["worker-0"].state == "suspect"
    state.answered("worker-0")
    assert not state.missed("worker-0")
    assert state.missed("worker-0")


def test_the_newest_are_drained_when_fewer_are_wanted_and_that_is_no_loss() -> None:
    state = fleet(3, healthy=3)
    state.target = 1
    assert state.plan().drain == ("worker-2", "worker-1")
    for name in state.plan().drain:
        state.drain(name)
    assert state.plan().drain == () and state.plan().launch == 0
    state.lose("worker-2", "no longer wanted")
    assert state.lost == 0 and state.counts()["healthy"] == 1


def test_deaths_without_a_group_in_between_are_hopeless() -> None:
    state = fleet(1)
    for number in range(4):
        assert not state.hopeless
        serve(state, f"worker-{number}", 0)
        state.lose(f"worker-{number}", "out of memory")
    assert state.hopeless
    state.progress()
    assert not state.hopeless


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_whatever_happens_the_plan_leads_to_the_target(seed: int) -> None:
    """Random deaths, misses, weights and targets: the plan leads to the wanted number of current workers."""
    rng = random.Random(seed)
    state, version = fleet(rng.randint(1, 4)), 0
    for _ in range(60):
        alive = [name for name, member in state.members.items() if member.state in ALIVE]
        event = rng.choice(["lose", "miss", "answer", "weights", "target", "plan", "plan"])
        if event == "target":
            state.target = rng.randint(1, 5)
        elif event == "weights":
            version += 1
        elif event == "plan":
            _follow(state, version)
        elif alive:
            name = rng.choice(alive)
            if event == "lose" or (event == "miss" and state.missed(name)):
                state.lose(name, "lost")
            elif event == "answer":
                state.answered(name)
    _follow(state, version)
    _follow(state, version)
    serving = [member for member in state.members.values() if member.state in ("healthy", "suspect")]
    assert len(serving) == state.target and {member.version for member in serving} == {version}
    assert state.replaced <= state.lost


def _follow(state: FleetState, version: int) -> None:
    change = state.plan()
    for _ in range(change.launch):
        state.launch(state.next_name())
    for name in change.drain:
        state.drain(name)
    for name, member in list(state.members.items()):
        if member.state == "draining":
            state.lose(name, "no longer wanted")
        elif member.state == "starting":
            serve(state, name, version)
        elif member.state in ("healthy", "suspect") and member.version != version:
            state.refresh(name)
            state.refreshed(name, version)


# --- stream, ledger, lanes, wanted workers ---------------------------------------------------------------


def test_a_resumed_ledger_issues_pending_positions_first() -> None:
    first = Ledger(LedgerSnapshot())
    positions = [first.issue() for _ in range(5)]
    first.settle(positions[0], "trained")
    first.settle(positions[2], "failed")
    first.count_failures(["engine", "engine"])
    second = Ledger(first.snapshot())
    assert [second.issue() for _ in range(4)] == [1, 3, 4, 5]
    assert second.issued == 6
    assert second.balanced
    assert second.failures["engine"] == 2


def test_settling_a_task_twice_is_an_error() -> None:
    ledger = Ledger(LedgerSnapshot())
    position = ledger.issue()
    ledger.settle(position, "trained")
    with pytest.raises(KeyError):
        ledger.settle(position, "stale")


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), credits=st.integers(1, 3))
def test_the_chosen_lane_is_the_least_loaded_of_those_that_a_plain_search_finds(
    seed: int, credits: int
) -> None:
    rng = random.Random(seed)
    openings = Openings(credits)
    lanes = [Lane(ScriptedWorker(f"w{number}"), 0, asyncio.Event()) for number in range(5)]
    for lane in lanes:
        openings.add(lane)
    for _ in range(60):
        lane = rng.choice(lanes)
        openings.remove(lane)
        lane.outstanding = rng.randint(0, credits)
        lane.version = rng.randint(0, 3)
        lane.admitting = rng.random() < 0.8
        openings.add(lane)
        oldest = rng.randint(0, 4)
        chosen = openings.least_loaded(lambda version, oldest=oldest: version >= oldest)  # type: ignore[misc]
        usable = [
            lane for lane in lanes if lane.admitting and lane.outstanding < credits and lane.version >= oldest
        ]
        assert (chosen is None) == (not usable)
        if chosen is not None:
            assert chosen in usable and chosen.outstanding == min(lane.outstanding for lane in usable)


def test_the_number_of_workers_follows_config_schedule_and_person(tmp_path: Path) -> None:
    assert [scheduled(2, ("10:4", "5:3"), step) for step in (0, 5, 9, 10, 50)] == [2, 3, 3, 4, 4]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: x\n")
    wanted = WantedWorkers(2, ("10:4",), tmp_path / "run")
    assert wanted() == 2
    wanted.step = 10
    assert wanted() == 4
    with held(tmp_path / "run"):
        ask_for(newest_run(tmp_path), 7)
    assert wanted() == read_wanted(tmp_path / "run") == 7
    forget_wanted(tmp_path / "run")  # the next life begins with its settings
    assert wanted() == 4
    for damaged in ("{", "[]", '{"workers": 0}', '{"workers": true}', '{"workers": "7"}'):
        (tmp_path / "run" / "workers.json").write_text(damaged)
        assert wanted() == 4, damaged


def test_a_file_that_a_run_renames_meanwhile_hides_no_run(tmp_path: Path) -> None:
    for name in ("older", "newer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
        (tmp_path / name / ".state.partial").symlink_to("gone")  # listed, and not there to look at
    os.utime(tmp_path / "older" / "config.yaml", ns=(0, 0))
    assert newest_run(tmp_path) == tmp_path / "newer"


def test_asking_for_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ScaleError, match="is no run folder"):
        ask_for(tmp_path, 2)
    with pytest.raises(ScaleError, match="0 workers is not allowed"):
        ask_for(tmp_path, 0)
    with pytest.raises(ScaleError, match="holds no run: name the run's folder"):
        newest_run(tmp_path)


@pytest.mark.parametrize(
    ("learner", "worker", "outstanding", "max_staleness", "expected"),
    [
        (0, 0, 0, 0, True),
        (0, 0, 1, 0, True),
        (0, 0, 2, 0, False),  # the batch is full: the next group would be consumed one version later
        (1, 0, 0, 0, False),  # the learner is computing version 1, the worker still serves 0
        (1, 0, 0, 1, True),
        (1, 0, 2, 1, False),
        (1, 1, 2, 1, True),
        (5, 2, 0, 2, False),
    ],
)
def test_issues_only_what_will_be_fresh(
    learner: int, worker: int, outstanding: int, max_staleness: int, expected: bool
) -> None:
    assert may_issue(learner, worker, outstanding, 2, max_staleness) is expected
