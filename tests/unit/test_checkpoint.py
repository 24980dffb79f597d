"""Checkpoints on disk: kept by count and by score; whole or absent, whatever happens during writing."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest

from actors.fast_weights.delta import Basis
from cluster.common.errors import CheckpointError, SaveError
from cluster.fleet.ledger import Ledger, LedgerSnapshot
from cluster.runs.checkpoint import (
    START,
    Checkpoint,
    TrainState,
    best_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    prune,
    save_checkpoint,
    score_checkpoint,
    score_of,
)
from cluster.train.prepare import KEPT, check_unchanged, require_same_meaning
from configs.load import ConfigError, load_config, to_yaml
from configs.schema import RunConfig
from learner.learner import Learner
from tests.unit.learner_cases import free, group, learner, write_model

QUICKSTART = Path("tests/quickstart.yaml")


def save(
    run_dir: Path, step: int, keep: int = 2, content: str = "theta", in_use: tuple[Path, ...] = ()
) -> None:
    async def write(target: Path) -> None:
        target.mkdir()
        (target / "theta").write_text(content)

    asyncio.run(save_checkpoint(run_dir, replace(START, step=step), "name: test\n", write, keep, in_use))


def names(run_dir: Path) -> list[str]:
    return [path.name for path in list_checkpoints(run_dir)]


def hidden(run_dir: Path) -> list[str]:
    return [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_checkpoint_gives_back_the_whole_state(tmp_path: Path) -> None:
    """Each field has a value of its own, so that none can be left out, or take another's place."""
    ledger = LedgerSnapshot(
        9, (3, 5), {"trained": 4, "stale": 1}, {"engine": 2}, 6, {"continued": 7}, {"a": 2}
    )
    state = TrainState(11, 12, 13, ledger, "run", (0.25, 1.0))
    defaults = LedgerSnapshot()
    assert all(getattr(ledger, item.name) != getattr(defaults, item.name) for item in fields(ledger))

    async def write(target: Path) -> None:
        target.mkdir()

    folder = asyncio.run(save_checkpoint(tmp_path, state, "name: test\n", write, 2)).folder
    assert load_checkpoint(folder).state == state
    assert Ledger(load_checkpoint(folder).state.ledger).snapshot() == ledger


def test_the_best_is_kept_besides_the_newest(tmp_path: Path) -> None:
    scores = {1: 0.1, 2: 0.4, 3: 0.4, 4: 0.2, 5: 0.3}
    best = []
    for step, score in scores.items():
        save(tmp_path, step)
        best.append(score_checkpoint(tmp_path, step, "f1", score, tasks=16, keep=2))
    assert best == [True, True, False, False, False]  # of equal scores the earlier checkpoint stays the best
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005"]
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000002"
    save(tmp_path, 6)
    assert score_of(tmp_path / "checkpoints" / "step-000006") is None
    score_checkpoint(tmp_path, 6, "reward", 0.9, tasks=16, keep=2)
    assert names(tmp_path) == ["step-000005", "step-000006"]  # the old best is not kept any longer
    copy = shutil.copytree(tmp_path / "checkpoints", tmp_path / "elsewhere" / "checkpoints").parent
    assert best_checkpoint(copy) == copy / "checkpoints" / "step-000006"  # the scores go with a copy
    assert hidden(tmp_path) == []


def test_a_score_of_another_kind_is_not_the_best(tmp_path: Path) -> None:
    """Of a mix, F1 is what is left where the environment without answers failed."""
    for step, (kind, score) in enumerate((("reward", 0.35), ("f1", 0.6), ("reward", 0.55)), start=1):
        save(tmp_path, step)
        score_checkpoint(tmp_path, step, kind, score, tasks=16, keep=9)
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000003"


def test_without_an_evaluation_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-000002", "step-000003"] and best_checkpoint(tmp_path) is None


def test_a_run_resumed_from_an_earlier_step_keeps_what_it_writes(tmp_path: Path) -> None:
    """The newest is what was written last, not the highest step."""
    for step in (2, 4, 6):
        save(tmp_path, step, keep=3)
    save(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step-000006", "step-000003"]
    found = newest_whole(tmp_path)
    assert found is not None and found.state.step == 3
    save(tmp_path, 6, keep=2, content="anew")
    assert names(tmp_path) == ["step-000003", "step-000006"]
    assert (tmp_path / "checkpoints" / "step-000006" / "learner" / "theta").read_text() == "anew"


def test_a_death_while_a_checkpoint_is_replaced_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    save(run, 6, content="first")
    rename = Path.rename

    def die(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        save(run, 6, content="second")
    monkeypatch.undo()
    assert names(run) == ["step-000006"]  # stopped between the two renames, it has its name again
    found = newest_whole(run)
    assert found is not None and (found.learner / "theta").read_text() == "first"
    save(run, 6, content="third")
    assert (found.learner / "theta").read_text() == "third" and hidden(run) == []


@pytest.mark.parametrize("content", ["", "[1]", '{"f1": "good"}', '{"f1": NaN}', "{"])
def test_a_damaged_score_is_no_score(tmp_path: Path, content: str) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-000001" / "evaluation.json").write_text(content)
    assert best_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "checkpoints" / "step-000001").state.step == 1


def test_evaluations_are_at_checkpoints() -> None:
    with pytest.raises(
        ConfigError,
        match=r"evaluate_every=3 is not allowed: it must be 0 or a multiple of train.checkpoint_every=2",
    ):
        load_config(QUICKSTART, ["train.evaluate_every=3", "train.checkpoint_every=2"])


# --- a full disk -------------------------------------------------------------------------------------------


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``size`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Learner:
    folder = tmp_path_factory.mktemp("model")
    basis: Basis = write_model(folder)
    made = learner(folder, basis, free())
    made.step([group(basis, (1.0, 0.0, 0.25))])
    return made


@pytest.mark.parametrize("room", [200, 4096, 300_000], ids=["nothing", "no tensor", "theta but no more"])
@pytest.mark.filterwarnings("ignore")
def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoint_whole(
    trained: Learner, tmp_path: Path, room: int
) -> None:
    async def write(target: Path) -> None:
        trained.save(target)

    asyncio.run(save_checkpoint(tmp_path, replace(START, step=1), "name: test\n", write, 2))
    whole = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    sizes = sorted(len(content) for path, content in whole.items() if path.suffix == ".safetensors")
    assert sizes[0] > room
    with files_up_to(room), pytest.raises(SaveError) as raised:
        asyncio.run(save_checkpoint(tmp_path, replace(START, step=2), "name: test\n", write, 2))
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"step 2 could not be saved in {tmp_path / 'checkpoints'} (")
    assert "File too large" in message and message.endswith("; earlier checkpoints are whole")
    assert names(tmp_path) == ["step-000001"] and hidden(tmp_path) == []
    assert all(path.read_bytes() == content for path, content in whole.items())
    trained.load(load_checkpoint(tmp_path / "checkpoints" / "step-000001").learner)
    asyncio.run(
        save_checkpoint(tmp_path, replace(START, step=2), "name: test\n", write, 2)
    )  # there is room again
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_score_that_cannot_be_written_leaves_the_checkpoint_whole(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with (
        files_up_to(4),
        pytest.raises(SaveError, match=r"^the evaluation of step 1 could not be saved in .*File too large"),
    ):
        score_checkpoint(tmp_path, 1, "f1", 0.5, tasks=16, keep=2)
    folder = tmp_path / "checkpoints" / "step-000001"
    assert score_of(folder) is None and load_checkpoint(folder).state.step == 1
    assert sorted(path.name for path in folder.iterdir()) == [
        "SHA256SUMS",
        "config.yaml",
        "learner",
        "state.json",
    ]


def test_the_clock_has_no_say_in_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set back by an hour after each save, file times too: what was written last stays the newest."""
    now = time.time()
    for step in (1, 2, 3, 4):
        monkeypatch.setattr(time, "time", lambda step=step: now - 3600 * step)
        save(tmp_path, step)
        os.utime(tmp_path / "checkpoints" / f"step-{step:06d}", (now - 3600 * step,) * 2)
    assert names(tmp_path) == ["step-000003", "step-000004"]
    save(tmp_path, 2)  # resumed from an earlier step: the next generation
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_what_is_resumed_from_is_kept_until_the_run_ends(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1)
    resumed = tmp_path / "checkpoints" / "step-000001"
    for step in (2, 3, 4):
        save(tmp_path, step, keep=1, in_use=(resumed,))
        score_checkpoint(tmp_path, step, "f1", 0.1, tasks=1, keep=1, in_use=(resumed,))
        assert resumed.exists()
    prune(tmp_path, 1)
    assert names(tmp_path) == ["step-000002", "step-000004"]  # the best, and the newest


def test_a_damaged_checkpoint_does_not_push_a_whole_one_out(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-000002" / "state.json").write_text("{")
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-000001", "step-000003"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-000002", "step-000003"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "step-000001 cannot be deleted (Permission denied)" in line and "\n" not in line
    monkeypatch.undo()
    save(tmp_path, 4)
    assert hidden(tmp_path) == []  # another try at the next save


@pytest.mark.parametrize(
    "changed",
    [
        "seed=1",
        "environment.recall.sessions=5",
        "evaluation.temperature=0.7",
        "memory.max_context_tokens=99",
        "write.epochs=3",
        "sampling.max_answer_tokens=2",
    ],
)
def test_what_gives_a_checkpoint_its_meaning_may_not_change(tmp_path: Path, changed: str) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig()), encoding="utf-8")
    other, (key, _, value) = load_config(tmp_path / "config.yaml", [changed]), changed.partition("=")
    reason = rf"was made with {key}=\S+, not {value}: use that value, or start anew"
    with pytest.raises(CheckpointError, match=reason):
        check_unchanged(other, Checkpoint(tmp_path, START), KEPT)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (["learner.trainable=lora"], ["learner.lora_rank=8"], "learner.lora_rank=16, not 8"),
        (["learner.trainable=lora"], ["learner.trainable=full"], "learner.trainable=lora, not full"),
        ([], ["learner.trainable=lora"], "learner.trainable=full, not lora"),
    ],
)
def test_the_shape_of_a_lora_may_not_change(
    tmp_path: Path, before: list[str], now: list[str], said: str
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(None, before)), encoding="utf-8")
    with pytest.raises(CheckpointError, match=said):
        require_same_meaning(load_config(tmp_path / "config.yaml", now), Checkpoint(tmp_path, START))


def test_what_only_costs_may_change(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig()), encoding="utf-8")
    other = load_config(tmp_path / "config.yaml", ["evaluation.tasks=7", "learner.lora_rank=9"])
    require_same_meaning(other, Checkpoint(tmp_path, START))
