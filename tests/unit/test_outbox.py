"""The outbox between the tracker and MLflow: order, what a killed driver leaves, a full disk."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.tracking import outbox
from cluster.tracking.outbox import Entity, Outbox, Point, Record, Status

END = Status("FAILED", 5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "mlflow-1.sqlite"


def point(step: int) -> Point:
    return Point("reward/mean", step / 10, 1000 + step, step)


def points(first: int, last: int) -> list[Record]:
    return [point(step) for step in range(first, last + 1)]


def taken(box: Outbox) -> list[Record]:
    """Take everything, in order."""
    records: list[Record] = []
    while batch := box.oldest():
        records += batch
        box.taken()
        assert len(records) < 1e5, "the same records come again and again"
    return records


def test_batches_keep_the_order_and_points_go_together(path: Path) -> None:
    box = Outbox(path)
    data, files = Entity("dataset", {"name": "talks"}), [Entity("artifact", {"name": name}) for name in "ab"]
    box.append([data, *points(1, 1002), *files])
    box.append([point(2000), END])
    assert len(box) == 1007
    assert box.oldest() == (data,)
    box.taken()
    assert box.oldest() == tuple(points(1, 1000))  # as many as MLflow takes in a call
    assert len(box) == 1006
    box.taken()
    batches = []
    while batch := box.oldest():
        batches.append(batch)
        box.taken()
    assert batches == [tuple(points(1001, 1002)), (files[0],), (files[1],), (point(2000),), (END,)]
    box.close()
    assert list(path.parent.iterdir()) == []


def test_the_file_does_not_grow_with_the_run(path: Path) -> None:
    box = Outbox(path)
    for step in range(500):
        box.append(points(step, step + 99))
        assert len(box.oldest()) == 100
        box.taken()
    assert path.stat().st_size < 1e5  # 50,000 records went through it


def test_the_same_records_wait_after_a_close(path: Path) -> None:
    box = Outbox(path)
    records: list[Record] = [
        Entity("dataset", {"name": "talks"}),
        Point("loss", float("inf"), 1, 2),
        Entity("model", {"name": "m"}),
    ]
    box.append(records)
    box.close()
    box.append([point(1)])  # a thread that has not noticed
    assert box.oldest() == ()
    assert taken(Outbox(path)) == records


KILLED = """
import os, signal, sys
from pathlib import Path
from cluster.tracking.outbox import Outbox, Point, Status
box = Outbox(Path(sys.argv[1]))
for step in range(1, 6):
    box.append([Point("reward/mean", step / 10, 1000 + step, step)])
    if step == 2:
        box.oldest()
box.taken()
box.append([Status("KILLED", 5)])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_driver_leaves_all_but_its_status(path: Path) -> None:
    """The process that opens the file goes on with the run: the status would come too late."""
    settings = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=settings, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    box = Outbox(path)
    assert len(box) == 3
    box.append([point(6)])
    assert taken(box) == points(3, 6)
    assert len(box) == 0


@pytest.mark.parametrize("content", [b"", b"garbage", b"SQLite format 3\x00" + b"x" * 9000])
def test_a_damaged_file_is_set_aside(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    box = Outbox(path)
    box.append([point(1)])
    assert taken(box) == [point(1)]
    if content:
        assert path.with_suffix(".damaged").read_bytes() == content
        assert f"warning: {path} is damaged" in caplog.text


@contextmanager
def full_disk(at: int) -> Iterator[None]:
    """No file of this process may grow beyond ``at`` bytes: the kernel writes what fits, then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def in_file(path: Path) -> list[Record]:
    """What a process would find that opens the file after a crash of this one."""
    copy = path.with_name("copy.sqlite")
    for suffix in ("", "-wal"):
        copy.with_name(f"{copy.name}{suffix}").write_bytes(
            path.with_name(f"{path.name}{suffix}").read_bytes()
        )
    box = Outbox(copy)
    records = taken(box)
    box.close()
    return records


def test_a_full_disk_keeps_the_order_and_loses_nothing(path: Path) -> None:
    box = Outbox(path)
    box.append(points(1, 3))
    size = path.with_name(f"{path.name}-wal").stat().st_size
    with full_disk(at=size + 5000):  # room for a record or two
        for step in range(4, 9):
            box.append([point(step)])
        kept = in_file(path)
        assert 3 <= len(kept) < 8 and kept == points(1, len(kept))
        assert box.oldest() == tuple(points(1, 8))
        box.append(points(9, 12))
        box.taken()
        assert len(box) == 4
    box.append([point(13)])
    assert in_file(path) == [*kept, *points(9, 13)]  # there is room again for all that memory held
    assert taken(box) == points(9, 13)
    assert (box.lost, len(box), in_file(path)) == (0, 0, [])


def test_memory_is_bounded_and_the_status_is_never_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_MOST_IN_MEMORY", 2000)
    box = Outbox(path)
    with full_disk(at=40):
        box.append(points(1, 2100))
        box.append([END])
        assert (box.lost, len(box)) == (100, 2001)
        assert taken(box) == [*points(1, 2000), END]
