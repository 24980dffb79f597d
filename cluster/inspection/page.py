"""An episode as one HTML file that needs nothing else: no network, no script.

A model's text is untrusted. ``_safe`` is its only way into the page, so none of it is markup. If that fails,
the page's content security policy still forbids scripts, requests and forms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from cluster.common.printable import visible
from cluster.inspection.compare import Compared
from cluster.inspection.record import EpisodeRecord, FailureRecord, Passage, Record, WriteEntry
from cluster.inspection.terminal import (
    COMPARED_COLUMNS,
    COMPARED_TITLE,
    Mark,
    Piece,
    answer_cells,
    compared_cells,
    facts,
    head_line,
    mark,
    number_text,
    pieces,
    unshown,
)

_LONG = 1200  # characters of a passage that was read; a longer one is folded
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root {
  color-scheme: light dark; --line: #8884; --soft: #8881;
  --good: #1a7f37; --between: #bc6c00; --bad: #cf222e; --extract: #8250df; --write: #9a6700;
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.15rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0; overflow-wrap: anywhere; }
.grid th, .grid td { border-bottom: 1px solid var(--line); padding-right: 1.2rem; }
.facts th { font-weight: normal; opacity: .7; white-space: nowrap; }
section { border-left: 3px solid var(--line); padding-left: 1rem; }
.passage { margin: .5rem 0; }
.passage > p, summary { margin: 0; font-size: .8rem; opacity: .7; }
pre { margin: .1rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { font: .9em/1.45 ui-monospace, monospace; }
.act pre { font-weight: 600; }
.right pre, td.right { color: var(--good); }
.partly pre, td.partly { color: var(--between); }
.wrong pre, td.wrong { color: var(--bad); }
.extract pre { color: var(--extract); }
.write { border: 1px solid var(--write); border-radius: 4px; padding: .4rem .8rem; margin: .6rem 0; }
.write.empty, .write.rolled_back { border-color: var(--bad); }
.write p { margin: 0 0 .3rem; }
.unused { color: var(--bad); }
.bar { display: block; height: .5rem; background: var(--write); border-radius: 2px; }
.track { width: 12rem; background: var(--soft); }
.cleared {
  text-align: center; opacity: .7; border-top: 2px dashed var(--line);
  margin: 1rem 0 0; padding-top: .3rem; font-size: .85rem;
}
.reward { font-weight: 600; }
"""
_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def render(record: Record, compared: Sequence[Compared]) -> str:
    """Make the whole file."""
    title, body = _safe(head_line(record)), "\n".join(_body(record, compared))
    return _FRAME.format(policy=_POLICY, title=title, style=_STYLE, body=body)


def _safe(text: str) -> str:
    """Make text that cannot become markup, inside an element or a quoted attribute."""
    return escape(visible(text), quote=True)


def _body(record: Record, compared: Sequence[Compared]) -> Iterator[str]:
    yield f"<h1>{_safe(head_line(record))}</h1>"
    rows = (f'<th scope="row">{_safe(name)}</th><td>{_safe(value)}</td>' for name, value in facts(record))
    yield f'<table class="facts"><tbody>{"".join(f"<tr>{row}</tr>" for row in rows)}</tbody></table>'
    if isinstance(record, FailureRecord):
        return
    if any(write.log.outcome != "empty" for write in record.writes):
        yield _losses(record)
    is_open = False
    for piece in pieces(record):
        if piece.kind == "context":
            yield f'{"</section>" if is_open else ""}<h2>{_safe(piece.title)}</h2><section class="context">'
            is_open = True
        else:
            yield _piece(piece)
    yield "</section>" if is_open else ""
    if line := unshown(record):
        yield f"<p>{_safe(line)}</p>"
    yield "<h2>Answers</h2>"
    columns = ("question", "answered", "gold", "category", "scores")
    marks = [mark(answer.scores) for answer in record.outcome.answers]
    yield _table("answers", columns, answer_cells(record), marks)
    yield f'<p class="reward">reward {_safe(number_text(record.outcome.reward))}</p>'
    if compared:
        yield f"<h2>{COMPARED_TITLE}</h2>"
        yield _table("compared", COMPARED_COLUMNS, compared_cells(compared))


def _piece(piece: Piece) -> str:
    if piece.write is not None:
        return _write(piece.title, piece.write)
    if piece.passage is not None:
        return _passage(piece.title, piece.passage, piece.mark)
    return f'<p class="cleared">{_safe(piece.title)}</p>'


def _passage(title: str, passage: Passage, scored: Mark) -> str:
    label, text = _safe(title), passage.text.strip()
    full = f"<pre>{_safe(text)}</pre>"
    if len(passage.text) > _LONG and passage.kind not in ("act", "extract"):
        summary = f"<summary>{label}, {_safe(text[:80])} …</summary>"
        return f'<details class="passage {passage.kind}">{summary}{full}</details>'
    return f'<div class="passage {passage.kind} {scored}"><p>{label}</p>{full}</div>'


def _write(title: str, write: WriteEntry) -> str:
    cards = [(card.question, card.answer) for card in write.log.flashcards]
    table = _table("cards", ("question", "answer"), cards) if cards else ""
    unused = "".join(f'<pre class="unused">not a flashcard: {_safe(item)}</pre>' for item in write.unused)
    return f'<div class="write {write.log.outcome}"><p>{_safe(title)}</p>{table}{unused}</div>'


def _losses(record: EpisodeRecord) -> str:
    """Draw a bar for the loss before and after each write."""
    losses = [
        (f"write {number}, {name}", loss)
        for number, write in enumerate(record.writes, start=1)
        if write.log.outcome != "empty"
        for name, loss in (("before", write.log.loss_before), ("after", write.log.loss_after))
    ]
    largest = max((loss for _, loss in losses if math.isfinite(loss)), default=0.0) or 1.0
    rows = []
    for name, loss in losses:
        width = max(0.0, 100 * loss / largest) if math.isfinite(loss) else 100.0
        bar = f'<span class="bar" style="width:{width:.1f}%"></span>'
        rows.append(f'<td>{name}</td><td class="track">{bar}</td><td>{_safe(number_text(loss))}</td>')
    table = "".join(f"<tr>{row}</tr>" for row in rows)
    title = "<h2>Loss of each write (nats per answer token)</h2>"
    return f'{title}<table class="losses"><tbody>{table}</tbody></table>'


def _table(
    name: str, header: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[Mark] = ()
) -> str:
    """``marks``: how the second cell of each row, the answer, was scored."""
    head = "".join(f"<th>{_safe(cell)}</th>" for cell in header)
    lines = []
    for number, row in enumerate(rows):
        cells = [f"<td>{_safe(cell)}</td>" for cell in row]
        if marks:
            cells[1] = f'<td class="{marks[number]}">{_safe(row[1])}</td>'
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<table class="grid {name}"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
