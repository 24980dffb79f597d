"""An object for child processes. It stands alone, so that a child imports nothing else of the tests."""

from __future__ import annotations

import os
import time


class Held:
    def __init__(self, start: int) -> None:
        if start < 0:
            raise ValueError(f"start={start} is not allowed")
        self.number = start

    def add(self, more: int) -> int:
        self.number += more
        return self.number

    def nap(self, seconds: float) -> None:
        time.sleep(seconds)

    def die(self) -> None:
        os._exit(3)
