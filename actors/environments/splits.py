"""What all environments that read a file share: which of its parts are held out, and in which order its tasks come."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence

from actors.environments.base import Split


def held_out(ids: Sequence[str], fraction: float) -> set[str]:
    """The same ids in every process and for every order of the file; at least one on either side where there are two."""
    ranked = sorted(set(ids), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return set(ranked[: min(len(ranked) - 1, max(1, round(len(ranked) * fraction)))])


def passes(name: str, size: int, split: Split, seed: int, start: int) -> Iterator[tuple[int, int]]:
    """(position, place among ``size`` tasks) from position ``start`` on: endless for train, in a new order every pass; one pass for eval."""
    positions = itertools.count(start) if split == "train" else range(start, size)
    order: list[int] = []
    ordered_pass = -1
    for position in positions:
        if position // size != ordered_pass:
            ordered_pass, order = position // size, list(range(size))
            random.Random(f"{name}/{split}/{seed}/{ordered_pass}").shuffle(order)
        yield position, order[position % size]


def task_seed(split: Split, seed: int, position: int) -> int:
    return random.Random(f"task/{split}/{seed}/{position}").getrandbits(31)
