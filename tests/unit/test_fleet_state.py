"""The fleet's states: which worker may serve, is replaced, or goes first when fewer are wanted."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.fleet.state import ALIVE, FleetState


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
