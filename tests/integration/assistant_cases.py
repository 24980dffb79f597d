"""A run's folder and written memories of the tiny model, for the tests of export and serve."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from actors.fast_weights.basis import compute_basis_from_checkpoint, save_basis
from actors.fast_weights.delta import zero
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import render_flashcards, write_example
from actors.types import FastWeights, Flashcard, WriteRecord, WriteRequest
from actors.write.writer import checkpoint_writer
from cluster.assistant.opening import Opening
from cluster.runs.checkpoint import START, save_checkpoint
from configs.load import load_config, to_yaml

OVERRIDES = (
    "engine.max_model_tokens=512",
    "engine.kv_cache_gib=0.25",
    "memory.max_context_tokens=128",
    "memory.max_extract_tokens=64",
    "write.optimizer=adam",
    "write.learning_rate=0.02",
    "write.epochs=4",
    "sampling.max_answer_tokens=12",
)


def write_run(tiny_model_path: Path, folder: Path) -> Path:
    """Write a run with one checkpoint, as runs save them.

    Its theta is not the theta that the basis comes from.
    """
    config = load_config(None, [f"model.name={tiny_model_path}", *OVERRIDES])
    save_basis(
        compute_basis_from_checkpoint(tiny_model_path, config.fast_weights, 0), folder / "basis.safetensors"
    )

    async def save_learner(target: Path) -> None:
        shutil.copytree(tiny_model_path, target / "model")
        theta = load_file(target / "model" / "model.safetensors")
        save_file(
            {name: 1.02 * tensor for name, tensor in theta.items()},
            target / "model" / "model.safetensors",
            metadata={"format": "pt"},
        )

    asyncio.run(save_checkpoint(folder, START, to_yaml(config), save_learner, keep=2))
    return folder


def write_cards(
    opening: Opening, writes: Sequence[Sequence[Flashcard]]
) -> tuple[FastWeights, list[WriteRecord]]:
    """Make real writes one after the other without an engine; returns the last revision and the log."""
    from transformers import AutoTokenizer

    chat = ChatFormat(AutoTokenizer.from_pretrained(opening.model.path))
    writer = checkpoint_writer(
        str(opening.model.path), opening.basis, opening.config.write, "float32", torch.device("cpu")
    )
    weights, log = zero(opening.basis), []
    for cards in writes:
        examples = tuple(write_example(card, opening.system_prompt, chat) for card in cards)
        (result,) = writer.write([WriteRequest("case", weights, examples)])
        assert result.outcome == "accepted", result.reason
        weights, said = result.weights, render_flashcards(cards)
        losses = (result.loss_before, result.loss_after, result.steps, result.seconds)
        log.append(
            WriteRecord(weights.revision, examples, tuple(cards), said, 0, 1, 1, *losses, "accepted", "")
        )
    return weights, log
