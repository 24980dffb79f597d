"""What the shipped environments share: held-out ids, the order of tasks, sessions that read and then ask."""

from __future__ import annotations

import itertools

import pytest

from actors.environments.base import Observation, ReadThenAsk, held_out, passes, task_seed

IDS = [f"id-{number}" for number in range(10)]


def test_the_held_out_ids_are_the_same_for_every_order_and_in_every_version() -> None:
    assert held_out(IDS, 0.3) == held_out([*reversed(IDS), *IDS], 0.3) == PINNED


PINNED = {"id-4", "id-8", "id-9"}  # a change would move a benchmark's questions from eval to train


@pytest.mark.parametrize(("fraction", "count"), [(0.001, 1), (0.5, 5), (0.999, 9)])
def test_each_split_gets_an_id(fraction: float, count: int) -> None:
    assert len(held_out(IDS, fraction)) == count


def test_train_passes_go_over_all_tasks_each_in_a_new_order() -> None:
    places = list(itertools.islice(passes("search", 10, "train", 0, 0), 30))
    assert [position for position, _ in places] == list(range(30))
    orders = [tuple(place for _, place in places[start : start + 10]) for start in (0, 10, 20)]
    assert len(set(orders)) == 3 and all(sorted(order) == list(range(10)) for order in orders)
    assert list(itertools.islice(passes("search", 10, "train", 0, 13), 17)) == places[13:]


def test_eval_is_one_pass_and_depends_on_seed_and_environment() -> None:
    orders = [tuple(passes(name, 10, "eval", seed, 0)) for name, seed in (("a", 0), ("a", 1), ("b", 0))]
    assert len(set(orders)) == 3 and all(len(order) == 10 for order in orders)
    assert tuple(passes("a", 10, "eval", 0, 4)) == orders[0][4:]


def test_a_task_seed_depends_on_split_seed_and_position() -> None:
    seeds = {
        task_seed("train", 0, 0),
        task_seed("eval", 0, 0),
        task_seed("train", 1, 0),
        task_seed("train", 0, 1),
    }
    assert len(seeds) == 4 and task_seed("train", 0, 0) == task_seed("train", 0, 0)


def test_a_session_reads_then_asks_and_a_missing_answer_is_empty() -> None:
    session = ReadThenAsk(["one", "two"], ["Who?", "Where?"])
    assert session.question == "Who? Where?"
    assert [session.observe() for _ in range(3)] == [
        Observation("one", wants_action=False),
        Observation("two", wants_action=False),
        Observation("Who?", wants_action=True, tells=False),
    ]
    session.act(" Ida \n")
    assert session.answers == ["Ida", ""]
    assert session.observe() == Observation("Where?", wants_action=True, tells=False)
    assert session.observe() is None and session.observe() is None
