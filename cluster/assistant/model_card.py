"""The model card of an exported checkpoint (README.md): what it is, what it scored, how it is used."""

from __future__ import annotations

from pathlib import Path

from cluster.common.errors import CheckpointError
from cluster.measure.report import Document, Section, Table, markdown
from cluster.measure.rows import RowResult, load_row
from cluster.measure.scores import F1, REWARD, label, score_text, unit
from cluster.runs.checkpoint import Checkpoint, score_of
from configs.load import flatten, load_config
from configs.mixture import members

CARD_FILE = "README.md"
_WRITING = ("memory.policy", "memory.max_context_tokens", "memory.max_extract_tokens", "model.dtype")
_SECTIONS = ("write.", "fast_weights.")
_SCORES = (F1, "em", REWARD)
_USE = """In conversation it writes what it hears into fast weights, with the settings below:

```sh
engram chat {name}
engram serve {name} --port 8123
engram evaluate {name}/engram/config.yaml checkpoint={name}
```

Without Engram it is an ordinary model, which answers from its context alone:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

`engram export` also makes a PEFT adapter of a conversation's memory. Stock PEFT and vLLM load it."""


def model_card(checkpoint: Checkpoint, name: str) -> str:
    """Describe ``checkpoint``, whose export is called ``name``. Raises CheckpointError."""
    config = load_config(checkpoint.folder / "config.yaml", [])
    state = checkpoint.state
    facts = {
        "base model": config.model.name,
        "run": checkpoint.run_dir.name,
        "training": f"{state.warm_steps} supervised steps, {state.step} RL steps (version {state.version})",
        "environment": " + ".join(each.name for each in members(config.environment))
        or config.environment.name,
    }
    if (score := score_of(checkpoint.folder)) is not None:
        facts["held-out score during training"] = f"{label(score[0])} {score[1]:.3f}"
    settings = {
        key: value for key, value in flatten(config).items() if key in _WRITING or key.startswith(_SECTIONS)
    }
    sections = (
        Section("Use", _USE.format(name=name)),
        Section("Held-out evaluation of the run", tables=_scores(checkpoint)),
        Section("Settings of the write", tables=(Table("", ("setting", "value"), tuple(settings.items())),)),
    )
    return _front_matter(config.model.name) + markdown(Document(name, facts, sections))


def _front_matter(base: str) -> str:
    """What model hubs read. A base that lies in a folder has no name there."""
    named = f"base_model: {base}\n" if base.count("/") == 1 and not Path(base).expanduser().exists() else ""
    return f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{named}tags: [engram]\n---\n\n"


def _scores(checkpoint: Checkpoint) -> tuple[Table, ...]:
    """The run's rows up to the checkpoint's version; () where none was kept."""
    rows = [row for path in _measured(checkpoint) if (row := _row(path)) is not None]
    rows = [row for row in rows if row.policy_version <= checkpoint.state.version]
    if not rows:
        return ()
    scores = [score for score in _SCORES if any(score in row.score_names for row in rows)]
    lines = [
        (
            row.label,
            str(row.policy_version),
            str(len(row.episodes)),
            str(len(row.failed)),
            *(score_text(score, row.interval(score)) for score in scores),
        )
        for row in rows
    ]
    titles = (f"{label(score)}{unit(score)} [95% CI]" for score in scores)
    return (Table("", ("row", "version", "tasks", "failed", *titles), tuple(lines)),)


def _measured(checkpoint: Checkpoint) -> list[Path]:
    """The files of the rows, in the order in which they were measured."""
    return sorted(
        (checkpoint.run_dir / "evaluation").glob("*.json"), key=lambda path: (path.stat().st_mtime, path)
    )


def _row(path: Path) -> RowResult | None:
    try:
        return load_row(path)
    except CheckpointError:  # a damaged row is no reason to have no export
        return None
