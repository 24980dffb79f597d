"""The probe: its cards and grid, its measurements against transformers, and the command up to the report."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.environments.recall import SYSTEM_PROMPT
from actors.environments.recall_words import PEOPLE, RELATIONS
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis, DeltaInjector, stack, zero
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import write_example
from actors.types import FastWeights, Flashcard, WriteExample, WriteRequest, WriteResult
from actors.write.frozen_llama import FrozenLlama, read_model
from actors.write.writer import BatchedWriter
from cluster.cli import main
from cluster.measure.report import colour
from cluster.probe import run as probe_run
from cluster.probe.cards import (
    PARAPHRASES,
    cards_of,
    examples_of,
    flashcards_of,
    read_cards,
    recall_cards,
    unrelated_pieces,
)
from cluster.probe.cell import Teacher, in_writes, points_of, run_cell
from cluster.probe.examiner import RUN_ON, Examiner, Stray
from cluster.probe.grid import load_grid
from cluster.probe.reading import Reader, merged_layers
from cluster.probe.report import ProbeReport, metrics, save_report
from cluster.probe.values import SUPERVISIONS, Cell, CellRun, Point, ProbeError, Supervision, TextPiece
from configs.files import dump_json, parse_json
from configs.load import ConfigError
from configs.schema import FastWeightsConfig, WriteConfig

DATA = Path("tests/data/probe_cards.jsonl")
QUICKSTART = Path("tests/quickstart.yaml")
FAST = FastWeightsConfig(last_layers=2)
ADAM = WriteConfig(optimizer="adam", learning_rate=3e-3, epochs=3, batch_size=2)
PIECES = (
    TextPiece("text", "", "The mill by the river stopped turning years ago."),
    TextPiece("reply", "Is it late?", "It is not late at all."),
)

STRAYS = (
    Stray("stranger", "Where does Farid live?", 0),
    Stray("same_person", "What is the keeper's name?", 1),
    Stray("same_person", "Who cleans the mill?", 2),
)


# --- cards ----------------------------------------------------------------------------------------------


def test_a_file_of_cards_in_either_wording_and_form(tmp_path: Path) -> None:
    cards = read_cards(DATA)
    assert [len(card.paraphrases) for card in cards] == [2, 1, 0, 1]
    assert cards[1].question == "On which shelf does Jonas keep the maps?"
    assert cards[1].answer == "the top shelf"
    assert cards[2].answer == "14"
    whole = tmp_path / "cards.json"
    whole.write_text(json.dumps([json.loads(line) for line in DATA.read_text().splitlines()]))
    assert read_cards(whole) == cards
    assert cards_of(str(DATA), 0) == cards
    assert sorted(cards_of(str(DATA), 1), key=str) == sorted(cards, key=str)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"question": "a?", "answer": "b"}\n{"question": "a', ["line 2", "Invalid JSON"]),
        ('{"question": "a?"}', ["line 1", "answer: Field required"]),
        ('{"question": "", "answer": "b"}', ["line 1", "question: ", "not empty"]),
        ('{"question": "a?", "answer": null}', ["line 1", "answer: ", "a text that is not empty"]),
        (
            '{"question": "a?", "answer": "b", "paraphrases": "c?"}',
            ["line 1", "paraphrases: ", "a valid array"],
        ),
        ('{"question": "a?", "answer": "b", "paraphrases": [3, []]}', ["line 1", "paraphrases.1: "]),
        ('[{"question": "a?", "answer": "b"}, 7]', ["item 2", "an object"]),
        ('[{"question": "a?", "answer": "b"},]', ["Invalid JSON"]),
        (
            '{"question": "a?", "answer": "b"}\n{"question": "a?", "answer": "c"}',
            ["line 2", "was there before"],
        ),
        ("\n", ["holds no card"]),
    ],
)
def test_a_bad_card_is_named_with_its_line_and_field(text: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "cards.jsonl"
    path.write_text(text)
    with pytest.raises(ProbeError) as error:
        read_cards(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert [part for part in parts if part not in str(error.value)] == []


def test_made_up_facts_are_seeded_unique_and_held_out() -> None:
    cards = recall_cards(60, "eval", 3)
    assert cards == cards_of("recall:60", 3)
    assert cards != cards_of("recall:60", 4)
    assert len({card.question for card in cards}) == 60
    tuning = cards_of("recall:train:60", 3)
    names = {split: set(PEOPLE[split]) for split in ("train", "eval")}
    for own, other, made in (("eval", "train", cards), ("train", "eval", tuning)):
        words = {word for card in made for word in card.question.replace("'s", "").replace("?", "").split()}
        assert words & names[own]
        assert not words & names[other]


def test_paraphrases_are_wordings_that_are_never_written_or_told() -> None:
    assert set(PARAPHRASES) == {relation.name for relation in RELATIONS}
    for relation in RELATIONS:
        wordings = [*relation.tellings, *relation.questions, *PARAPHRASES[relation.name]]
        assert len(set(wordings)) == len(wordings)
    for card in recall_cards(100, "train", 0):
        assert len(card.paraphrases) == 3
        assert not any(card.answer in asked for asked in (card.question, *card.paraphrases))


def test_a_fact_is_written_in_two_wordings_where_the_source_says_so() -> None:
    once, twice = cards_of("recall:5", 1), cards_of("recall:5x2", 1)
    assert once == cards_of("recall:5x1", 1)
    for card, reworded in zip(once, twice, strict=True):
        assert (card.question, card.answer) == (reworded.question, reworded.answer)
        assert (reworded.also, reworded.paraphrases) == (card.paraphrases[:1], card.paraphrases[1:])
    written = flashcards_of(twice)
    assert [(card.question, card.answer) for card in written[:2]] == [
        (twice[0].question, twice[0].answer),
        (twice[0].also[0], twice[0].answer),
    ]
    assert len(written) == 10


@pytest.mark.parametrize(
    "source",
    ["recall:0", "recall:", "recall:test:4", "recall:9999", "nowhere.jsonl", "recall:4x3", "recall:4x"],
)
def test_a_source_without_cards_is_refused(source: str) -> None:
    with pytest.raises(ProbeError, match=f"--cards {source}|--cards asks for 9999 facts"):
        cards_of(source, 0)


def test_unrelated_text_is_shipped_or_a_users(tmp_path: Path) -> None:
    shipped = unrelated_pieces(None)
    assert {piece.kind for piece in shipped} == {"text", "reply"}
    told = {
        value for relation in RELATIONS for split in ("train", "eval") for value in relation.values[split]
    }
    assert not {piece.text for piece in shipped} & told
    path = tmp_path / "novel.txt"
    path.write_text("It was a\nlong day.\n\n\nThen came the night.\n\nEnd")
    assert [piece.text for piece in unrelated_pieces(path)] == ["It was a long day.", "Then came the night."]
    assert {piece.kind for piece in unrelated_pieces(DATA)} == {"reply"}
    path.write_text("\n \n")
    with pytest.raises(ProbeError, match="no text"):
        unrelated_pieces(path)


# --- the grid -------------------------------------------------------------------------------------------


def test_the_grid_is_every_value_with_every_other_for_each_cell() -> None:
    cells = [["write.optimizer=sgd", "write.epochs=5"], ["write.optimizer=adam"]]
    sweeps = ["fast_weights.basis=svd,random", "fast_weights.projections=[down_proj],[up_proj,gate_proj]"]
    _, grid = load_grid(QUICKSTART, ["write.batch_size=3"], cells, sweeps)
    assert len(grid) == 8
    assert {cell.write.batch_size for cell in grid} == {3}
    first = [
        (cell.write.optimizer, cell.fast_weights.basis, len(cell.fast_weights.projections))
        for cell in grid[:5]
    ]
    sgd = [("sgd", "svd", 1), ("sgd", "svd", 2), ("sgd", "random", 1), ("sgd", "random", 2)]
    assert first == [*sgd, ("adam", "svd", 1)]
    assert len({cell.label for cell in grid}) == 8
    assert load_grid(QUICKSTART, [], [], [])[1][0].label == "as configured"


@pytest.mark.parametrize(
    ("sweep", "part"),
    [
        ("train.steps=1,2", "write.*, fast_weights.* and supervision"),
        ("supervision=raw,all", "'supervision=all': must be one of flashcards, summary, raw"),
        ("write.epochs", "key=value1,value2"),
        ("write.epochs=2,x", "whole number"),
        ("write.epoch=2", "write.epochs"),
    ],
)
def test_a_bad_sweep_is_a_config_error(sweep: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part.replace("*", r"\*")):
        load_grid(QUICKSTART, [], [], [sweep])


def test_a_key_that_is_swept_twice_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"write\.epochs is given twice: write write\.epochs=1,2"):
        load_grid(QUICKSTART, [], [], ["write.epochs=1", "write.epochs=2"])


def test_what_is_written_of_the_same_facts_is_a_setting_of_the_grid(tiny: SimpleNamespace) -> None:
    _, grid = load_grid(QUICKSTART, [], [], ["supervision=flashcards,summary,raw"])
    supervisions = [cell.supervision for cell in grid]
    assert [cell.label for cell in grid] == [f"supervision={name}" for name in supervisions]
    cards, chat = recall_cards(4, "eval", 0), tiny.chat
    write = WriteConfig()
    examples = {name: examples_of(name, cards, (), SYSTEM_PROMPT, chat, write) for name in supervisions}
    opening = chat.system(SYSTEM_PROMPT)

    answers = [chat.decode(example.answer_ids).strip() for example in examples["flashcards"]]
    assert answers == [card.answer for card in cards]
    (summary,) = examples["summary"]
    assert chat.decode(summary.answer_ids).strip() == " ".join(card.telling for card in cards)
    (raw,) = examples["raw"]
    text = chat.decode(raw.answer_ids)
    assert raw.prompt_ids == opening and all(card.telling in text for card in cards)
    assert text.count(".") == 8, "as many sentences about nothing"
    assert not any(card.question in text for card in cards)

    small = WriteConfig(max_example_tokens=len(opening) + 20)
    pieces = examples_of("raw", cards, (), SYSTEM_PROMPT, chat, small)
    assert len(pieces) > 1 and sum((piece.answer_ids for piece in pieces), ()) == raw.answer_ids


def test_cards_are_dealt_to_writes_and_measurements_counted() -> None:
    assert [len(places) for places in in_writes(10, 4)] == [2, 3, 2, 3]
    assert [place for places in in_writes(10, 4) for place in places] == list(range(10))
    cell = Cell((), FAST, ADAM)
    assert points_of(cell, [3, 5], each_step=False) == 2
    assert points_of(cell, [3, 5], each_step=True) == 3 * 2 + 3 * 3
    assert points_of(Cell((), FAST, replace(ADAM, epochs=0)), [3, 3], each_step=True) == 2


# --- measurements, against transformers -----------------------------------------------------------------


class Reference:
    """The same model in transformers, one text at a time. Hooks add Delta."""

    def __init__(self, path: Path, basis: Basis) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._injector, self._basis = DeltaInjector(self._model, basis), basis

    def table(self, ids: tuple[int, ...], weights: FastWeights) -> Tensor:
        with torch.no_grad(), self._injector.use(stack([weights], self._basis)):
            return self._model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def of(self, example: WriteExample, weights: FastWeights) -> Tensor:
        """Log-probs [answer, vocabulary]."""
        ids = (*example.prompt_ids, *example.answer_ids[:-1])
        return self.table(ids, weights)[len(example.prompt_ids) - 1 :]

    def greedy(
        self, prompt: tuple[int, ...], weights: FastWeights, stop: tuple[int, ...], most: int
    ) -> tuple[int, ...]:
        said: tuple[int, ...] = ()
        while len(said) < most and (not said or said[-1] not in stop):
            said = (*said, int(self.table(prompt + said, weights)[-1].argmax()))
        return said


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> SimpleNamespace:
    torch.set_num_threads(1)
    basis = compute_basis_from_checkpoint(tiny_model_path, FAST, seed=0)
    model: FrozenLlama = read_model(str(tiny_model_path), "float32", torch.device("cpu"))
    chat = ChatFormat(AutoTokenizer.from_pretrained(tiny_model_path))
    cards = read_cards(DATA)
    reader = Reader(model, chat.stop_token_ids)
    groups = [cards[:2], cards[2:]]
    examiner = Examiner(reader, chat, SYSTEM_PROMPT, groups, PIECES, STRAYS)
    draw = np.random.default_rng(0)
    b = {
        name: draw.normal(0, 0.05, (rows, basis.rank)).astype(np.float32)
        for name, rows in basis.d_out.items()
    }
    return SimpleNamespace(
        path=tiny_model_path,
        basis=basis,
        model=model,
        chat=chat,
        cards=cards,
        groups=groups,
        reader=reader,
        examiner=examiner,
        teacher=Teacher(reader, chat, SYSTEM_PROMPT, groups, None, 0),
        weights=FastWeights(basis.id, 1, b),
    )


def test_an_examination_is_what_transformers_says(tiny: SimpleNamespace) -> None:
    reference = Reference(tiny.path, tiny.basis)
    point: Point = tiny.examiner.examine(tiny.basis, tiny.weights, 2, 1)
    assert [(card.card, card.write) for card in point.cards] == [(0, 1), (1, 1), (2, 2), (3, 2)]
    for score, card in zip(point.cards, tiny.cards, strict=True):
        ways = zip((score.written, *score.paraphrased), (card.question, *card.paraphrases), strict=True)
        for asked, question in ways:
            example = write_example(Flashcard(question, card.answer), SYSTEM_PROMPT, tiny.chat)
            target = torch.tensor(example.answer_ids)[:, None]
            logprobs = reference.of(example, tiny.weights).gather(1, target)
            assert asked.loss == pytest.approx(-float(logprobs.mean()), abs=1e-4)
            group = tiny.cards[(score.write - 1) * 2 :][:2]
            most = max(len(tiny.chat.reply(other.answer)) for other in group) + RUN_ON
            said = reference.greedy(example.prompt_ids, tiny.weights, tiny.chat.stop_token_ids, most)
            assert asked.said == tiny.chat.decode(said).strip()
    text = tiny.chat.encode(PIECES[0].text)
    reply = write_example(Flashcard(PIECES[1].prompt, PIECES[1].text), SYSTEM_PROMPT, tiny.chat)
    for score, example in zip(point.texts, (WriteExample(text[:1], text[1:]), reply), strict=True):
        base, now = (reference.of(example, weights) for weights in (zero(tiny.basis), tiny.weights))
        target = torch.tensor(example.answer_ids)[:, None]
        assert score.damage == pytest.approx(float((base - now).gather(1, target).mean()), abs=1e-4)
        assert score.kl == pytest.approx(float((base.exp() * (base - now)).sum(-1).mean()), abs=1e-4)
        assert score.kl > 1e-3


def test_decoding_goes_on_where_the_draft_was_wrong(tiny: SimpleNamespace) -> None:
    """The drafts are right in part, as a whole and not at all. The greedy tokens are the same."""
    reference = Reference(tiny.path, tiny.basis)
    layers = merged_layers(tiny.model, tiny.basis, tiny.weights)
    prompts = [tiny.chat.encode(text) for text in ("The third of many", "One", "Nobody knew that the")]
    right = [reference.greedy(prompt, tiny.weights, (), 6) for prompt in prompts]
    drafts = [(*right[0][:3], 11, 12), right[1], (7, 8, 9)]
    examples = [WriteExample(prompt, draft) for prompt, draft in zip(prompts, drafts, strict=True)]
    said: dict[int, tuple[int, ...]] = {}
    for block in tiny.reader.prepare(examples, tiny.basis.first_layer, answered=True):
        answers = Reader(tiny.model, ()).answer(block, tiny.reader.read(block, layers), layers, 6)
        said.update(zip(block.numbers, answers, strict=True))
    assert [said[i] for i in range(3)] == right


def test_delta_zero_does_no_damage_to_the_bit(tiny: SimpleNamespace) -> None:
    other = FastWeightsConfig(last_layers=6, projections=("down_proj",))
    for basis in (tiny.basis, compute_basis_from_checkpoint(tiny.path, other, seed=0)):
        point = tiny.examiner.examine(basis, zero(basis), 0, 0)
        assert len(point.cards) == 4
        assert [(text.damage, text.kl) for text in point.texts] == [(0.0, 0.0), (0.0, 0.0)]


def test_an_a_of_its_own_is_merged_too(tiny: SimpleNamespace) -> None:
    basis = compute_basis_from_checkpoint(tiny.path, replace(FAST, train_a=True), seed=0)
    twice = FastWeights(basis.id, 1, tiny.weights.b, {name: 2 * a.numpy() for name, a in basis.a.items()})
    doubled = FastWeights(tiny.basis.id, 1, {name: 2 * b for name, b in tiny.weights.b.items()})
    own_a = tiny.examiner.examine(basis, twice, 2, 1)
    scaled_b = tiny.examiner.examine(tiny.basis, doubled, 2, 1)
    assert [card.written.said for card in own_a.cards] == [card.written.said for card in scaled_b.cards]
    assert own_a.loss(False) == pytest.approx(scaled_b.loss(False), abs=1e-5)


# --- cells ----------------------------------------------------------------------------------------------


def cell_run(tiny: SimpleNamespace, write: WriteConfig, writes: int, each_step: bool) -> tuple[CellRun, int]:
    points = 0

    def count() -> None:
        nonlocal points
        points += 1

    untouched = tiny.examiner.examine(tiny.basis, zero(tiny.basis), 0, 0)
    writer = BatchedWriter(tiny.model, tiny.basis, write)
    parts, groups = (writer, tiny.teacher, tiny.examiner, untouched), tiny.groups[:writes]
    run = run_cell(Cell((), FAST, write), 0, tiny.basis, *parts, groups, each_step, count)
    return run, points


def test_the_steps_are_the_writers_own(tiny: SimpleNamespace) -> None:
    """An epoch has two batches here, so a step is no epoch.

    A write with fewer epochs stops earlier, no more.
    """
    cell = Cell((), FAST, ADAM)
    examples = [example for n in (1, 2) for example in tiny.teacher.examples(n, cell, ())]
    request = WriteRequest("probe", zero(tiny.basis), tuple(examples))
    config = replace(ADAM, batch_size=2)
    result, trace = BatchedWriter(tiny.model, tiny.basis, config).trace(request)
    assert len(trace) == result.steps == 6
    (whole,) = BatchedWriter(tiny.model, tiny.basis, config).write([request])
    (shorter,) = BatchedWriter(tiny.model, tiny.basis, replace(config, epochs=2)).write([request])
    for name in whole.weights.b:
        assert np.array_equal(whole.weights.b[name], trace[-1].b[name])
        assert np.array_equal(shorter.weights.b[name], trace[3].b[name])
        assert not np.array_equal(trace[4].b[name], trace[5].b[name])


def test_each_step_ends_where_the_write_does(tiny: SimpleNamespace) -> None:
    stepped, points = cell_run(tiny, ADAM, 2, each_step=True)
    plain, _ = cell_run(tiny, ADAM, 2, each_step=False)
    assert points == points_of(Cell((), FAST, ADAM), [2, 2], each_step=True) == 6
    assert [(point.write, point.step, len(point.cards)) for point in stepped.steps] == [
        (w, s, 2 * w) for w in (1, 2) for s in (1, 2, 3)
    ]
    assert stepped.after == plain.after
    assert [line.cpu_s > 0 for line in plain.writes] == [True, True]
    assert stepped.steps[-1] == plain.after[-1]
    assert plain.steps == ()
    assert plain.after[1].loss(False) < plain.after[0].loss(False)
    assert plain.writes[0].loss_after == pytest.approx(plain.after[1].loss(False), abs=1e-4)


def test_a_write_that_is_rolled_back_is_shown_and_leaves_the_state(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    diverging = replace(ADAM, optimizer="sgd", learning_rate=1e30)
    run, _ = cell_run(tiny, diverging, 2, each_step=True)
    assert [line.outcome for line in run.writes] == ["rolled_back", "rolled_back"]
    assert [(text.damage, text.kl) for text in run.after[-1].texts] == [(0.0, 0.0)] * 2
    assert [card.written for card in run.after[-1].cards] == [card.written for card in run.after[0].cards]
    assert run.steps and not math.isfinite(run.steps[0].loss(False))
    assert all(math.isfinite(value) for logged, _ in metrics(run) for value in logged.values())
    report = ProbeReport((run,), {0: tiny.cards}, {}, 100, 0)
    (table, forgetting) = report.tables()
    assert table.rows[0][-1] == "0/0/2"
    assert [row[-1] for row in forgetting.rows] == ["1", "1"]
    assert (
        sum("rolled back: " in note and "write.learning_rate=1e+30" in note for note in report.notes()) == 2
    )
    data = json.loads(
        next(path for path in save_report(report, tmp_path) if path.suffix == ".json").read_text()
    )
    assert data["runs"][0]["writes"][0]["loss_after"] is None


def test_no_epochs_are_no_write(tiny: SimpleNamespace) -> None:
    run, _ = cell_run(tiny, replace(ADAM, epochs=0), 1, each_step=True)
    assert run.writes[0].outcome == "empty"
    assert run.after[1].texts == run.after[0].texts


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_only_flashcards_are_rehearsed_and_measurements_are_counted_by_examples(
    tiny: SimpleNamespace, supervision: Supervision
) -> None:
    cards = recall_cards(4, "eval", 0)
    groups = [cards[:2], cards[2:]]
    examiner = Examiner(tiny.reader, tiny.chat, SYSTEM_PROMPT, groups, PIECES)
    teacher = Teacher(tiny.reader, tiny.chat, SYSTEM_PROMPT, groups, None, 0)
    write = replace(
        ADAM,
        epochs=1,
        batch_size=1,
        rehearsal=1,
        max_example_tokens=len(tiny.chat.system(SYSTEM_PROMPT)) + 40,
    )
    cell = Cell((), FAST, write, supervision)
    requests: list[WriteRequest] = []
    counted: list[None] = []

    class Recorded(BatchedWriter):
        def trace(self, request: WriteRequest) -> tuple[WriteResult, tuple[FastWeights, ...]]:
            requests.append(request)
            return super().trace(request)

    untouched = examiner.examine(tiny.basis, zero(tiny.basis), 0, 0)
    writer = Recorded(tiny.model, tiny.basis, write)
    parts = (writer, teacher, examiner, untouched)
    run = run_cell(cell, 0, tiny.basis, *parts, groups, True, lambda: counted.append(None))
    fresh = [teacher.examples(number, cell, ()) for number in (1, 2)]
    sizes = list(map(len, fresh))
    assert (sizes == [2, 2]) == (supervision == "flashcards"), "a card is an example only there"
    first, second = (request.examples for request in requests)
    newest = first[-1:] if supervision == "flashcards" else ()
    assert second == (*fresh[1], *newest)
    assert [line.outcome for line in run.writes] == ["accepted", "accepted"]
    promised = points_of(cell, [sizes[0], sizes[1] + len(newest)], each_step=True)
    assert len(counted) == promised == len(first) + len(second)


def test_a_write_that_is_rolled_back_after_its_last_step_counts_no_more_than_was_promised(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchedWriter, "_refusal", lambda *_: "the loss rose")
    run, points = cell_run(tiny, ADAM, 2, each_step=True)
    assert [(line.outcome, line.steps) for line in run.writes] == [("rolled_back", 3)] * 2
    assert points == len(run.steps) == points_of(Cell((), FAST, ADAM), [2, 2], each_step=True)
    assert run.after[-1].loss(False) == pytest.approx(run.after[0].loss(False)), (
        "what is in force is measured all the same"
    )


@pytest.mark.parametrize("cells", [1, 10, 11, 24])
def test_no_two_cells_of_a_plot_have_one_colour(cells: int) -> None:
    from matplotlib.colors import to_rgba

    assert len({to_rgba(colour(number, cells)) for number in range(cells)}) == cells


def test_a_run_survives_json(tiny: SimpleNamespace) -> None:
    run, _ = cell_run(tiny, ADAM, 2, each_step=True)
    assert parse_json(dump_json(run), CellRun) == run


def test_a_run_that_diverged_survives_json_too(tiny: SimpleNamespace) -> None:
    run, _ = cell_run(tiny, replace(ADAM, optimizer="sgd", learning_rate=1e30), 1, each_step=True)
    (step,) = parse_json(dump_json(run), CellRun).steps[:1]
    assert math.isnan(step.loss(False)) and step.cards[0].written.said == run.steps[0].cards[0].written.said


# --- the command ----------------------------------------------------------------------------------------


def arguments(tiny_path: Path, folder: Path, *more: str, tracking: bool = True) -> list[str]:
    settings = [
        f"model.name={tiny_path}",
        f"output_dir={folder}",
        "fast_weights.last_layers=2",
        "write.learning_rate=3e-3",
        "write.epochs=2",
        "evaluation.bootstrap_samples=100",
        f"tracking.enabled={tracking}",
    ]
    asked = ["--cards", str(DATA), "--unrelated", str(DATA), "--writes", "2", "--each-step"]
    return ["probe", str(QUICKSTART), *settings, "rollout.threads=1", *asked, *more]


def test_from_the_command_line_to_the_report_and_on(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = ["--sweep", "write.optimizer=sgd,adam"]
    assert main(arguments(tiny_model_path, tmp_path, *sweep)) == 0
    out = capsys.readouterr().out
    assert "optimizer=sgd" in out
    assert "left" in out
    (folder,) = tmp_path.glob("quickstart-probe-*")
    names = {path.name for path in folder.iterdir()}
    assert {
        "report.md",
        "report.csv",
        "report.json",
        "recall_damage.png",
        "steps.png",
        "forgetting.png",
        "probe.json",
        "cells",
    } <= names
    lines = list(csv.DictReader((folder / "report.csv").open()))
    assert [line["cell"] for line in lines if line["phase"] == "after"] == ["optimizer=sgd"] * 3 + [
        "optimizer=adam"
    ] * 3
    assert len([line for line in lines if line["phase"] == "step"]) == 8
    data = json.loads((folder / "report.json").read_text())
    assert len(data["runs"][1]["after"][2]["cards"]) == 4
    assert "reworded" in (report := (folder / "report.md").read_text())
    assert "## optimizer=adam, against each other cell" in report
    _check_mlflow(tmp_path, "probe/optimizer_adam/seed_0/em_written", points=3)

    def refuse(*_: object) -> None:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(probe_run, "run_cell", refuse)
    before = (folder / "report.json").read_text()
    assert main(arguments(tiny_model_path, tmp_path, *sweep, "--resume", str(folder))) == 0
    assert "2 of 2 cells are done already" in capsys.readouterr().out
    assert (folder / "report.json").read_text() == before

    for change, part in (
        ("--writes=4", "--writes=2, not 4"),
        ("write.batch_size=5", "write.batch_size=16, not 5"),
    ):
        assert main([*arguments(tiny_model_path, tmp_path, *sweep, "--resume", str(folder)), change]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert part in error


def test_the_progress_counts_the_examples_of_a_transcript_not_its_cards(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [
        "--cards",
        "recall:4",
        "--cell",
        "supervision=raw",
        "write.epochs=1",
        "write.batch_size=1",
        "fast_weights.rank=1",
    ]
    assert main(arguments(tiny_model_path, tmp_path, *more, tracking=False)) == 0
    assert "measurements: 2 of 2 in" in capsys.readouterr().out, (
        "the two cards of a write are told in one text"
    )


def _check_mlflow(folder: Path, key: str, points: int) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("engram").experiment_id])
    assert run.info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, key)] == list(range(points))
    assert "report.md" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ([], "needs --cards"),
        (["--cards", "nowhere.jsonl"], "no such file"),
        (["--cards", str(DATA), "--writes", "5"], "there are 4 cards"),
        (["--cards", str(DATA), "--resume", "tests"], "no probe ran there"),
        (["--cards", str(DATA), "--unrelated", "nowhere.txt"], "no such file"),
        (["--cards", str(DATA), "--sweep", "write.max_example_tokens=300,20"], "write.max_example_tokens=20"),
        (
            ["--cards", str(DATA), "--sweep", "supervision=raw"],
            "has no 'telling', which supervision=raw trains on",
        ),
    ],
)
def test_a_mistake_is_one_line(
    more: list[str], part: str, tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["probe", str(QUICKSTART), f"model.name={tiny_model_path}", f"output_dir={tmp_path}", *more])
        == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert part in error
    assert list(tmp_path.iterdir()) == []
