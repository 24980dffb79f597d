"""Answers of an episode once more, with its fast weights and without: what did the writes change?

    log of writes --replay, checked against the logged losses--> B of each revision
    tokens before an answer --> greedy under W + BA, and greedy under W alone

The context is the recorded one, to the token. In an episode with several answers the earlier ones stand in it
as they were given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actors.text.chat_template import ChatFormat, open_chat
from actors.types import FastWeights, WriteExample
from cluster.common.errors import CheckpointError
from cluster.inspection.record import EpisodeRecord, Passage, Record, RecordError
from cluster.runs.checkpoint import list_checkpoints, load_checkpoint
from configs.load import load_config
from configs.models import resolve_model
from configs.schema import RunConfig
from configs.tolerances import receipt_tolerance

if TYPE_CHECKING:
    from actors.fast_weights.delta import Basis
    from actors.write.frozen_llama import FrozenLlama


@dataclass(frozen=True, slots=True)
class Compared:
    """An answer in segment number ``segment``: as recorded, greedily under its revision, and under none."""

    segment: int
    said: str
    with_delta: str
    without: str


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer that was given under fast weights. ``example``: the tokens before it, and its own."""

    segment: int
    revision: int
    passage: Passage
    example: WriteExample


def compare(record: Record, path: Path, policy: Path | None) -> tuple[Compared, ...]:
    """Answer again. ``path``: the record's file. ``policy``: a checkpoint to take theta and the basis from.

    Raises RecordError, CheckpointError and ReplayError.
    """
    if not isinstance(record, EpisodeRecord):
        raise RecordError(f"{path}: the episode failed at {record.boundary}: there are no answers to compare")
    answers = _answers(record, path)
    config = _settings(record, path)
    model_path, basis = _theta(record, config, path.parent.parent, policy)

    import torch

    from actors.episodes.recovery import replay
    from actors.write.frozen_llama import read_model
    from actors.write.writer import BatchedWriter

    chat = open_chat(model_path, config.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = read_model(str(model_path), config.model.dtype, device)
    writer = BatchedWriter(model, basis, config.write)
    log = [write.log for write in record.writes]
    revisions = replay(
        writer, record.episode_id, record.basis_id, log, receipt_tolerance(config.engine, config.model)
    )
    return _answered_again(answers, revisions, basis, chat, model, config.sampling.max_answer_tokens)


def _answers(record: EpisodeRecord, path: Path) -> list[_Answer]:
    """List the answers under fast weights. Raises RecordError if there are none."""
    answers = []
    for number, segment in enumerate(record.segments):
        for passage in segment.passages:
            if passage.kind == "act" and segment.revision > 0 and 0 < passage.start < passage.end:
                before = segment.token_ids[: passage.start]
                example = WriteExample(before, segment.token_ids[passage.start : passage.end])
                answers.append(_Answer(number, segment.revision, passage, example))
    if not answers:
        raise RecordError(f"{path}: every answer was given without fast weights: there is nothing to compare")
    latest = max(answer.revision for answer in answers)
    accepted = sum(write.log.outcome == "accepted" for write in record.writes)
    if latest > accepted:
        raise RecordError(f"{path}: a context is under revision {latest}, {accepted} writes were accepted")
    return answers


def _settings(record: EpisodeRecord, path: Path) -> RunConfig:
    name = record.origin.config
    file = path.parent / name
    if Path(name).name != name or not file.is_file():
        raise RecordError(
            f"{path}: its settings {name!r} are not beside it; copy them from the run's episodes folder"
        )
    return load_config(file, [])


def _theta(
    record: EpisodeRecord, config: RunConfig, run_dir: Path, policy: Path | None
) -> tuple[Path, Basis]:
    """Find the weights of the record's policy version, and its basis.

    They come from ``policy``, else from the run's checkpoints, else (version 0) from the base model.
    """
    folders = list_checkpoints(run_dir) if policy is None else [policy]
    checkpoints = [load_checkpoint(folder) for folder in folders]
    for checkpoint in checkpoints:
        if checkpoint.state.version == record.policy_version:
            return checkpoint.model, _basis(record, [checkpoint.run_dir, run_dir])
    if policy is None and record.policy_version == 0:
        return resolve_model(config.model).path, _basis(record, [run_dir])
    versions = ", ".join(str(checkpoint.state.version) for checkpoint in checkpoints) or "none"
    raise CheckpointError(
        f"the episode was played on policy version {record.policy_version}, "
        f"there are checkpoints of {versions} here: give its checkpoint with --policy FOLDER"
    )


def _basis(record: EpisodeRecord, folders: Sequence[Path]) -> Basis:
    from actors.fast_weights.basis import load_basis

    for folder in folders:
        for path in [folder / "basis.safetensors", *sorted((folder / "bases").glob("*.safetensors"))]:
            if path.exists() and (basis := load_basis(path)).id == record.basis_id:
                return basis
    places = " and ".join(map(str, folders))
    raise RecordError(
        f"no basis {record.basis_id} in {places}: give the checkpoint that was evaluated with --policy FOLDER"
    )


def _answered_again(
    answers: Sequence[_Answer],
    revisions: Sequence[FastWeights],
    basis: Basis,
    chat: ChatFormat,
    model: FrozenLlama,
    max_tokens: int,
) -> tuple[Compared, ...]:
    from actors.fast_weights.delta import zero
    from cluster.probe.reading import Reader, merged_layers

    reader = Reader(model, chat.stop_token_ids)

    def under(weights: FastWeights, asked: Sequence[_Answer]) -> list[str]:
        layers, texts = merged_layers(model, basis, weights), [""] * len(asked)
        examples = [answer.example for answer in asked]
        for block in reader.prepare(examples, basis.first_layer, answered=True):
            replies = reader.answer(block, reader.read(block, layers), layers, max_tokens)
            for place, reply in zip(block.numbers, replies, strict=True):
                texts[place] = chat.said(reply)
        return texts

    compared: list[Compared] = []
    for revision in sorted({answer.revision for answer in answers}):
        asked = [answer for answer in answers if answer.revision == revision]
        both = zip(asked, under(revisions[revision - 1], asked), under(zero(basis), asked), strict=True)
        compared += [
            Compared(answer.segment, answer.passage.text, with_delta, without)
            for answer, with_delta, without in both
        ]
    return tuple(sorted(compared, key=lambda answer: answer.segment))
