"""Fixtures and process settings that all tests share.

The settings stand above every import, because torch, vLLM and Ray read them when they are imported.
"""

from __future__ import annotations

import os

# Two cores carry an engine, a learner and Ray at once. One thread each also makes sums repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")  # at 15, Ray's, a test beside it starves its actors
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from configs.models import resolve_model
from configs.schema import ModelConfig

if TYPE_CHECKING:
    from actors.fast_weights.delta import Basis
    from actors.text.chat_template import ChatFormat

RAY_FILES = {
    "test_bench_circle",
    "test_bench_controller",
    "test_bring_your_own",
    "test_cluster_runtime",
    "test_evaluate",
    "test_learner_ray",
    "test_lost_node",
    "test_mixed_training",
    "test_ray_job",
    "test_resume",
    "test_short",
    "test_train_loop",
    "test_user_faults",
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


class _Scheduling(LoadScopeScheduling):
    """Keeps each file on one worker, and all files that start Ray on the same one.

    Clusters that start at the same time on two cores miss their deadlines. xdist's own ``loadgroup`` does not
    group under pytest 9.2, where a changed node id is not seen. A file goes by its whole path: with one name
    in two folders, a unit test would bring the other's engine in before DeepSpeed's tests.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if Path(file).stem in RAY_FILES else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests in order, and skip the tests marked ``gpu`` without a GPU.

    Long tests come first, so that both workers end together. Tests with vLLM in their own process come last:
    an engine that ends takes its process's torch.distributed with it, and DeepSpeed would hold on to
    process groups that are gone.
    """
    items.sort(key=_place)  # stable
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # heavy, and needed only to find out

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _place(item: pytest.Item) -> int:
    if item.get_closest_marker("engine_in_process"):
        return 4
    if item.path.stem in RAY_FILES:
        return 0
    if item.get_closest_marker("slow"):
        return 1
    return 3 if item.path.parent.name == "unit" else 2


@pytest.fixture(scope="session")
def model_path() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, float32: 30 layers, hidden 576, vocabulary 49,152."""
    return resolve_model(ModelConfig()).path


@pytest.fixture(scope="session")
def chat(model_path: Path) -> ChatFormat:
    """The chat template of SmolLM2, which the tiny model has too."""
    from transformers import AutoTokenizer

    from actors.text.chat_template import ChatFormat

    return ChatFormat(AutoTokenizer.from_pretrained(model_path))


@pytest.fixture(scope="session")
def tiny_model_path(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(model_path, tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``llama_basis`` writes the random Llama of the learner tests to."""
    return tmp_path_factory.mktemp("learner-llama")


@pytest.fixture(scope="session")
def llama_basis(llama: Path) -> Basis:
    """Writes ``llama`` and gives its basis; no test changes either."""
    from tests.unit.learner_cases import write_model

    return write_model(llama)


def write_tiny_model(model_path: Path, folder: Path) -> Path:
    """Write a random Llama with SmolLM2's tokenizer, float32, the same on every machine.

    6 layers, hidden 128, 2 heads of 64 over 1 key-value head. Its weights are drawn wide enough that the
    next-token distribution is far from flat: a wrong adapter or mask shows in the log-probs.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="float32",
    )
    model = LlamaForCausalLM(config).float()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.2 if "embed" in name else 0.1, generator=draw)
    model.save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copy(model_path / file, folder / file)
    return folder


@pytest.fixture(scope="session")
def locomo_path() -> Path:
    """The LoCoMo file named by ENGRAM_LOCOMO_PATH. Without it its tests are skipped."""
    return _data("ENGRAM_LOCOMO_PATH", "a LoCoMo file, e.g. locomo10.json")


@pytest.fixture(scope="session")
def longmemeval_path() -> Path:
    """The LongMemEval file named by ENGRAM_LONGMEMEVAL_PATH. Without it its tests are skipped."""
    return _data("ENGRAM_LONGMEMEVAL_PATH", "a LongMemEval file, e.g. longmemeval_s.json")


@pytest.fixture(scope="session")
def hotpotqa_path() -> Path:
    """The folder named by ENGRAM_HOTPOTQA_PATH (questions.json, corpus.json); else a skip."""
    return _data("ENGRAM_HOTPOTQA_PATH", "a folder with HotpotQA's questions.json and their corpus.json")


@pytest.fixture
def silent_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A hub that takes connections and never says a word; its cache is empty."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.5")
        yield server


def _data(variable: str, what: str) -> Path:
    name = os.environ.get(variable)
    if not name:
        pytest.skip(f"{variable} is not set ({what})")
    if not Path(name).exists():
        pytest.fail(f"{variable}={name} does not exist")
    return Path(name)
