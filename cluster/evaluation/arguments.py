"""The command line of ``python -m cluster evaluate`` as a Request. Loads nothing heavy: --help answers at once."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from cluster.evaluation.plan import OWN, Request
from configs.load import ConfigError
from configs.shipped import shipped

REQUEST_FILE = "request.json"  # in the folder of an evaluation


def add_options(command: argparse.ArgumentParser) -> None:
    rows, benchmarks = ", ".join(shipped("rows")), ", ".join(shipped("benchmarks"))
    note = "default: truncation, and the configuration's own"
    command.add_argument(
        "--rows",
        type=_names,
        default=(),
        metavar="A,B",
        help=f"memories: {rows}, {OWN}, or YAML files ({note})",
    )
    command.add_argument(
        "--benchmarks",
        type=_names,
        default=(),
        metavar="A,B",
        help=f"{benchmarks}, or YAML files (default: the configuration's own)",
    )
    command.add_argument(
        "--seeds",
        type=_seeds,
        default=(),
        metavar="0,1",
        help="tasks are drawn, and a random A, by seed (default: the configuration's)",
    )
    command.add_argument(
        "--baseline",
        default="",
        metavar="ROW",
        help="what the other rows are compared with (default: truncation, where it is a row)",
    )
    command.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="a row for each value; several are multiplied",
    )
    command.add_argument(
        "--resume",
        default="",
        metavar="FOLDER",
        help='go on with this evaluation; alone, as it was asked for; "auto": the newest',
    )


def request_of(options: argparse.Namespace) -> Request:
    """Raises ConfigError."""
    overrides = tuple(
        argument for argument in options.overrides if not argument.startswith(("checkpoint=", "resume="))
    )
    given = {argument.partition("=")[0]: argument.partition("=")[2] for argument in options.overrides}
    resume = options.resume or given.get("resume", "")
    if options.config is None:
        if (
            not resume
            or overrides
            or options.rows
            or options.benchmarks
            or options.seeds
            or options.baseline
            or options.sweep
        ):
            raise ConfigError(
                "evaluate needs a configuration file before the settings, e.g. configs/quickstart.yaml (or --resume FOLDER alone)"
            )
        return replace(saved_request(Path(resume)), resume=resume)
    if "=" in options.config:
        raise ConfigError(
            "evaluate needs a configuration file before the settings, e.g. configs/quickstart.yaml"
        )
    return Request(
        config=Path(options.config),
        overrides=overrides,
        checkpoint=Path(given["checkpoint"]) if "checkpoint" in given else None,
        rows=options.rows,
        benchmarks=options.benchmarks,
        seeds=options.seeds,
        baseline=options.baseline,
        sweep=tuple(options.sweep),
        resume=resume,
    )


def save_request(request: Request, folder: Path) -> None:
    data = {
        **asdict(request),
        "config": str(request.config.absolute()),
        "checkpoint": request.checkpoint and str(request.checkpoint.absolute()),
    }
    (folder / REQUEST_FILE).write_text(json.dumps(data, indent=1), encoding="utf-8")


def saved_request(folder: Path) -> Request:
    """What the evaluation in ``folder`` was asked for. Raises ConfigError."""
    path = folder.expanduser() / REQUEST_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(data[name]) for name in ("overrides", "rows", "benchmarks", "seeds", "sweep")}
        checkpoint = Path(data["checkpoint"]) if data["checkpoint"] else None
        return Request(**{**data, **lists, "config": Path(data["config"]), "checkpoint": checkpoint})
    except OSError:
        raise ConfigError(
            f"--resume {folder}: is no folder of an evaluation (it has no {REQUEST_FILE})"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path}: is not what evaluate writes there ({error}); give the whole command with --resume"
        ) from None


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name: write a,b,c")
    return names


def _seeds(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give whole numbers from 0 on, e.g. 0,1,2")
    return tuple(int(part) for part in text.split(","))
