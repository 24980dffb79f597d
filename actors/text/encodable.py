"""Text that a tokenizer and a file can take: without lone surrogates, the halves of a character."""

from __future__ import annotations


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
