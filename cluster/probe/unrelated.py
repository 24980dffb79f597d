"""Text that no card is about: where a write should change nothing. Ours, written for this file, so that nobody's model was trained on it.

Damage is measured on two kinds, as a small model may keep its prose and still give the last written answer to every question:
running text (the language model), and short replies to everyday questions in the chat format (what the agent does).
"""

from __future__ import annotations

from pathlib import Path

from cluster.probe.cards import read_cards, read_text
from cluster.probe.values import ProbeError, TextPiece

LONGEST_FILE = 8_000  # characters of a user's text that are read: about 2,000 tokens, whose table takes 400 MB at a vocabulary of 49k

_TEXTS = (
    "A kettle boils faster with its lid on, because less heat leaves with the steam. The same holds for a pot of rice. When the water begins to "
    "bubble, turn the flame down and let it rest; the grains go on drinking what is left, and nothing burns to the bottom.",
    "The ferry crosses the sound twice a day in winter and every hour in summer. From the upper deck one sees the old lighthouse, painted red and "
    "white, and behind it the low hills where sheep have cropped the grass as short as a carpet. Tickets are sold on board.",
    "To fold a letter for a narrow envelope, lay the sheet flat, bring the lower third up and press the crease with a fingernail, then bring the "
    "upper third down over it. The edges should meet without force. If they do not, the first fold was too small.",
    "Most rivers carry more sand than people think. After a storm the water runs brown for days, and when it slows down behind a bend it drops what "
    "it carried. In this way islands grow, willows take root on them, and the river must look for another path to the sea.",
    "Our neighbourhood has one small cinema with ninety seats. The owner sells the tickets, shows the film and sweeps the floor afterwards. He says "
    "that the best nights are rainy ones, when people come in early, shake their coats and stay for a talk when the lights go on.",
    "A proof by contradiction starts from the opposite of what one wants to show. One follows the consequences step by step until two of them cannot "
    "both be true. Since every step was sound, the starting point must have been wrong, and so the claim holds.",
)
_REPLIES = (
    (
        "How can I keep bread fresh?",
        "Wrap it in a clean cloth and keep it in a closed box at room temperature.",
    ),
    ("Why is the sky blue?", "The air scatters blue light from the sun more than red light."),
    (
        "Give me a tip for sleeping better.",
        "Go to bed at the same time every night and leave your phone in another room.",
    ),
    ("What is three plus four?", "Three plus four is seven."),
    (
        "How do plants get their food?",
        "They make sugar from water and carbon dioxide with the energy of sunlight.",
    ),
    ("Write a short greeting for a friend.", "Hello, my friend! I hope you are having a wonderful day."),
    ("What should I pack for the beach?", "Take sunscreen, a towel, water and a hat."),
    ("Explain what a library is.", "A library is a place where people can read and borrow books."),
)


def unrelated_pieces(path: Path | None) -> tuple[TextPiece, ...]:
    """The shipped pieces, or a user's: a .json or .jsonl file of questions and answers, else running text whose blank lines part the pieces.

    Raises ProbeError.
    """
    if path is None:
        shipped = [TextPiece("text", "", text) for text in _TEXTS]
        return (*shipped, *(TextPiece("reply", question, reply) for question, reply in _REPLIES))
    if path.suffix in (".json", ".jsonl"):
        return tuple(TextPiece("reply", card.question, card.answer) for card in read_cards(path))
    text = read_text(path, "--unrelated")[:LONGEST_FILE]
    pieces = tuple(
        TextPiece("text", "", " ".join(part.split())) for part in text.split("\n\n") if len(part.split()) > 1
    )
    if not pieces:
        raise ProbeError(
            f"--unrelated {path}: holds no text of two words or more; give running text, blank lines between its pieces"
        )
    return pieces
