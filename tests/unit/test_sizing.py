"""`engram plan` and `engram doctor`: their arithmetic against that of others, and what they say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.sizing import plan as plan_module
from cluster.sizing.machine import Machine, named_machine, packed
from cluster.sizing.memory import (
    GIB,
    cache_tokens,
    held,
    layer_activations,
    learner_parts,
    object_store_gib,
    peak,
    published_bytes,
    slot_bytes,
    snapshot_numbers,
    store_bytes,
    trained_parameters,
    worker_parts,
)
from cluster.sizing.plan import make_plan
from cluster.train import prepare
from configs.load import load_config
from configs.models import ModelError, model_shape
from configs.schema import EngineConfig, FastWeightsConfig, LearnerConfig, ModelConfig, RunConfig
from configs.shapes import ModelShape, read_shape
from configs.shipped import shipped

_QWEN3 = {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
CONFIGS = {  # as on the hub
    "Qwen/Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "heads": 16},
    "Qwen/Qwen3-1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "heads": 16},
    "Qwen/Qwen3-4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "heads": 32},
}
MACHINE = Machine(16, 64.0, 32.0, 0, 0.0)


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a Qwen3 model."""
    sizes = dict(CONFIGS[name])
    return {**_QWEN3, "num_attention_heads": sizes.pop("heads"), **sizes}


@pytest.fixture
def shape_of(tmp_path: Path) -> Callable[[str], ModelShape]:
    def read(name: str) -> ModelShape:
        file = tmp_path / "config.json"
        file.write_text(json.dumps(config_of(name)))
        return read_shape(file, name)

    return read


def run_config(name: str, *settings: str) -> RunConfig:
    return load_config(shipped()[name], ["environment.conversation.path=locomo.json", *settings])


# --- the shape ----------------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_model_cards(shape_of: Callable[[str], ModelShape]) -> None:
    numbers = {name: shape_of(name).parameters for name in CONFIGS}
    assert numbers == {
        "Qwen/Qwen3-0.6B": 596_049_920,
        "Qwen/Qwen3-1.7B": 1_720_574_976,
        "Qwen/Qwen3-4B": 4_022_468_096,
    }
    assert model_shape(ModelConfig()).parameters == 134_515_008  # SmolLM2-135M


def test_a_name_that_is_nowhere_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        ModelError, match=r"its config\.json is neither in the local cache nor to be had"
    ) as caught:
        model_shape(ModelConfig(name="nobody/nothing"))
    assert "\n" not in str(caught.value) and "give a folder" in str(caught.value)


# --- arithmetic against others' -----------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 4, 8])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_learners_state_is_what_deepspeed_estimates(
    shape_of: Callable[[str], ModelShape], name: str, ranks: int
) -> None:
    """Weights, gradients, masters and moments. DeepSpeed knows no activations and no buckets."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    shape = shape_of(name)
    config = LearnerConfig(dtype="bfloat16", workers=ranks, gpus_per_worker=1, zero_stage=2)

    def ours(stage: int) -> float:
        staged = replace(config, zero_stage=stage)  # type: ignore[arg-type]
        parts = learner_parts(shape, staged, reference=False)
        (step,) = (part for part in parts if part.name == "gradients, step")
        bucket = 2 * min(2**25, shape.parameters) * 2
        return held(parts) + step.bytes - bucket

    _, zero2 = estimate_zero2_model_states_mem_needs(shape.parameters, ranks, cpu_offload=False)
    assert ours(2) == pytest.approx(zero2, rel=0.15)
    largest = shape.embedding_parameters
    _, zero3, gathered = estimate_zero3_model_states_mem_needs(
        shape.parameters, largest, ranks, cpu_offload=False, cpu_offload_params=False
    )
    assert ours(3) == pytest.approx(zero3 - gathered, rel=0.25)


def test_the_factors_of_a_lora_are_those_that_peft_makes(shape_of: Callable[[str], ModelShape]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from learner.lora import add_factors

    name, config = "Qwen/Qwen3-4B", LearnerConfig(trainable="lora", dtype="bfloat16", gpus_per_worker=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_of(name)))
        add_factors(model, config, seed=0)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    shape = shape_of(name)
    assert trained_parameters(shape, config) == trained
    assert published_bytes(shape, config) == 2 * trained
    # weights and factors in bfloat16, float32 masters and Adam's two moments of the factors alone
    assert held(learner_parts(shape, config, reference=False)) == 2 * shape.parameters + (2 + 12) * trained


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_activations_of_a_layer_are_what_autograd_keeps(kind: str, dtype: str) -> None:
    """Three layers against one, of a small model. Within 15 %."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "vocab_size": 100}
    sizes |= {"num_key_value_heads": 2, "head_dim": 64}
    make = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    tokens, kept = 64, []
    for layers in (1, 3):
        config = make[0](**sizes, num_hidden_layers=layers, attn_implementation="sdpa")
        model = make[1](config).to(getattr(torch, dtype)).train()
        ids = torch.zeros((1, tokens), dtype=torch.int64)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        seen: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor, seen: dict[int, torch.Tensor] = seen) -> torch.Tensor:
            seen.setdefault(tensor.untyped_storage()._cdata, tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.get_decoder()(input_ids=ids, use_cache=False)
        kept.append(sum(each.untyped_storage().nbytes() for key, each in seen.items() if key not in own))
    shape = ModelShape(kind, 1, 256, 768, 4, 2, 64, 100, 512, True, False, kind == "qwen3")
    width = {"float32": 4, "bfloat16": 2}[dtype]
    measured = (kept[1] - kept[0]) / 2 / tokens
    assert layer_activations(shape, width) == pytest.approx(measured, rel=0.15)


# By tests/integration/sizing_process.py on 2026-11-30 (CPU, float32): an engine with SmolLM2-135M, and one
# with the random model of tests/conftest.py, each in a process of its own: held, and at the peak of a write.
MEASURED = {"smollm2": (1_511_407_616, 1_993_940_992), "tiny": (747_958_272, 889_556_992)}
SETTINGS = ("engine.kv_cache_gib=0.125", "engine.slots=8", "engine.max_model_tokens=512")
MEMORY = ("memory.max_context_tokens=256", "memory.max_extract_tokens=128")


def test_a_worker_is_larger_than_one_of_a_tiny_model_by_what_the_plan_says() -> None:
    """Within 15 %. The difference leaves out what vLLM itself imports and makes when an engine starts."""
    config = load_config(None, [*SETTINGS, *MEMORY])
    tiny = ModelShape("llama", 6, 128, 256, 2, 1, 64, 49_152, 8192, True, False, False)
    large, small = (worker_parts(shape, config, 0) for shape in (model_shape(config.model), tiny))
    found = [one - other for one, other in zip(*MEASURED.values(), strict=True)]
    assert held(large) - held(small) == pytest.approx(found[0], rel=0.15)
    assert peak(large) - peak(small) == pytest.approx(found[1], rel=0.15)


def test_b_and_weights_in_the_object_store_of_the_paper(shape_of: Callable[[str], ModelShape]) -> None:
    """528,384 numbers a snapshot of Qwen3-4B (the method); 8 GB of weights and about 4.3 GB of B a step."""
    config, shape = run_config("paper"), shape_of("Qwen/Qwen3-4B")
    assert snapshot_numbers(shape, config.fast_weights) == 528_384
    assert published_bytes(shape, config.learner) == pytest.approx(8.04e9, rel=0.01)
    weights, episodes = store_bytes(shape, replace(config, train=replace(config.train, max_staleness=0)))
    assert weights == 2 * published_bytes(shape, config.learner)
    assert episodes == pytest.approx(4.3e9, rel=0.02)
    assert object_store_gib(config, shape) > 20
    small = run_config("quickstart")
    assert object_store_gib(small, model_shape(small.model)) == 2.0  # as it always was


def test_slots_and_the_cache_of_keys_and_values(shape_of: Callable[[str], ModelShape]) -> None:
    shape = shape_of("Qwen/Qwen3-0.6B")
    one = slot_bytes(shape, FastWeightsConfig(), EngineConfig(slots=1), 2)
    assert one == 4 * 3 * 8 * (1024 + 3072) * 2  # rank 6 lies in slots of 8
    assert slot_bytes(shape, FastWeightsConfig(), EngineConfig(slots=64), 2) == 64 * one
    config = run_config("one_gpu")
    assert cache_tokens(shape, config, GIB) == GIB // (2 * 28 * 8 * 128 * 2)


# --- the plan --------------------------------------------------------------------------------------------


def planned(shape: ModelShape, name: str, machine: Machine, *settings: str) -> tuple[str, tuple[str, ...]]:
    made = make_plan(run_config(name, *settings), shape, machine)
    return str(made), made.shortages


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["learner.zero_stage=1", "learner.workers=1"],
            r"GPU 0 needs \d+\.\d GiB and has 80, less 5% .*learner\.workers",
        ),
        (["engine.gpu_memory_utilization=0.99"], "lower engine.gpu_memory_utilization"),
        (["engine.kv_cache_gib=75"], "lower engine.kv_cache_gib"),
        (["engine.kv_cache_gib=1"], r"KV cache holds 7,281 tokens, .*raise engine\.kv_cache_gib"),
        (["rollout.workers=9"], "asks for 13 GPUs, there are 8"),
        (["ray.object_store_gib=2"], r"object_store_gib=2 is less than the 23\.\d GiB"),
        (["ray.startup_timeout_s=300"], "ray.startup_timeout_s=300 is short"),
        (["engine.max_model_tokens=50000"], "more than the model's window of 40960"),
    ],
)
def test_each_shortage_is_a_line_with_its_cure(
    shape_of: Callable[[str], ModelShape], settings: list[str], said: str
) -> None:
    text, shortages = planned(shape_of("Qwen/Qwen3-4B"), "paper", named_machine(8, 80), *settings)
    assert len(shortages) == 1 and f"short: {shortages[0]}" in text, shortages
    assert re.search(said, shortages[0]) and "\n" not in shortages[0]


@pytest.mark.parametrize(
    ("name", "model", "machine"),
    [
        ("one_gpu", "Qwen/Qwen3-0.6B", named_machine(1, 23.5)),  # what a card of 24 GB shows
        ("one_gpu_80gb", "Qwen/Qwen3-4B", named_machine(1, 79)),
        ("node_8gpu", "Qwen/Qwen3-1.7B", named_machine(8, 79)),
        ("paper", "Qwen/Qwen3-4B", named_machine(8, 79)),
    ],
)
def test_the_shipped_configurations_for_gpus_fit_theirs_and_say_that_they_were_not_run(
    shape_of: Callable[[str], ModelShape], name: str, model: str, machine: Machine
) -> None:
    """And each worker's cache has room for full contexts in all its slots."""
    config, shape = run_config(name), shape_of(model)
    assert config.model.name == model
    text, shortages = planned(shape, name, machine)
    assert shortages == () and text.endswith("it fits, by this arithmetic")
    assert "learner x" in text and "GPU 0" in text and "object store" in text
    full = int(re.search(r"KV cache: (\d+) full contexts", text)[1])  # type: ignore[index]
    assert full >= config.engine.slots
    assert "Not run yet" in shipped()[name].read_text(encoding="utf-8").replace("\n# ", " ")


def test_the_plan_says_which_way_new_weights_take_and_counts_what_waits(
    shape_of: Callable[[str], ModelShape],
) -> None:
    shape, machine = shape_of("Qwen/Qwen3-4B"), named_machine(8, 80)
    stored, _ = planned(shape, "paper", machine)
    assert "for new weights into a worker, through Ray's object store" in stored
    sent, _ = planned(shape, "paper", machine, "learner.weight_transfer=collective")
    why = "the broadcast before it (NCCL, as both sides have GPUs), which has not run on a GPU yet"
    assert f"s at most, through Ray's object store; less by {why}" in sent

    def host(text: str) -> float:
        (line,) = (line for line in text.splitlines() if line.startswith("host memory"))
        return float(line.split()[2])

    config = run_config("paper")
    received = config.rollout.workers * published_bytes(shape, config.learner) / GIB
    assert host(sent) - host(stored) == pytest.approx(received, abs=0.11)


def test_a_small_machine_is_said_to_be_short_of_memory_and_of_shared_memory() -> None:
    shape = model_shape(ModelConfig())
    _, shortages = planned(shape, "quickstart", replace(MACHINE, memory_gib=4.0, shared_gib=0.06))
    assert len(shortages) == 1 and "GiB of memory, there are 4.0; lower" in shortages[0]
    text, shortages = planned(shape, "quickstart", MACHINE)
    assert shortages == () and "slow: /dev/shm" not in text


def test_shared_memory_stops_a_run_only_from_where_ray_refuses() -> None:
    from ray._private.ray_constants import REQUIRE_SHM_SIZE_THRESHOLD

    assert plan_module.SHARED_BYTES == REQUIRE_SHM_SIZE_THRESHOLD
    shape, small = model_shape(ModelConfig()), replace(MACHINE, shared_gib=0.06)
    text, shortages = planned(shape, "quickstart", small)
    assert shortages == () and "slow: /dev/shm has 0.1 GiB, so Ray keeps it in its temporary folder" in text
    text, (short,) = planned(shape, "quickstart", small, "ray.object_store_gib=9.4")  # 10.09e9 bytes
    assert "does not fit into /dev/shm (0.1 GiB)" in short and "slow: /dev/shm" not in text
    assert "--shm-size" in short and "ray.object_store_gib" in short


def test_shares_that_ray_can_never_place_do_not_fit(shape_of: Callable[[str], ModelShape]) -> None:
    assert packed([0.6, 0.0, 0.4, 0.6]) == [[0, 2], [3]] and len(packed([0.1] * 10)) == 1
    settings = ["rollout.workers=2", "rollout.gpus_per_worker=0.6", "learner.gpus_per_worker=0.6"]
    shape = shape_of("Qwen/Qwen3-0.6B")
    text, (short,) = planned(shape, "one_gpu", named_machine(2, 79), *settings)
    assert short.startswith("these shares need 3 GPUs, as none is split over two, there are 2; lower")
    assert "GPU 0 to 1" not in text and "GPU 1" in text and "GPU 2" not in text
    assert planned(shape, "one_gpu", named_machine(3, 79), *settings)[1] == ()


@pytest.mark.parametrize(("name", "machine"), [("quickstart", MACHINE), ("node_8gpu", named_machine(8, 80))])
def test_the_parts_of_a_process_sum_to_its_total(name: str, machine: Machine) -> None:
    """What is held, and the largest of what comes at the peak; each is rounded to a digit."""
    text, _ = planned(model_shape(ModelConfig()), name, machine)
    shown = re.findall(r"x\d+ +([\d.]+) GiB each, on \w+: (.*)\n +at the peak also (.*)", text)
    assert len(shown) == 2
    for total, held_parts, passing in shown:
        sizes = [float(size) for size in re.findall(r"\d+\.\d", held_parts)]
        most = max(float(size) for size in re.findall(r"\d+\.\d", passing))
        assert "libraries" in held_parts and sum(sizes) + most == pytest.approx(float(total), abs=0.25)


@pytest.mark.parametrize(
    ("gpus", "settings", "cure"),
    [
        (1, [], "learner.trainable=lora or last_layers, a smaller model"),
        (1, ["learner.trainable=last_layers"], "learner.trainable=lora, a smaller model"),
        (1, ["learner.trainable=lora"], "a smaller model"),
        (4, ["learner.trainable=lora"], "more learner.workers with learner.zero_stage=3, a smaller model"),
        (4, ["learner.trainable=lora", "learner.zero_stage=3"], "more learner.workers, a smaller model"),
        (
            2,
            ["learner.workers=2", "learner.gpus_per_worker=1", "rollout.gpus_per_worker=0"],
            "learner.trainable=lora or last_layers, learner.zero_stage=3, a smaller model",
        ),
    ],
)
def test_a_cure_is_nothing_that_is_set_already_and_no_gpu_that_is_not_there(
    gpus: int, settings: list[str], cure: str, shape_of: Callable[[str], ModelShape]
) -> None:
    """A 4B model does not fit into 6 GiB, however it is trained."""
    _, shortages = planned(shape_of("Qwen/Qwen3-4B"), "one_gpu", named_machine(gpus, 6), *settings)
    (short,) = (short for short in shortages if short.startswith("GPU 0 needs"))
    assert short.partition("fragments; ")[2].partition(" or lower")[0] == cure


def test_a_machine_without_gpus_is_asked_for_the_one_that_has_them() -> None:
    _, (short,) = planned(model_shape(ModelConfig()), "one_gpu", MACHINE)
    assert (
        "the run asks for 1 GPU, there are 0; name the machine" in short and "--gpus N --gpu-gib GIB" in short
    )


def test_gpus_of_unknown_memory_are_asked_for(shape_of: Callable[[str], ModelShape]) -> None:
    machine = replace(MACHINE, gpus=1)
    text, (short,) = planned(shape_of("Qwen/Qwen3-0.6B"), "one_gpu", machine)
    assert short.endswith("name it: engram plan --gpus 1 --gpu-gib GIB") and " 0 GiB" not in text
    assert planned(model_shape(ModelConfig()), "quickstart", machine)[1] == ()


def test_a_training_warns_of_what_will_not_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prepare, "this_machine", lambda: replace(MACHINE, memory_gib=4.0))
    config, shape = load_config(shipped()["quickstart"], []), model_shape(ModelConfig())
    prepare._warn_of_shortages(config, shape)
    (said,) = (record.message for record in caplog.records)
    assert re.match(r"this may not fit: the run needs \d+\.\d GiB of memory, there are 4\.0; lower", said)
    caplog.clear()
    prepare._warn_of_shortages(replace(config, ray=replace(config.ray, address="auto")), shape)
    assert caplog.records == []


def test_the_command_prints_the_plan_and_its_status(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("Qwen/Qwen3-4B")))
    words = ["plan", "one_gpu", f"model.name={tmp_path}", "--gpus", "1", "--gpu-gib"]
    assert main([*words, "24"]) == 1
    printed = capsys.readouterr().out
    assert "on 1 GPU of 24 GiB" in printed and "short: GPU 0 needs" in printed
    assert main([*words, "140"]) == 0
    assert "it fits, by this arithmetic" in capsys.readouterr().out
    assert main(["plan", "one_gpu", "--gpus", "1"]) == 2
    assert "--gpus and --gpu-gib together" in capsys.readouterr().err
