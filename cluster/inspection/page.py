"""An episode as one HTML file that needs nothing else: no network, no script, and nothing of the model's text is markup.

Model text is untrusted. Every text goes through ``_safe``, which is the only way into the page; the content security policy of the page forbids what
might get through all the same (scripts, requests, forms).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from cluster.inspection.compare import Compared
from cluster.inspection.record import EpisodeRecord, FailureRecord, Passage, Record, WriteEntry
from cluster.inspection.terminal import visible
from cluster.inspection.wording import (
    Piece,
    facts,
    head_line,
    number,
    pieces,
    scores_text,
    unshown,
    write_line,
)

_LONG = 1200  # characters of a passage that is read; a longer one is folded
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --act: #1a7f37; --extract: #8250df; --write: #9a6700; --bad: #cf222e; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.15rem; overflow-wrap: anywhere; } h2 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
table { border-collapse: collapse; } th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0; overflow-wrap: anywhere; }
.grid th, .grid td { border-bottom: 1px solid var(--line); padding-right: 1.2rem; }
.facts th { font-weight: normal; opacity: .7; white-space: nowrap; }
section { border-left: 3px solid var(--line); padding-left: 1rem; }
.passage { margin: .5rem 0; } .passage > p, summary { margin: 0; font-size: .8rem; opacity: .7; }
pre { margin: .1rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .9em/1.45 ui-monospace, monospace; }
.act pre { color: var(--act); font-weight: 600; } .extract pre { color: var(--extract); }
.write { border: 1px solid var(--write); border-radius: 4px; padding: .4rem .8rem; margin: .6rem 0; }
.write.empty, .write.rolled_back { border-color: var(--bad); }
.write p { margin: 0 0 .3rem; } .unused { color: var(--bad); }
.bar { display: block; height: .5rem; background: var(--write); border-radius: 2px; } .track { width: 12rem; background: var(--soft); }
.cleared { text-align: center; opacity: .7; border-top: 2px dashed var(--line); margin: 1rem 0 0; padding-top: .3rem; font-size: .85rem; }
.reward { font-weight: 600; }
"""


def render(record: Record, compared: Sequence[Compared]) -> str:
    """The whole file."""
    body = "\n".join(_body(record, compared))
    head = f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    head += f'<meta name="viewport" content="width=device-width">\n<title>{_safe(head_line(record))}</title>\n<style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _safe(text: str) -> str:
    """Text that cannot become markup, inside an element or a quoted attribute; control characters are shown as their codes."""
    return escape(visible(text), quote=True)


def _body(record: Record, compared: Sequence[Compared]) -> Iterator[str]:
    yield f"<h1>{_safe(head_line(record))}</h1>"
    rows = "".join(
        f'<tr><th scope="row">{_safe(name)}</th><td>{_safe(value)}</td></tr>' for name, value in facts(record)
    )
    yield f'<table class="facts"><tbody>{rows}</tbody></table>'
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
    yield _answers(record)
    if compared:
        yield _compared(compared)


def _piece(piece: Piece) -> str:
    if piece.write is not None:
        return _write(piece.write)
    if piece.passage is not None:
        return _passage(piece.title, piece.passage)
    return f'<p class="cleared">{_safe(piece.title)}</p>'


def _passage(title: str, passage: Passage) -> str:
    label, text = (
        _safe(f"{title} ({passage.end - passage.start} tokens)"),
        f"<pre>{_safe(passage.text.strip())}</pre>",
    )
    if len(passage.text) > _LONG and passage.kind not in ("act", "extract"):
        return f'<details class="passage {passage.kind}"><summary>{label}, {_safe(passage.text.strip()[:80])} …</summary>{text}</details>'
    return f'<div class="passage {passage.kind}"><p>{label}</p>{text}</div>'


def _write(write: WriteEntry) -> str:
    cards = "".join(
        f"<tr><td>{_safe(card.question)}</td><td>{_safe(card.answer)}</td></tr>"
        for card in write.log.flashcards
    )
    table = (
        f'<table class="grid"><thead><tr><th>question</th><th>answer</th></tr></thead><tbody>{cards}</tbody></table>'
        if cards
        else ""
    )
    unused = "".join(f'<pre class="unused">not a flashcard: {_safe(item)}</pre>' for item in write.unused)
    return f'<div class="write {write.log.outcome}"><p>{_safe(write_line(write))}</p>{table}{unused}</div>'


def _losses(record: EpisodeRecord) -> str:
    """A bar for the loss before and after each write."""
    done = [
        (place, write.log)
        for place, write in enumerate(record.writes, start=1)
        if write.log.outcome != "empty"
    ]
    finite = [loss for _, log in done for loss in (log.loss_before, log.loss_after) if math.isfinite(loss)]
    most = max(finite, default=0.0) or 1.0
    rows = []
    for place, log in done:
        for name, loss in (("before", log.loss_before), ("after", log.loss_after)):
            width = 100 * loss / most if math.isfinite(loss) else 100.0
            bar = f'<span class="bar" style="width:{max(0.0, width):.1f}%"></span>'
            rows.append(
                f'<tr><td>write {place}, {name}</td><td class="track">{bar}</td><td>{_safe(number(loss))}</td></tr>'
            )
    return f'<h2>Loss of each write (nats per answer token)</h2><table class="losses"><tbody>{"".join(rows)}</tbody></table>'


def _answers(record: EpisodeRecord) -> str:
    rows = [
        (
            answer.question,
            answer.prediction,
            " | ".join(answer.gold),
            answer.category,
            scores_text(dict(answer.scores)),
        )
        for answer in record.outcome.answers
    ]
    table = _table("answers", ("question", "answered", "gold", "category", "scores"), rows)
    return f'<h2>Answers</h2>{table}<p class="reward">reward {_safe(number(record.outcome.reward))}</p>'


def _compared(compared: Sequence[Compared]) -> str:
    rows = [(str(one.segment + 1), one.said, one.with_delta, one.without) for one in compared]
    table = _table("compared", ("context", "in the episode", "with Delta", "with Delta = 0"), rows)
    return f"<h2>With and without its fast weights (greedy, after the same context)</h2>{table}"


def _table(name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_safe(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{_safe(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="grid {name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
