"""How long to wait before something that failed is started again."""

from __future__ import annotations

_FIRST_S, _LONGEST_S = 1.0, 60.0


def backoff_s(failures: int) -> float:
    """Seconds to wait after so many failures in a row: none after the first, then 1, 2, 4 ... up to 60."""
    return 0.0 if failures <= 1 else min(_LONGEST_S, _FIRST_S * 2.0 ** (failures - 2))
