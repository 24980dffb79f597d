"""``python -m cluster probe``: checks cards, model and folder first, then runs cell by cell, then reports.

FOLDER/cells/<cell>-<seed>.json is written when a cell is done. A run that was stopped goes on with
--resume FOLDER and repeats no finished cell.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from actors.environments.recall import SYSTEM_PROMPT
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis, zero
from actors.protocols import WriterError
from actors.text.chat_template import ChatFormat, open_chat
from actors.write.frozen_llama import FrozenLlama, read_model
from actors.write.writer import BatchedWriter
from cluster.common.day import with_day
from cluster.common.display import Display
from cluster.common.folders import output_folder, require_writable
from cluster.common.git import git_commit
from cluster.measure.report import show
from cluster.probe.cards import cards_of, examples_of, unrelated_pieces
from cluster.probe.cell import Teacher, in_writes, points_of, run_cell
from cluster.probe.examiner import Examiner, Stray, questioner_of, strays_of
from cluster.probe.reading import Reader
from cluster.probe.report import ProbeReport, metrics, save_report
from cluster.probe.values import LEAKS, Card, Cell, CellRun, Point, ProbeError, TextPiece
from cluster.tracking.tracker import RunStatus, Tracker, open_run, require_server
from configs.files import FileError, dump_json, read_json, write_text
from configs.load import flatten
from configs.models import ResolvedModel, resolve_model
from configs.schema import RunConfig

PLAN = "probe.json"


@dataclass(frozen=True, slots=True)
class ProbeOptions:
    """The command line's options. ``cards``: see cards_of. ``writes``: how many writes the cards come in.

    ``resume``: the folder of an earlier run.
    """

    cards: str
    unrelated: Path | None
    each_step: bool
    writes: int
    seeds: tuple[int, ...]
    resume: Path | None


@dataclass(frozen=True, slots=True)
class _PlanFile:
    """The content of probe.json. ``plan``: what must not change when the folder is resumed."""

    plan: Mapping[str, Any]
    mlflow_run_id: str


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """All that a mistake could be in. ``cards`` and ``strays``: by seed."""

    config: RunConfig
    options: ProbeOptions
    cells: tuple[Cell, ...]
    cards: Mapping[int, tuple[Card, ...]]
    strays: Mapping[int, tuple[Stray, ...]]
    pieces: tuple[TextPiece, ...]
    model: ResolvedModel
    chat: ChatFormat
    folder: Path
    plan: Mapping[str, Any]

    def groups(self, seed: int) -> list[list[Card]]:
        """The cards of each write."""
        return _dealt(self.cards[seed], self.options.writes)

    def points(self, cell: Cell, seed: int) -> int:
        """The most measurements of a cell."""
        sizes: list[int] = []
        earlier: list[Card] = []
        for group in self.groups(seed):
            examples = examples_of(cell.supervision, group, earlier, SYSTEM_PROMPT, self.chat, cell.write)
            sizes.append(len(examples))
            earlier += group
        return points_of(cell, sizes, self.options.each_step)

    def path_of(self, cell: Cell, seed: int) -> Path:
        settings = [asdict(cell.fast_weights), asdict(cell.write), cell.supervision]
        return self.folder / "cells" / f"{_digest(settings)}-{seed}.json"


def probe(config: RunConfig, cells: Sequence[Cell], options: ProbeOptions, display: Display) -> ProbeReport:
    """Run the grid, show and save the report. Finished cells stay in the folder if it fails.

    Raises ProbeError, ModelError, ChatTemplateError, BasisError, TrackingError.
    """
    prepared = _prepare(config, cells, options)
    tracker = _track(prepared)
    status: RunStatus = "FAILED"
    try:
        runs = _run_all(prepared, tracker, display)
        samples = config.evaluation.bootstrap_samples
        report = ProbeReport(tuple(runs), prepared.cards, _facts(prepared), samples, config.seed)
        for path in save_report(report, prepared.folder):
            tracker.artifact(path)
        status = "FINISHED"
    finally:
        tracker.finish(status)
    show(report.document(), display)
    display.say(f"report:  {prepared.folder / 'report.md'}")
    display.say(f"metrics: {tracker.location}")
    return report


# --- before the model is read -----------------------------------------------------------------------------


def _prepare(config: RunConfig, cells: Sequence[Cell], options: ProbeOptions) -> _Prepared:
    output_dir = output_folder(config)
    require_writable(output_dir, "output_dir")
    require_server(config.tracking, output_dir)
    cards = {seed: cards_of(options.cards, seed) for seed in options.seeds}
    fewest = min(map(len, cards.values()))
    if options.writes > fewest:
        raise ProbeError(
            f"--writes {options.writes} is not allowed: there are {fewest} cards, and each write needs one; "
            "lower it"
        )
    pieces = unrelated_pieces(options.unrelated)
    pool = max(cell.write.preserve.questions if cell.write.preserve.weight else 0 for cell in cells)
    strays = {
        seed: strays_of(options.cards, _dealt(of_seed, options.writes), pool, seed)
        for seed, of_seed in cards.items()
    }
    model = resolve_model(config.model)
    chat = open_chat(model.path, config.model)
    _check_cards(options.cards, [card for of_seed in cards.values() for card in of_seed], cells, chat)
    config = with_day(config, chat, _day_of(options.resume))
    chat = open_chat(model.path, config.model)
    plan = _plan(config, options, cards, strays, pieces, model)
    folder = options.resume
    if folder is not None:
        _check_plan(folder, plan)
    else:
        folder = output_dir / f"{config.name}-probe-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = folder.expanduser().absolute()
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    return _Prepared(config, options, tuple(cells), cards, strays, pieces, model, chat, folder, plan)


def _dealt(cards: Sequence[Card], writes: int) -> list[list[Card]]:
    return [[cards[place] for place in places] for places in in_writes(len(cards), writes)]


def _check_cards(source: str, cards: Sequence[Card], cells: Sequence[Cell], chat: ChatFormat) -> None:
    """Refuse cards that are too long for a write, or that lack what a cell trains on. Raises ProbeError."""
    limit = min(cell.write.max_example_tokens for cell in cells)
    frame = len(chat.system(SYSTEM_PROMPT)) + len(chat.user("")) + len(chat.assistant_open) + 1
    other = next((cell.supervision for cell in cells if cell.supervision != "flashcards"), "")
    for card in cards:
        size = frame + len(chat.encode(card.question)) + len(chat.encode(card.answer))
        if size > limit:
            raise ProbeError(
                f"the card {card.question[:60]!r} has {size} tokens, "
                f"write.max_example_tokens={limit} are allowed: shorten it or raise that"
            )
        if other and not card.telling:
            raise ProbeError(
                f"--cards {source}: the card {card.question[:60]!r} has no 'telling', "
                f"which supervision={other} trains on; give it one"
            )


def _plan(
    config: RunConfig,
    options: ProbeOptions,
    cards: Mapping[int, Sequence[Card]],
    strays: Mapping[int, Sequence[Stray]],
    pieces: Sequence[TextPiece],
    model: ResolvedModel,
) -> dict[str, Any]:
    sections = ("model.", "write.", "fast_weights.")
    settings = {key: value for key, value in flatten(config).items() if key.startswith(sections)}
    return {
        **settings,
        "--cards": _by_seed(cards),
        "the leak's questions": _by_seed(strays),
        "--unrelated": _digest([asdict(piece) for piece in pieces]),
        "--writes": options.writes,
        "--each-step": options.each_step,
        "model's weights": model.fingerprint,
    }


def _by_seed(values: Mapping[int, Sequence[Any]]) -> dict[str, str]:
    return {str(seed): _digest([asdict(value) for value in of_seed]) for seed, of_seed in values.items()}


def _day_of(folder: Path | None) -> str:
    """The day of the prompts of the probe in ``folder``; "" where there is none yet."""
    if folder is None or not (folder / PLAN).exists():
        return ""
    try:
        return str(read_json(folder / PLAN, _PlanFile).plan.get("model.date", ""))
    except FileError:  # said by _check_plan
        return ""


def _check_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Refuse to resume a folder whose cells were measured in another way. Raises ProbeError.

    The folder may grow by cells and seeds.
    """
    try:
        saved = read_json(folder / PLAN, _PlanFile).plan
    except FileNotFoundError:
        raise ProbeError(
            f"--resume {folder}: holds no {PLAN}, so no probe ran there; "
            "give the folder that a probe named, or leave --resume out"
        ) from None
    except FileError as error:
        raise ProbeError(f"--resume {folder}: {error}; start anew without --resume") from None
    for key, asked in plan.items():
        before = saved.get(key)
        if isinstance(before, dict):  # the seeds that both have
            before = {**asked, **{seed: digest for seed, digest in before.items() if seed in asked}}
        if asked != before:
            raise ProbeError(
                f"--resume {folder}: was made with {key}={before}, not {asked}: "
                "give the same, or start anew without --resume"
            )


def _track(prepared: _Prepared) -> Tracker:
    """Open the run in MLflow, the same run if the folder is resumed."""
    path = prepared.folder / PLAN
    run_id = read_json(path, _PlanFile).mlflow_run_id if path.exists() else ""
    config = prepared.config
    params = flatten(config) | {f"probe.{key}": value for key, value in _facts(prepared).items()}
    tracker = open_run(config.tracking, prepared.folder.parent, prepared.folder.name, params, run_id)
    write_text(path, dump_json(_PlanFile(prepared.plan, tracker.run_id or run_id)))
    return tracker


# --- cell by cell -----------------------------------------------------------------------------------------


def _run_all(prepared: _Prepared, tracker: Tracker, display: Display) -> list[CellRun]:
    """Every cell on every seed, in the order of the grid. Finished cells are read from their files."""
    seeds = prepared.options.seeds
    places = [(cell, seed) for seed in seeds for cell in prepared.cells]
    done = {
        (cell, seed): _load(path, cell)
        for cell, seed in places
        if (path := prepared.path_of(cell, seed)).exists()
    }
    if done:
        display.say(f"{len(done)} of {len(places)} cells are done already")
    if todo := [place for place in places if place not in done]:
        torch.set_num_threads(prepared.config.rollout.threads)
        runner = _Runner(prepared, _read_model(prepared))
        total = sum(prepared.points(cell, seed) for cell, seed in todo)
        with display.counting("measurements", total) as counter:
            for cell, seed in todo:
                run = done[cell, seed] = runner.run(cell, seed, counter.advance)
                write_text(prepared.path_of(cell, seed), dump_json(run, indent=None))
                display.say(f"{run.label}, seed {seed}: {_in_short(run)}, left {counter.time_left}")
    runs = [done[cell, seed] for cell in prepared.cells for seed in seeds]
    for values, step in (logged for run in runs for logged in metrics(run)):
        tracker.log(values, step)
    return runs


def _read_model(prepared: _Prepared) -> FrozenLlama:
    """Raises ProbeError for a folder that is not whole, and for a model that the writer does not support."""
    config = prepared.config.model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return read_model(str(prepared.model.path), config.dtype, device)
    except WriterError as error:
        raise ProbeError(f"model.name={config.name}: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class _OfSeed:
    """What the cells of a seed share. ``untouched``: the untouched model's point."""

    seed: int
    teacher: Teacher
    examiner: Examiner
    untouched: Point


class _Runner:
    """Runs cells with one model. Keeps the bases, and what belongs to the last seed."""

    def __init__(self, prepared: _Prepared, model: FrozenLlama) -> None:
        self._prepared, self._model = prepared, model
        self._bases: dict[tuple[object, int], Basis] = {}
        self._seed: _OfSeed | None = None

    def run(self, cell: Cell, seed: int, on_point: Callable[[], None]) -> CellRun:
        groups, each_step = self._prepared.groups(seed), self._prepared.options.each_step
        basis = self._basis(cell, seed)
        own = self._of_seed(seed, basis)
        writer = BatchedWriter(self._model, basis, cell.write)
        parts = (writer, own.teacher, own.examiner, own.untouched)
        return run_cell(cell, seed, basis, *parts, groups, each_step, on_point)

    def _basis(self, cell: Cell, seed: int) -> Basis:
        key = (cell.fast_weights, seed)
        if key not in self._bases:
            path = self._prepared.model.path
            self._bases[key] = compute_basis_from_checkpoint(path, cell.fast_weights, seed)
        return self._bases[key]

    def _of_seed(self, seed: int, basis: Basis) -> _OfSeed:
        if self._seed is None or self._seed.seed != seed:
            self._seed = None  # free the old examiner's memory first
            prepared, groups = self._prepared, self._prepared.groups(seed)
            chat, strays, cards = prepared.chat, prepared.strays[seed], prepared.cards[seed]
            reader = Reader(self._model, chat.stop_token_ids)
            questioner = questioner_of(prepared.options.cards, cards, strays)
            teacher = Teacher(reader, chat, SYSTEM_PROMPT, groups, questioner, seed)
            examiner = Examiner(reader, chat, SYSTEM_PROMPT, groups, prepared.pieces, strays)
            untouched = examiner.examine(basis, zero(basis), 0, 0)
            self._seed = _OfSeed(seed, teacher, examiner, untouched)
        return self._seed


def _load(path: Path, cell: Cell) -> CellRun:
    """Read a finished cell.

    It takes the names of this command line, which may say the same settings in other words.

    Raises ProbeError.
    """
    try:
        return replace(read_json(path, CellRun), settings=cell.settings, label=cell.label)
    except FileError as error:
        raise ProbeError(f"{error}; delete the file to have the cell run again") from None


def _facts(prepared: _Prepared) -> dict[str, str]:
    options = prepared.options
    counts = ", ".join(str(len(prepared.cards[seed])) for seed in options.seeds)
    return {
        "model": prepared.config.model.name,
        "commit": git_commit(Path(__file__).parent),
        "cards": f"{options.cards}: {counts} in {options.writes} write(s)",
        "seeds": ", ".join(map(str, options.seeds)),
        "unrelated": "the shipped text" if options.unrelated is None else str(options.unrelated),
    }


def _in_short(run: CellRun) -> str:
    last = run.after[-1]
    recalls = [last.recall(paraphrased, "em").values() for paraphrased in (False, True)]
    written, paraphrases = (100 * sum(values) / len(values) if values else float("nan") for values in recalls)
    refused = sum(line.outcome == "rolled_back" for line in run.writes)
    note = f", {refused} of {len(run.writes)} writes ROLLED BACK" if refused else ""
    leaks = "/".join(f"{100 * mean(last.leak(kind).values()):.0f}" for kind in LEAKS if last.leak(kind))
    damage = last.text("text", "damage")
    shares = f"recall {written:.0f} %, of paraphrases {paraphrases:.0f} %, leak {leaks} %"
    return f"{shares}, damage {damage:.3f}{note}"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
