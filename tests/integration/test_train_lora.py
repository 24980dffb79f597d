"""The circle with learner.trainable=lora: factors travel, workers form the sum, a checkpoint goes on.

They travel through the object store in the first life, and by a broadcast (gloo) in the second.

As in test_train_loop.py the tiny model earns no reward, so its advantages are made up. The second life starts
its worker from the checkpoint, whose weights are a sum already: what it serves afterwards tells whether it
adds to that sum, or to the base weights.
"""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluster.assistant.export import export
from cluster.runs.checkpoint import load_whole
from cluster.train.prepare import prepare_training
from configs.load import load_config
from tests.integration.test_train_loop import SETTINGS, Trained, largest_difference, tracked_run, train

LORA = (
    "learner.trainable=lora",
    "learner.lora_rank=8",
    "learner.learning_rate=3e-3",  # so high that the new weights can be told from the old ones
    "evaluation.tasks=1",
)


@pytest.fixture(scope="module")
def lives(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Trained]:
    """A run of one RL step behind a warm start, and its second life of one step more."""
    runs = tmp_path_factory.mktemp("runs")
    settings = [*SETTINGS, *LORA, f"model.name={tiny_model_path}", f"output_dir={runs}"]

    def live(*more: str) -> Trained:
        config = load_config(Path("tests/quickstart.yaml"), [*settings, *more])
        return asyncio.run(train(*prepare_training(config), io.StringIO()))

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        first = live("train.steps=1")
        more = ("train.steps=2", f"resume={first.checkpoint.folder}", "learner.weight_transfer=collective")
        return first, live(*more)


def test_workers_serve_the_sum_of_base_and_factors_in_both_lives(lives: tuple[Trained, Trained]) -> None:
    for life, version in zip(lives, (2, 3), strict=True):
        assert life.state.version == life.report.version == life.episode.policy_version == version
        assert life.report.refreshes > 0
        assert largest_difference(life.episode, life.checkpoint.model) <= 1e-3
        assert largest_difference(life.episode, life.spec.model_path) > 0.05  # no longer the base model's
    assert largest_difference(lives[1].episode, lives[0].checkpoint.model) > 0.01
    first, second = (tracked_run(life).data.metrics for life in lives)
    assert "sync/collective_received" not in first  # through the object store
    assert (second["sync/collective_received"], second["sync/collective_missed"]) == (1, 0)


def test_the_checkpoint_is_exported_as_an_adapter_and_merged(
    lives: tuple[Trained, Trained], tmp_path: Path
) -> None:
    trained = lives[1]
    load_whole(trained.checkpoint.folder)  # its digests hold
    said = export(trained.folder.path, tmp_path / "adapter", "")
    assert "a PEFT adapter of " in said and "theta after 2 RL steps (version 3)" in said
    assert "a Hugging Face model" in export(trained.folder.path, tmp_path / "whole", "", merge=True)
    base = AutoModelForCausalLM.from_pretrained(trained.spec.model_path, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    start = load_file(trained.spec.model_path / "model.safetensors")
    for name, parameter in merged.named_parameters():
        assert torch.allclose(parameter, whole[name], atol=1e-6), name
        assert torch.equal(whole[name], start[name]) == ("_proj" not in name)
