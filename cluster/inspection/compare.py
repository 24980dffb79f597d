"""What the agent would have said with and without its fast weights, at each place of an episode where it answered under some.

    log of writes --replay: checked against the logged losses--> B of each revision
    tokens before an answer --> greedy under W + BA, and under W alone

The context is the recorded one, to the token: in an episode with several answers the earlier ones stand in it as they were given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actors.text.chat_template import ChatFormat
from actors.types import FastWeights, WriteExample
from cluster.common.errors import CheckpointError
from cluster.inspection.record import EpisodeRecord, Passage, Record, RecordError
from cluster.runs.checkpoint import list_checkpoints, load_checkpoint
from configs.load import load_config
from configs.models import resolve_model
from configs.schema import RunConfig

if TYPE_CHECKING:
    from actors.fast_weights.delta import Basis
    from actors.write.frozen_llama import FrozenLlama


@dataclass(frozen=True, slots=True)
class Compared:
    """One answer of context ``segment`` (from 0): as recorded, and as greedy decoding gives it under the context's revision and under none."""

    segment: int
    said: str
    with_delta: str
    without: str


@dataclass(frozen=True, slots=True)
class _Asked:
    segment: int
    revision: int
    passage: Passage
    example: WriteExample


def compare(record: Record, path: Path, policy: Path | None) -> tuple[Compared, ...]:
    """``path`` is the record's file; ``policy`` a checkpoint to take theta and the basis from. Raises RecordError, CheckpointError, ReplayError."""
    asked = _asked(record, path)
    assert isinstance(record, EpisodeRecord)
    config = _settings(record, path)
    model_path, basis = _theta(record, config, path.parent.parent, policy)

    import torch
    from transformers import AutoTokenizer

    from actors.episodes.recovery import replay
    from actors.write.frozen_llama import read_model
    from actors.write.writer import BatchedWriter

    chat = ChatFormat(AutoTokenizer.from_pretrained(str(model_path)))
    model = read_model(
        str(model_path), config.model.dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    writer = BatchedWriter(model, basis, config.write)
    log = [write.log for write in record.writes]
    revisions = replay(writer, record.episode_id, record.basis_id, log, config.engine.receipt_tolerance)
    return _answers(asked, revisions, basis, chat, model, config.sampling.max_answer_tokens)


def _asked(record: Record, path: Path) -> list[_Asked]:
    """The answers under some fast weights. Raises RecordError where there is none."""
    if not isinstance(record, EpisodeRecord):
        raise RecordError(f"{path}: the episode failed at {record.boundary}: there are no answers to compare")
    found = [
        _Asked(
            number,
            segment.revision,
            passage,
            WriteExample(segment.token_ids[: passage.start], segment.token_ids[passage.start : passage.end]),
        )
        for number, segment in enumerate(record.segments)
        for passage in segment.passages
        if passage.kind == "act" and segment.revision > 0 and 0 < passage.start < passage.end
    ]
    if not found:
        raise RecordError(
            f"{path}: every answer was given without fast weights, so there is nothing to compare"
        )
    return found


def _settings(record: EpisodeRecord, path: Path) -> RunConfig:
    file = path.parent / record.origin.config
    if Path(record.origin.config).name != record.origin.config or not file.is_file():
        raise RecordError(
            f"{path}: its settings {record.origin.config!r} are not beside it; copy them from the run's episodes folder"
        )
    return load_config(file, [])


def _theta(
    record: EpisodeRecord, config: RunConfig, run_dir: Path, policy: Path | None
) -> tuple[Path, Basis]:
    """The weights of the record's policy version, and its basis: from ``policy``, the run's checkpoints, or the base model for version 0."""
    checkpoints = (
        [load_checkpoint(policy)]
        if policy is not None
        else [load_checkpoint(folder) for folder in list_checkpoints(run_dir)]
    )
    fitting = next((one for one in checkpoints if one.state.version == record.policy_version), None)
    if fitting is None and (policy is not None or record.policy_version > 0):
        have = ", ".join(str(one.state.version) for one in checkpoints) or "none"
        cure = "give its checkpoint with --policy FOLDER"
        raise CheckpointError(
            f"the episode was played on policy version {record.policy_version}, there are checkpoints of {have} here: {cure}"
        )
    folders = [run_dir] if fitting is None else [fitting.run_dir, run_dir]
    model = resolve_model(config.model).path if fitting is None else fitting.model
    return model, _basis(record, folders)


def _basis(record: EpisodeRecord, folders: Sequence[Path]) -> Basis:
    from actors.fast_weights.basis import load_basis

    for folder in folders:
        for path in [folder / "basis.safetensors", *sorted((folder / "bases").glob("*.safetensors"))]:
            if path.exists() and (basis := load_basis(path)).id == record.basis_id:
                return basis
    looked = " and ".join(map(str, folders))
    raise RecordError(
        f"no basis {record.basis_id} in {looked}: give the checkpoint that was evaluated with --policy FOLDER"
    )


def _answers(
    asked: Sequence[_Asked],
    revisions: Sequence[FastWeights],
    basis: Basis,
    chat: ChatFormat,
    model: FrozenLlama,
    most: int,
) -> tuple[Compared, ...]:
    from actors.fast_weights.delta import zero
    from cluster.probe.reading import Reader, merged_layers

    reader = Reader(model, chat.stop_token_ids)

    def under(weights: FastWeights, some: Sequence[_Asked]) -> list[str]:
        layers, texts = merged_layers(model, basis, weights), [""] * len(some)
        for block in reader.prepare([one.example for one in some], basis.first_layer, answered=True):
            for place, said in zip(
                block.numbers, reader.answer(block, reader.read(block, layers), layers, most), strict=True
            ):
                texts[place] = chat.decode(said)
        return texts

    compared: list[Compared] = []
    for revision in sorted({one.revision for one in asked}):
        some = [one for one in asked if one.revision == revision]
        if revision > len(revisions):
            raise RecordError(
                f"a context is said to be under revision {revision}, the log has {len(revisions)} writes that were accepted"
            )
        both = zip(some, under(revisions[revision - 1], some), under(zero(basis), some), strict=True)
        compared += [
            Compared(one.segment, one.passage.text, with_delta, without) for one, with_delta, without in both
        ]
    return tuple(sorted(compared, key=lambda one: one.segment))
