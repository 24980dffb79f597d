"""Text that a tokenizer and a file can take: without lone surrogates, the halves of a character."""

from __future__ import annotations

from typing import Any


def encodable(text: str) -> str:
    """``text`` with each character that UTF-8 cannot hold replaced by U+FFFD; usually ``text`` itself.

    Why: JSON can spell half of a character ("\\ud83d"), and every encoder refuses it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        # utf-16 joins two halves that stand side by side, as JSON means them
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def encodable_value(value: Any) -> Any:
    """A JSON value with all its texts made ``encodable``, the names of its fields too."""
    match value:
        case str():
            return encodable(value)
        case list():
            return [encodable_value(item) for item in value]
        case dict():
            return {encodable(name): encodable_value(item) for name, item in value.items()}
    return value
