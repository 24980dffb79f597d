"""``python -m cluster probe``: cards, model and folder first (a user's mistake ends it in seconds), then cell by cell, then the report.

cells/<cell>-<seed>.json is written when a cell is done, so a run that is stopped goes on with --resume FOLDER and repeats no finished cell.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from actors.environments.recall import SYSTEM_PROMPT
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.fast_weights.delta import Basis, zero
from actors.protocols import WriterError
from actors.text.chat_template import ChatFormat
from actors.write.frozen_llama import FrozenLlama, read_model
from actors.write.writer import BatchedWriter
from cluster.common.display import Display
from cluster.common.git import git_commit
from cluster.measure.report import show
from cluster.probe.cards import cards_of
from cluster.probe.cell import in_writes, points_of, run_cell
from cluster.probe.examiner import Examiner
from cluster.probe.reading import Reader
from cluster.probe.report import ProbeReport, metrics, save_report
from cluster.probe.supervision import examples_of
from cluster.probe.unrelated import unrelated_pieces
from cluster.probe.values import Card, Cell, CellRun, Point, ProbeError, TextPiece
from cluster.tracking.tracker import RunStatus, Tracker, open_run
from configs.load import flatten
from configs.models import ResolvedModel, resolve_model
from configs.schema import RunConfig

PLAN = "probe.json"


@dataclass(frozen=True, slots=True)
class ProbeOptions:
    """What the command line says. ``cards``: see cards_of. ``writes``: how many the cards come in. ``resume``: the folder of an earlier run."""

    cards: str
    unrelated: Path | None
    each_step: bool
    writes: int
    seeds: tuple[int, ...]
    resume: Path | None


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """All that a mistake could be in. ``plan``: what must not change when the folder is resumed."""

    config: RunConfig
    options: ProbeOptions
    cells: tuple[Cell, ...]
    cards: Mapping[int, tuple[Card, ...]]  # by seed
    pieces: tuple[TextPiece, ...]
    model: ResolvedModel
    chat: ChatFormat
    folder: Path
    plan: Mapping[str, Any]

    def groups(self, seed: int) -> list[list[Card]]:
        """The cards of each write."""
        cards = self.cards[seed]
        return [[cards[place] for place in places] for places in in_writes(len(cards), self.options.writes)]

    def sizes(self, cell: Cell, seed: int) -> list[int]:
        """Examples of each write."""
        return [
            len(examples_of(cell.supervision, group, SYSTEM_PROMPT, self.chat, cell.write))
            for group in self.groups(seed)
        ]

    def path_of(self, cell: Cell, seed: int) -> Path:
        key = json.dumps([asdict(cell.fast_weights), asdict(cell.write), cell.supervision], sort_keys=True)
        return self.folder / "cells" / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}-{seed}.json"


def probe(config: RunConfig, cells: Sequence[Cell], options: ProbeOptions, display: Display) -> ProbeReport:
    """Raises ProbeError, ModelError, ChatTemplateError, BasisError, TrackingError; what was measured by then is in the folder."""
    prepared = _prepare(config, cells, options)
    tracker = _track(prepared)
    status: RunStatus = "FAILED"
    try:
        runs = _run_all(prepared, tracker, display)
        report = ProbeReport(
            tuple(runs), prepared.cards, _facts(prepared), config.evaluation.bootstrap_samples, config.seed
        )
        for path in save_report(report, prepared.folder):
            tracker.artifact(path)
        status = "FINISHED"
    finally:
        tracker.finish(status)
    show(report.document(), display)
    display.say(f"report:  {prepared.folder / 'report.md'}")
    display.say(f"metrics: {tracker.location}")
    return report


def _prepare(config: RunConfig, cells: Sequence[Cell], options: ProbeOptions) -> _Prepared:
    from transformers import AutoTokenizer

    cards = {seed: cards_of(options.cards, seed) for seed in options.seeds}
    fewest = min(map(len, cards.values()))
    if options.writes > fewest:
        raise ProbeError(
            f"--writes {options.writes} is not allowed: there are {fewest} cards, and each write needs one; lower it"
        )
    pieces = unrelated_pieces(options.unrelated)
    model = resolve_model(config.model)
    chat = ChatFormat(
        AutoTokenizer.from_pretrained(str(model.path), trust_remote_code=config.model.trust_remote_code)
    )
    _check_lengths(cards, cells, chat)
    _check_tellings(options.cards, cards, cells)
    plan = _plan(config, options, cards, pieces, model)
    folder = options.resume
    if folder is not None:
        _check_plan(folder, plan)
    else:
        folder = (
            Path(config.output_dir).expanduser() / f"{config.name}-probe-{time.strftime('%Y%m%d-%H%M%S')}"
        )
    folder = folder.expanduser().absolute()
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    return _Prepared(config, options, tuple(cells), cards, pieces, model, chat, folder, plan)


def _check_lengths(cards: Mapping[int, Sequence[Card]], cells: Sequence[Cell], chat: ChatFormat) -> None:
    limit = min(cell.write.max_example_tokens for cell in cells)
    around = len(chat.system(SYSTEM_PROMPT)) + len(chat.user("")) + len(chat.assistant_open) + 1
    for card in {card for mine in cards.values() for card in mine}:
        if (size := around + len(chat.encode(card.question)) + len(chat.encode(card.answer))) > limit:
            raise ProbeError(
                f"the card {card.question[:60]!r} has {size} tokens, write.max_example_tokens={limit} are allowed: shorten it or raise that"
            )


def _check_tellings(source: str, cards: Mapping[int, Sequence[Card]], cells: Sequence[Cell]) -> None:
    other = next((cell.supervision for cell in cells if cell.supervision != "flashcards"), "")
    untold = next((card for mine in cards.values() for card in mine if not card.telling), None)
    if other and untold:
        raise ProbeError(
            f"--cards {source}: the card {untold.question[:60]!r} has no 'telling', which supervision={other} trains on; give it one"
        )


def _plan(
    config: RunConfig,
    options: ProbeOptions,
    cards: Mapping[int, Sequence[Card]],
    pieces: Sequence[TextPiece],
    model: ResolvedModel,
) -> dict[str, Any]:
    settings = {
        key: value
        for key, value in flatten(config).items()
        if key.startswith(("model.", "write.", "fast_weights."))
    }
    return {
        **settings,
        "--cards": {str(seed): _digest([asdict(card) for card in mine]) for seed, mine in cards.items()},
        "--unrelated": _digest([asdict(piece) for piece in pieces]),
        "--writes": options.writes,
        "--each-step": options.each_step,
        "model's weights": model.fingerprint,
    }


def _check_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """A folder may grow by cells and seeds; what it holds already must have been measured in the same way. Raises ProbeError."""
    try:
        saved = json.loads((folder / PLAN).read_text(encoding="utf-8"))["plan"]
    except FileNotFoundError:
        raise ProbeError(
            f"--resume {folder}: holds no {PLAN}, so no probe ran there; give the folder that a probe named, or leave --resume out"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProbeError(
            f"--resume {folder}: its {PLAN} cannot be read ({error}); start anew without --resume"
        ) from None
    for key in plan:
        mine, theirs = plan[key], saved.get(key)
        if key == "--cards":
            shared = set(mine) & set(theirs or {})
            mine, theirs = ({seed: both[seed] for seed in shared} for both in (mine, theirs or {}))
        if mine != theirs:
            raise ProbeError(
                f"--resume {folder}: was made with {key}={theirs}, not {mine}: give the same, or start anew without --resume"
            )


def _track(prepared: _Prepared) -> Tracker:
    """The run in MLflow, the same one when the folder is resumed."""
    path = prepared.folder / PLAN
    known = json.loads(path.read_text(encoding="utf-8"))["mlflow_run_id"] if path.exists() else ""
    config = prepared.config
    params = flatten(config) | {f"probe.{key}": value for key, value in _facts(prepared).items()}
    tracker = open_run(config.tracking, prepared.folder.parent, prepared.folder.name, params, known)
    saved = {"plan": prepared.plan, "mlflow_run_id": tracker.run_id or known}
    path.write_text(json.dumps(saved, indent=1), encoding="utf-8")
    return tracker


def _run_all(prepared: _Prepared, tracker: Tracker, display: Display) -> list[CellRun]:
    """Every cell on every seed, in the order of the grid; those whose file is there are read."""
    done = {
        (cell, seed): _load(path, cell)
        for cell in prepared.cells
        for seed in prepared.options.seeds
        if (path := prepared.path_of(cell, seed)).exists()
    }
    todo = [
        (cell, seed) for seed in prepared.options.seeds for cell in prepared.cells if (cell, seed) not in done
    ]
    if done:
        display.say(f"{len(done)} of {len(done) + len(todo)} cells are done already")
    if todo:
        torch.set_num_threads(prepared.config.rollout.threads)
        model = _read_model(prepared)
        total = sum(
            points_of(cell, prepared.sizes(cell, seed), prepared.options.each_step) for cell, seed in todo
        )
        with display.counting("measurements", total) as counter:
            bench = _Bench(prepared, model)
            for cell, seed in todo:
                run = bench.run(cell, seed, counter.advance)
                path = prepared.path_of(cell, seed)
                path.with_suffix(".tmp").write_text(json.dumps(run.to_json()), encoding="utf-8")
                path.with_suffix(".tmp").replace(path)
                done[cell, seed] = run
                display.say(f"{run.label}, seed {seed}: {_in_short(run)}, left {counter.time_left}")
    runs = [done[cell, seed] for cell in prepared.cells for seed in prepared.options.seeds]
    for run in runs:
        for logged, step in metrics(run):
            tracker.log(logged, step)
    return runs


def _read_model(prepared: _Prepared) -> FrozenLlama:
    try:
        return read_model(
            str(prepared.model.path),
            prepared.config.model.dtype,
            torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )
    except (
        WriterError
    ) as error:  # a kind of model that the writer does not know, or a folder that is not whole
        raise ProbeError(f"model.name={prepared.config.model.name}: {error}") from error


class _Bench:
    """The model with one seed's examiner on it; bases by the settings that make them."""

    def __init__(self, prepared: _Prepared, model: FrozenLlama) -> None:
        self._prepared, self._model = prepared, model
        self._bases: dict[tuple[object, int], Basis] = {}
        self._seed: tuple[int, Examiner, Point] | None = None

    def run(self, cell: Cell, seed: int, on_point: Any) -> CellRun:
        options = self._prepared.options
        basis = self._basis(cell, seed)
        examiner, untouched = self._examiner(seed, basis)
        writer = BatchedWriter(self._model, basis, cell.write)
        return run_cell(
            cell, seed, basis, writer, examiner, untouched, options.writes, options.each_step, on_point
        )

    def _basis(self, cell: Cell, seed: int) -> Basis:
        key = (cell.fast_weights, seed)
        if key not in self._bases:
            self._bases[key] = compute_basis_from_checkpoint(
                self._prepared.model.path, cell.fast_weights, seed
            )
        return self._bases[key]

    def _examiner(self, seed: int, basis: Basis) -> tuple[Examiner, Point]:
        if self._seed is None or self._seed[0] != seed:
            self._seed = None
            chat = self._prepared.chat
            reader = Reader(self._model, chat.stop_token_ids)
            examiner = Examiner(
                reader, chat, SYSTEM_PROMPT, self._prepared.groups(seed), self._prepared.pieces
            )
            self._seed = (seed, examiner, examiner.examine(basis, zero(basis), 0, 0))
        return self._seed[1], self._seed[2]


def _load(path: Path, cell: Cell) -> CellRun:
    """Named as it is asked for now: another command line may have had other words for the same settings. Raises ProbeError."""
    try:
        return replace(
            CellRun.from_json(json.loads(path.read_text(encoding="utf-8"))),
            settings=cell.settings,
            label=cell.label,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProbeError(f"{path}: cannot be read ({error}); delete it to have the cell run again") from None


def _facts(prepared: _Prepared) -> dict[str, str]:
    options = prepared.options
    return {
        "model": prepared.config.model.name,
        "commit": git_commit(Path(__file__).parent),
        "cards": f"{options.cards}: {', '.join(str(len(prepared.cards[seed])) for seed in options.seeds)} in {options.writes} write(s)",
        "seeds": ", ".join(map(str, options.seeds)),
        "unrelated": "the shipped text" if options.unrelated is None else str(options.unrelated),
    }


def _in_short(run: CellRun) -> str:
    last = run.after[-1]
    refused = sum(line.outcome == "rolled_back" for line in run.writes)
    asked = [last.recall(paraphrased, "em").values() for paraphrased in (False, True)]
    share = [100 * sum(values) / len(values) if values else float("nan") for values in asked]
    note = f", {refused} of {len(run.writes)} writes ROLLED BACK" if refused else ""
    return f"recall {share[0]:.0f} %, of paraphrases {share[1]:.0f} %, damage {last.text('text', 'damage'):.3f}{note}"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
