"""The file between the tracker and its store: order, what a killed driver leaves, a full disk."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.tracking.outbox import Batch, Record, Spool


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "mlflow-1.jsonl"


def point(step: int) -> Record:
    return {
        "kind": "metrics",
        "time": 1000 + step,
        "step": step,
        "metrics": {"reward/mean": step / 10, "learner/loss": 1.0},
    }


def oldest(spool: Spool, most: int = 1000) -> Batch:
    batch = spool.oldest(most)
    assert batch is not None
    return batch


def taken(spool: Spool) -> list[Record]:
    """Everything, in order."""
    records: list[Record] = []
    while (batch := spool.oldest(1000)) is not None:
        records += batch.records
        spool.taken(batch)
    return records


def test_batches_keep_the_order_and_hold_one_kind(path: Path) -> None:
    spool = Spool(path)
    records: list[Record] = [
        point(1),
        point(2),
        point(3),
        {"kind": "artifact", "path": "a"},
        {"kind": "artifact", "path": "b"},
        point(4),
    ]
    for record in records:
        spool.append(record)
    sizes = []
    rest = list(records)
    while (batch := spool.oldest(4)) is not None:
        sizes.append(len(batch.records))
        assert list(batch.records) == rest[: len(batch.records)]
        rest = rest[len(batch.records) :]
        assert not batch.doubtful
        spool.taken(batch)
        assert len(spool) == len(rest)
    assert sizes == [2, 1, 1, 1, 1]  # 4 metrics in a call; an artifact alone
    assert path.stat().st_size == 32  # it does not grow with the run
    spool.close()
    assert not path.exists()


def test_what_a_killed_driver_left_comes_first_and_is_in_doubt(path: Path) -> None:
    killed = Spool(path)
    for step in range(1, 6):
        killed.append(point(step))
    killed.taken(oldest(killed, most=4))  # steps 1 and 2; the process ends here, without close()
    with path.open("ab") as file:
        file.write(b'{"kind":"metrics","time":1,"st')
    spool = Spool(path)
    assert len(spool) == 3
    spool.append(point(6))
    batch = oldest(spool)
    assert [record["step"] for record in batch.records] == [3, 4, 5, 6]
    assert batch.doubtful
    spool.taken(batch)
    spool.append(point(7))
    assert not oldest(spool).doubtful
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_only_what_was_attempted_is_in_doubt(path: Path) -> None:
    spool = Spool(path)
    for step in range(1, 5):
        spool.append(point(step))
    spool.attempted(oldest(spool, most=4))
    doubts = []
    while (batch := spool.oldest(2)) is not None:
        doubts.append(batch.doubtful)
        spool.taken(batch)
    assert doubts == [True, True, False, False]


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"garbage\n",
        b'{"sent": "x"}\n',
        b'{"sent": 99999                }\n',
        b'{"sent": -1                   }\n',
    ],
)
def test_a_damaged_file_is_never_a_crash(path: Path, header: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(
        header.ljust(32) + b'not json\n[1]\n{"kind":"metrics"}\n{"kind":"strange"}\n' if header else b""
    )
    spool = Spool(path)
    spool.append(point(1))
    assert taken(spool)[-1] == point(1)
    assert spool.oldest(1000) is None


@contextmanager
def full_disk(at: int) -> Iterator[None]:
    """No file of this process may grow beyond ``at`` bytes: the kernel writes what fits and then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_order_and_leaves_no_half_line(path: Path) -> None:
    spool = Spool(path)
    with full_disk(at=300):
        for step in range(1, 9):
            spool.append(point(step))
        assert path.stat().st_size < 300
        assert len(spool) == 8
        in_file = oldest(spool)
        assert 0 < len(in_file.records) < 8
        spool.taken(in_file)
        in_memory = oldest(spool)
        assert len(in_file.records) + len(in_memory.records) == 8
    spool.append(point(9))  # there is room again: what memory held goes to the file while the sender is at it
    assert len(path.read_text().splitlines()) == 1 + len(in_memory.records) + 1
    spool.taken(in_memory)
    assert taken(spool) == [point(9)]
    assert spool.lost == 0


def test_memory_is_bounded_and_the_end_of_the_run_is_never_lost(path: Path) -> None:
    spool = Spool(path)
    end: Record = {"kind": "status", "status": "FAILED", "time": 5}
    with full_disk(at=40):
        for step in range(2100):
            spool.append(point(step))
        spool.append(end)
        assert spool.lost == 100
        assert len(spool) == 2001
        assert taken(spool) == [*(point(step) for step in range(2000)), end]
