"""``configs/REFERENCE.md`` from the schema: ``make reference`` writes it, and a test says when it is out of date."""

from __future__ import annotations

from pathlib import Path

from configs.describe import Section, sections, shown_default

PATH = Path(__file__).with_name("REFERENCE.md")
_HEAD = """# Settings

Made from `configs/schema.py` by `make reference`; do not edit. A run's settings are these defaults, then its file, then `key=value` arguments.
The same list in the terminal: `python -m cluster train --settings`. Files: `quickstart.yaml` (two CPU cores), `locomo.yaml`, `search.yaml`,
`longmemeval.yaml`, `rubric.yaml`, `chat.yaml`, `one_gpu.yaml`, `node_8gpu.yaml`, `paper.yaml`; `rows/` and `benchmarks/` are what `evaluate` lays
over them.
"""


def reference() -> str:
    """Every setting with its default and what is allowed, as Markdown, one table a section."""
    return "\n".join([_HEAD, *(_table(section) for section in sections() if section.settings)])


def _table(section: Section) -> str:
    rows = [
        f"| `{setting.key}` | {_code(shown_default(setting.default))} | {_escaped(setting.allowed)} | {_escaped(setting.help)} |"
        for setting in section.settings
    ]
    head = ["| setting | default | allowed | |", "|---|---|---|---|"]
    return "\n".join([f"## {section.key or 'The run'}", "", _escaped(section.title), "", *head, *rows, ""])


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("``", "`")


if __name__ == "__main__":
    PATH.write_text(reference(), encoding="utf-8")
