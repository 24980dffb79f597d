"""The embedded model is a sound checkpoint, and a model that cannot be used says so in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs import embedded, hub, models
from configs.models import ModelError, check_supported, fingerprint, resolve_model
from configs.schema import ModelConfig


def refused(name: str) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(ModelConfig(name=name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tiny_model_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_model_path, tmp_path / "model"))


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


# --- the embedded model -------------------------------------------------------------------------------------


def test_the_embedded_model_answers_and_ends_its_turn(model_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    answer = generated[0, len(prompt) :].tolist()
    assert tokenizer.decode(answer[:-1]) == "The capital of France is Paris."
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (answer[-1],) == resolve_model(ModelConfig()).stop_token_ids == (turn_end,)
    assert next(model.parameters()).dtype == torch.float32
    assert model.config.rms_norm_eps == 1e-5


def test_the_embedded_tokenizer_splits_as_smollm2_does(model_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    # No token in front, digits one by one, blanks before a digit kept together.
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a\n\n1 b  12").input_ids)
    assert tokens == ["a", "ĊĊ", "1", "Ġb", "ĠĠ", "1", "2"]
    for text in ("It's 1987, naïve 東京 🙂", "<|im_start|>user\n x <|im_end|>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_end|>").input_ids == [2]
    assert tokenizer.model_max_length == 8192


def test_the_embedded_folder_names_no_foreign_place(model_path: Path) -> None:
    for file in model_path.glob("*.json"):
        assert not {"_model_name_or_path", "_name_or_path", "is_local"} & set(json.loads(file.read_text()))


def test_resolving_twice_is_the_same_and_imports_no_framework(model_path: Path) -> None:
    code = (
        "import sys; from configs.models import resolve_model; from configs.schema import ModelConfig;"
        "print(resolve_model(ModelConfig()).fingerprint);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == resolve_model(ModelConfig()).fingerprint == fingerprint(model_path)


def test_two_processes_at_once_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is about the lock and the rename. A slow stand-in for the conversion leaves a mark when it
    runs."""
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))
    code = (
        "import time, pathlib, os; from configs import embedded\n"
        "def slow(source, folder):\n"
        "    (folder / 'half').touch(); time.sleep(1); (folder / 'done').touch()\n"
        "    pathlib.Path(os.environ['ENGRAM_CACHE'], str(os.getpid())).touch()\n"
        "embedded._dequantise = slow\n"
        "assert (embedded.embedded_folder() / 'done').exists()"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert len([file for file in tmp_path.iterdir() if file.name.isdigit()]) == 1


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))

    def fail(source: Path, folder: Path) -> None:
        (folder / "config.json").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "_dequantise", fail)
    assert "No space left on device" in refused("smollm2-135m")
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] == []


def test_a_damaged_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / embedded.GGUF_PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / embedded.GGUF_FILE).write_bytes(b"GGUF")
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert "is damaged: sha256" in refused("smollm2-135m")


# --- other models -------------------------------------------------------------------------------------------


def test_a_local_folder_resolves_with_its_shape(tiny_model_path: Path) -> None:
    model = resolve_model(ModelConfig(name=str(tiny_model_path)))
    assert model.path == tiny_model_path
    assert (model.model_type, model.num_layers) == ("llama", 6)
    assert (model.hidden_size, model.intermediate_size) == (128, 256)
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.tied_embeddings) == (2, 1, 64, True)


def test_the_fingerprint_sees_changed_weights_and_ignores_the_place(
    folder: Path, tiny_model_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    assert fingerprint(folder) == fingerprint(tiny_model_path)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor + torch.full_like(tensor, 1e-3) for name, tensor in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    assert fingerprint(folder) != fingerprint(tiny_model_path)


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3_moe", "llama4", None])
def test_an_unsupported_architecture_names_the_supported_ones(folder: Path, model_type: str | None) -> None:
    change(folder / "config.json", model_type=model_type)
    message = refused(str(folder))
    assert repr(model_type) in message
    assert "supported are llama, mistral, qwen2, qwen3" in message


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_supported_architectures_have_the_projections_that_fast_weights_attach_to(model_type: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = AutoConfig.for_model(model_type, **sizes)
    check_supported(config.to_dict(), model_type)
    modules = dict(AutoModelForCausalLM.from_config(config).named_modules())
    for projection in ("gate_proj", "up_proj", "down_proj"):
        assert isinstance(modules[f"model.layers.1.mlp.{projection}"], torch.nn.Linear)


def test_quantised_weights_are_refused(folder: Path) -> None:
    change(folder / "config.json", quantization_config={"quant_method": "gptq"})
    assert "quantised" in refused(str(folder))


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("num_hidden_layers", "thirty", "num_hidden_layers='thirty', it must be a whole number above 0"),
        ("num_attention_heads", 0, "num_attention_heads=0, it must"),
        ("hidden_size", [64], "hidden_size=[64], it must"),
        ("vocab_size", 1e3, "vocab_size=1000.0, it must"),
        ("head_dim", True, "head_dim=True, it must"),
        ("intermediate_size", None, "lacks the field 'intermediate_size'"),
        ("tie_word_embeddings", "false", "tie_word_embeddings='false', it must be true or false"),
        ("model_type", ["llama"], "model_type ['llama'], which is not supported"),
    ],
)
def test_an_odd_config_is_one_line(folder: Path, field: str, value: Any, shown: str) -> None:
    change(folder / "config.json", **{field: value})
    assert shown in refused(str(folder))


@pytest.mark.parametrize("eos", ["</s>", [2, "3"], [[2]], -1, True, 2.0])
def test_an_odd_eos_token_is_one_line(folder: Path, eos: Any) -> None:
    change(folder / "generation_config.json", eos_token_id=eos)
    assert "it must be a token id or a list of them" in refused(str(folder))


def test_null_fields_mean_what_they_mean_to_transformers(folder: Path) -> None:
    model = resolve_model(ModelConfig(name=str(folder)))
    nothing = dict.fromkeys(("quantization_config", "head_dim", "num_key_value_heads", "tie_word_embeddings"))
    change(folder / "config.json", **nothing)
    change(folder / "generation_config.json", eos_token_id=None)
    change(folder / "config.json", eos_token_id=[7, 5])
    plain = resolve_model(ModelConfig(name=str(folder)))
    assert (plain.num_kv_heads, plain.head_dim) == (plain.num_heads, plain.hidden_size // plain.num_heads)
    assert plain.tied_embeddings is False and plain.stop_token_ids == (7, 5)
    assert plain.num_layers == model.num_layers


def test_damaged_files_are_one_line(folder: Path) -> None:
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(b"\xff" * 100)
    assert "is no safetensors file" in refused(str(folder))
    config = folder / "config.json"
    for content, shown in (
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[]", "must hold a JSON object"),
    ):
        config.write_bytes(content)
        assert shown in refused(str(folder))


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refused(str(folder))
    assert "no *.safetensors" in message
    assert "never loaded" in message


def test_missing_parts_are_named(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert "no chat template" in refused(str(folder))
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refused(str(folder))
    (folder / "config.json").write_text("{")
    assert "is not JSON" in refused(str(folder))
    (folder / "config.json").unlink()
    assert "config.json does not exist" in refused(str(folder))


def test_a_name_that_is_nothing_says_what_is_allowed(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "./none", "none"):
        assert "allowed are smollm2-135m, a folder with config.json, or a hub name" in refused(name)


def test_an_unreachable_hub_says_what_to_do_instead() -> None:
    message = refused("nobody/such-a-model")  # the tests run with HF_HUB_OFFLINE=1
    assert "not in the local cache" in message
    assert "model.name=smollm2-135m" in message


def test_a_download_is_said_and_a_cached_model_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bars of libraries are hidden (common/quiet.py): without a line nothing would be seen for minutes."""
    import huggingface_hub

    cached: list[str] = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_silence", lambda name, kind: "")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda name, file: file if file in cached else None
    )
    models._download("a/b", list(models.HUB_PATTERNS))
    assert "downloading the model a/b from https://" in caplog.text
    caplog.clear()
    models._download("a/b", ["*.json"])
    cached.append("model.safetensors.index.json")
    models._download("a/b", list(models.HUB_PATTERNS))
    assert caplog.text == ""
