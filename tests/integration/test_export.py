"""An exported checkpoint and an exported memory act in stock PEFT and stock vLLM as they do here.

There is one real run folder of the tiny model, and one real conversation with two writes on Engram's engine.
The agent's text is given, because a random model writes no flashcards. That engine is gone before the stock
tools start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.peft_format import from_peft
from actors.memory.base import Agent
from actors.memory.parametric import Flashcards
from actors.text.flashcards import render_flashcards
from actors.types import AdapterKey, Flashcard, Outcome, Sampling, Timings, WriteRecord
from cluster.assistant.conversation import Conversation
from cluster.assistant.export import export
from cluster.assistant.opening import AssistantError, parts_of, prepare_opening
from cluster.inspection.record import EpisodeRecord, Origin, WriteEntry, save
from configs.schema import RunConfig
from tests.integration.assistant_cases import write_cards, write_run

pytestmark = pytest.mark.engine_in_process
EXACT = 1e-3  # nats, float32
TOKENS = 12
CARDS = (Flashcard("Where does Nora live?", "in Lisbon"), Flashcard("What does Omar do?", "he bakes"))


@dataclass(frozen=True)
class Spoken:
    """What Engram's engine said to one prompt, without and with the saved memory.

    ``run`` is the model's run.
    """

    prompt: tuple[int, ...]
    base: tuple[tuple[int, ...], tuple[float, ...]]
    written: tuple[tuple[int, ...], tuple[float, ...]]
    memory: Path
    run: Path


@pytest.fixture(scope="module")
def run_dir(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tiny_model_path, tmp_path_factory.mktemp("runs") / "tiny-20260101-000000")


def give_cards(patch: pytest.MonkeyPatch, cards: Sequence[Flashcard]) -> None:
    """Give the extraction's text, because a random model writes no flashcards. All else is real."""

    async def extract(self: Flashcards, agent: Agent) -> str:
        return render_flashcards(cards)

    patch.setattr(Flashcards, "extract", extract)


@pytest.fixture(scope="module")
def spoken(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    memory = tmp_path_factory.mktemp("memory") / "saved"
    with (
        pytest.MonkeyPatch.context() as patch,
        parts_of(prepare_opening(str(run_dir), None, ()), slots=1) as parts,
    ):
        give_cards(patch, CARDS)

        async def story() -> Spoken:
            talk = Conversation(parts, "c", parts.opening.system_prompt)
            for _ in range(2):
                await talk.read("Nora lives in Lisbon. Omar bakes.")
                record = await talk.write()
                assert record is not None and record.outcome == "accepted", record
                assert record.loss_after < 0.7 * record.loss_before
            talk.save(memory, overwrite=False)
            chat, episode_id = parts.chat, talk._speaker.episode_id
            question = chat.user("Where does Nora live?")
            prompt = chat.system(talk.system_prompt) + question + chat.assistant_open
            sampling, adapters = (
                Sampling(0.0, TOKENS, 0, "act"),
                [AdapterKey(0, episode_id, n) for n in (0, 2)],
            )
            said = [await parts.policy.generate(prompt, sampling, adapter) for adapter in adapters]
            await talk.close()
            base, written = ((generation.token_ids, generation.logprobs) for generation in said)
            return Spoken(prompt, base, written, memory, run_dir)

        result = asyncio.run(story())
    assert result.base[0] != result.written[0], "the Delta is too small for this test to mean anything"
    return result


@pytest.fixture(scope="module")
def exported(spoken: Spoken, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The Hugging Face folder and the PEFT folder."""
    folder = tmp_path_factory.mktemp("exported")
    assert "a Hugging Face model: theta after 0 RL steps" in export(spoken.run, folder / "model", "")
    assert "a PEFT adapter" in export(spoken.memory, folder / "adapter", "")
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    return folder / "model", folder / "adapter"


def test_stock_peft_answers_as_engram_does(spoken: Spoken, exported: tuple[Path, Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, adapter = exported
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter
    ).eval()

    def check(expected: tuple[tuple[int, ...], tuple[float, ...]]) -> None:
        ids = torch.tensor([spoken.prompt + expected[0]])
        with torch.no_grad():
            table = peft(ids).logits[0, len(spoken.prompt) - 1 : -1].log_softmax(-1)
        assert table.argmax(-1).tolist() == list(expected[0])
        assert table.max(-1).values.tolist() == pytest.approx(list(expected[1]), abs=EXACT)

    check(spoken.written)
    with peft.disable_adapter():
        check(spoken.base)


def test_stock_vllm_answers_as_engram_does(spoken: Spoken, exported: tuple[Path, Path]) -> None:
    """A plain engine: no worker extension, no basis, its own LoRA, the adapter read from its folder."""
    from vllm import EngineArgs, SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.lora.request import LoRARequest

    from actors.engine.start import prepare_environment, shut_down, start_engine

    prepare_environment(1)
    model, adapter = exported
    arguments = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=2,
        enable_chunked_prefill=False,
        max_num_batched_tokens=256,
        enforce_eager=True,
        kv_cache_memory_bytes=2**28,
        enable_lora=True,
        max_loras=1,
        max_lora_rank=8,
    )
    engine = start_engine(arguments, 1)
    try:
        for name, lora, expected in (
            ("base", None, spoken.base),
            ("written", LoRARequest("memory", 1, str(adapter)), spoken.written),
        ):
            sampling = SamplingParams(
                temperature=0.0, max_tokens=len(expected[0]), ignore_eos=True, logprobs=0, detokenize=False
            )
            engine.add_request(name, tokens_input(list(spoken.prompt)), sampling, lora_request=lora)
            outputs = []
            while engine.has_unfinished_requests():
                outputs += [output for output in engine.step() if output.finished]
            said = outputs[0].outputs[0]
            assert tuple(said.token_ids) == expected[0], name
            logprobs = [
                place[token].logprob for place, token in zip(said.logprobs, said.token_ids, strict=True)
            ]
            assert logprobs == pytest.approx(list(expected[1]), abs=EXACT)
    finally:
        shut_down(engine)


def test_an_exported_model_opens_with_the_runs_own_basis_and_settings(
    spoken: Spoken, exported: tuple[Path, Path]
) -> None:
    here, there = prepare_opening(str(spoken.run), None, ()), prepare_opening(str(exported[0]), None, ())
    assert (
        here.basis.id
        == there.basis.id
        != compute_basis_from_checkpoint(exported[0], RunConfig().fast_weights, 0).id
    )
    assert here.model.fingerprint == there.model.fingerprint
    assert here.config.write == there.config.write and here.system_prompt == there.system_prompt


def episode_record(log: Sequence[WriteRecord], basis_id: str, version: int, config: str) -> EpisodeRecord:
    entries = tuple(WriteEntry(0, record, (), "passed") for record in log)
    origin = Origin("tiny", "train", "", 1, "worker-0", "tiny", "parametric", config)
    times = Timings(1, 1, 0, 0, 0, 0)
    return EpisodeRecord(
        origin,
        "t",
        "recall",
        "train-0.1",
        version,
        basis_id,
        (),
        entries,
        {},
        Outcome(1.0, {}, ()),
        (1.0, 0.0),
        "done",
        times,
        0.0,
    )


def test_an_episodes_memory_is_rebuilt_from_its_record_as_an_adapter(run_dir: Path, tmp_path: Path) -> None:
    opening = prepare_opening(str(run_dir), None, ())
    weights, log = write_cards(opening, [CARDS, CARDS[:1]])
    config = Path("..") / "checkpoints" / "step-000000" / "config.yaml"
    path = save(episode_record(log, opening.basis.id, 0, str(config)), run_dir / "episodes")
    assert "the memory of episode train-0.1 after 2 writes" in export(path, tmp_path / "adapter", "")
    rebuilt = from_peft(tmp_path / "adapter", opening.basis)
    assert rebuilt.revision == 2 and all(
        np.array_equal(rebuilt.b[name], weights.b[name]) for name in weights.b
    )

    elsewhere = save(episode_record(log, opening.basis.id, 9, str(config)), tmp_path / "run" / "episodes")
    with pytest.raises(
        AssistantError, match=r"was played on policy version 9 and .* has no checkpoint; give --model"
    ):
        export(elsewhere, tmp_path / "other", "")
    with pytest.raises(AssistantError, match="already holds something"):
        export(path, tmp_path / "adapter", "")
