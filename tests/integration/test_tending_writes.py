"""A memory rebuilt by the real writer: what was forgotten is gone from the weights, the rest is known.

The policy that scores is plain transformers with W + B A merged, so writer and score check one another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.episodes.rollout import WriteBatcher
from actors.text.chat_template import ChatFormat
from actors.types import AdapterKey, FastWeights, Flashcard, Generation, Sampling
from actors.write.writer import checkpoint_writer
from cluster.assistant.conversation import Conversation
from cluster.assistant.memory_file import SavedMemory, save_memory
from cluster.assistant.opening import Opening, Parts, prepare_opening
from cluster.assistant.tending import Edits, losses_of
from tests.integration.assistant_cases import OVERRIDES, write_cards
from tests.unit.rollout_fakes import ScriptedPolicy

HOME = Flashcard("Where does Nora live?", "in Lisbon")
PET = Flashcard("What pet does Nora have?", "a grey parrot")
JOB = Flashcard("What does Omar do for a living?", "he is a cook")


class Merged(ScriptedPolicy):
    """Scores under theta + B A of the installed adapter."""

    def __init__(self, opening: Opening) -> None:
        def silent(prompt: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
            raise AssertionError("nothing is sampled here")

        super().__init__(silent)
        self._basis = opening.basis
        model = AutoModelForCausalLM.from_pretrained(opening.model.path, dtype=torch.float32)
        self._model = model.requires_grad_(False)
        self._theta = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}

    async def score(self, token_ids: Sequence[int], adapter: AdapterKey) -> list[float]:
        delta = self.installed[adapter.name].b if adapter.revision else {}
        for name, a in self._basis.a.items():
            theta = self._theta[f"{name}.weight"]
            written = torch.tensor(delta[name]) @ a if name in delta else 0.0
            self._model.get_parameter(f"{name}.weight").copy_(theta + written)
        ids = torch.tensor([list(token_ids)])
        logprobs = self._model(ids).logits[0, :-1].log_softmax(-1)
        scored: list[float] = logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
        return scored


def test_a_forgotten_card_is_gone_from_the_weights_and_the_others_are_known(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    settings = [*OVERRIDES, "write.epochs=40", "write.known_loss=0.005", "rollout.threads=1"]
    opening = prepare_opening(str(tiny_model_path), None, settings)
    weights, log = write_cards(opening, [[HOME, PET], [JOB]])
    memory = SavedMemory(weights, opening.system_prompt, (), tuple(log), None)
    save_memory(memory, opening, tmp_path / "nora", overwrite=False)
    merged, chat = Merged(opening), ChatFormat(AutoTokenizer.from_pretrained(tiny_model_path))
    plain = checkpoint_writer(
        str(opening.model.path), opening.basis, opening.config.write, "float32", torch.device("cpu")
    )
    parts = Parts(opening, merged, WriteBatcher(plain), chat, None, lambda: "")

    def losses(now: FastWeights | None) -> list[float]:
        key = AdapterKey(merged.version, "asked", now.revision if now else 0)
        merged.installed = {key.name: now} if now else {}
        cards = (HOME, PET, JOB)
        return list(asyncio.run(losses_of(cards, opening.system_prompt, parts, key)))

    untold, told = losses(None), losses(weights)
    assert told[0] < 0.1 < 2 < untold[0], "it was in the weights"
    merged.installed = {}

    async def story() -> None:
        talk = Conversation(parts, "nora", "")
        await talk.load(tmp_path / "nora")
        rebuilt = await talk.tend(Edits(forget=(1,), correct={3: "he is a pilot"}))
        assert rebuilt.cards == (PET, replace(JOB, answer="he is a pilot"))
        assert max(rebuilt.losses) < 0.1, rebuilt.losses
        (record,) = talk.writes
        assert record.revision == 1 and record.loss_after < 0.1
        (now,) = merged.installed.values()
        assert now.revision == 1
        talk.save(tmp_path / "nora", overwrite=True)
        merged.installed = {}
        again = Conversation(parts, "again", "")
        await again.load(tmp_path / "nora")
        (loaded,) = merged.installed.values()
        assert all((loaded.b[name] == matrix).all() for name, matrix in now.b.items())

    asyncio.run(story())
    (now,) = merged.installed.values()
    forgotten, kept, corrected = losses(now)
    assert forgotten > 1 and kept < 0.1 and corrected > 1, (forgotten, kept, corrected)
