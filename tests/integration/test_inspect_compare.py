"""``inspect --compare`` on a real model and real writes: its answers are those of transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.fast_weights.basis import compute_basis_from_checkpoint, save_basis
from actors.fast_weights.delta import Basis, DeltaInjector, stack, zero
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import write_example
from actors.types import Answer, FastWeights, Flashcard, Outcome, Timings, WriteRecord, WriteRequest
from actors.write.writer import checkpoint_writer
from cluster import cli
from cluster.inspection.compare import compare
from cluster.inspection.record import (
    FOLDER,
    EpisodeRecord,
    Origin,
    Passage,
    SegmentRecord,
    WriteEntry,
    save,
    save_text,
)
from configs.load import load_config, to_yaml
from configs.schema import RunConfig

CARDS = (
    Flashcard("What did Stella buy?", "a green backpack"),
    Flashcard("Who plays the ukulele?", "Rebecca"),
)
SYSTEM = "Remember what you are told."


@dataclass(frozen=True)
class Played:
    path: Path
    record: EpisodeRecord
    config: RunConfig
    basis: Basis
    chat: ChatFormat
    revisions: tuple[FastWeights, ...]


@pytest.fixture(scope="module")
def played(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Write twice, then ask a question under the second revision; keep the record as a run does."""
    run_dir = tmp_path_factory.mktemp("quick-1")
    settings = [
        f"model.name={tiny_model_path}",
        "write.learning_rate=5e-3",
        "write.epochs=20",
        "sampling.max_answer_tokens=6",
    ]
    config = load_config(Path("tests/quickstart.yaml"), settings)
    save_text(to_yaml(config), run_dir / FOLDER / "settings-0.yaml")
    basis = compute_basis_from_checkpoint(tiny_model_path, config.fast_weights, 0)
    save_basis(basis, run_dir / "basis.safetensors")
    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_model_path))
    writer = checkpoint_writer(str(tiny_model_path), basis, config.write, "float32", torch.device("cpu"))
    weights, revisions, writes = zero(basis), [], []
    for number, card in enumerate(CARDS):
        examples = (write_example(card, SYSTEM, chat),)
        (result,) = writer.write([WriteRequest("train-0.0", weights, examples)])
        assert result.outcome == "accepted"
        weights = result.weights
        revisions.append(weights)
        log = WriteRecord(
            revision=weights.revision,
            examples=examples,
            flashcards=(card,),
            extraction="cards",
            rejected_flashcards=0,
            prompt_tokens=len(examples[0].prompt_ids),
            answer_tokens=len(examples[0].answer_ids),
            loss_before=result.loss_before,
            loss_after=result.loss_after,
            steps=result.steps,
            seconds=result.seconds,
            outcome="accepted",
            reason="",
        )
        writes.append(WriteEntry(number, log, (), "passed"))
    prompt, said = write_example(CARDS[0], SYSTEM, chat).prompt_ids, chat.reply("a hat")
    ids = (*prompt, *said)
    contexts = [
        SegmentRecord(revision, ids, (Passage("extract", len(prompt), len(ids), "cards"),))
        for revision in (0, 1)
    ]
    asked = SegmentRecord(2, ids, (Passage("act", len(prompt), len(ids), "a hat"),))
    record = EpisodeRecord(
        origin=Origin(
            run_dir.name, "train", "", 1, "worker-0", str(tiny_model_path), "parametric", "settings-0.yaml"
        ),
        task_id="t",
        environment="recall",
        episode_id="train-0.0",
        policy_version=0,
        basis_id=basis.id,
        segments=(*contexts, asked),
        writes=tuple(writes),
        memory_events={},
        outcome=Outcome(
            0.0, {}, (Answer(CARDS[0].question, ("a green backpack",), "a hat", "", {"f1": 0.0}),)
        ),
        siblings=(0.0,),
        stop_reason="done",
        timings=Timings(1.0, 0.2, 0.2, 0.2, 0.2, 0.2),
        ended=1.8e9,
    )
    return Played(save(record, run_dir / FOLDER), record, config, basis, chat, tuple(revisions))


def generated(played: Played, weights: FastWeights | None) -> str:
    """Answer by transformers, greedily, with W + BA by hooks."""
    model = AutoModelForCausalLM.from_pretrained(played.config.model.name, dtype=torch.float32)
    injector = DeltaInjector(model, played.basis)
    prompt = torch.tensor([write_example(CARDS[0], SYSTEM, played.chat).prompt_ids])
    with torch.no_grad(), injector.use(None if weights is None else stack([weights], played.basis)):
        stop = list(played.chat.stop_token_ids)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=2,
        )
    return played.chat.decode(out[0, prompt.shape[1] :].tolist())


def test_the_two_answers_are_those_of_transformers(played: Played) -> None:
    (answer,) = compare(played.record, played.path, None)
    assert (answer.segment, answer.said) == (2, "a hat")
    assert answer.with_delta == generated(played, played.revisions[1])
    assert answer.without == generated(played, None)
    assert answer.with_delta != answer.without


def test_the_page_shows_both(played: Played, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (answer,) = compare(played.record, played.path, None)
    page = tmp_path / "episode.html"
    assert cli.main(["inspect", str(played.path), "--compare", "--html", str(page)]) == 0
    assert "with Delta = 0" in page.read_text()
    assert capsys.readouterr().err == ""
    assert answer.said in page.read_text() and answer.with_delta in page.read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"policy_version": 4},
            "was played on policy version 4, there are checkpoints of none here: give its checkpoint",
        ),
        ({"basis_id": "other"}, "no basis other in"),
        ({"loss": 9.0}, "logged a loss of 9.00000 after it"),
        ({"segments": ()}, "every answer was given without fast weights"),
    ],
)
def test_a_record_that_does_not_fit_is_one_line(
    played: Played, tmp_path: Path, change: dict[str, object], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / FOLDER
    save_text((played.path.parent / "settings-0.yaml").read_text(), folder / "settings-0.yaml")
    if "basis_id" not in change:
        save_basis(played.basis, tmp_path / "basis.safetensors")
    content = json.loads(played.path.read_text())
    if "loss" in change:
        content["writes"][0]["log"]["loss_after"] = change["loss"]
    elif "segments" in change:
        content["segments"] = [dict(segment, revision=0) for segment in content["segments"]]
    else:
        content |= change
    path = folder / "x.json"
    path.write_text(json.dumps(content))
    assert cli.main(["inspect", str(path), "--compare"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
