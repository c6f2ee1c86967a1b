"""How far a run is, on stderr: a line that is drawn over on a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import time

WIDTH = 30
LINE_EVERY_SECONDS = 10.0


class Progress:
    """Counts `done` of `total` requests; `show` is cheap to call often."""

    def __init__(self, total: int, title: str = "") -> None:
        self.done = 0
        self._total = total
        self._title = f"{title}: " if title else ""
        self._terminal = sys.stderr.isatty()
        self._began = self._shown = time.monotonic()

    def show(self) -> None:
        """Draw the state, if it is time to."""
        now = time.monotonic()
        if not self._terminal and now - self._shown < LINE_EVERY_SECONDS:
            return
        self._shown = now
        elapsed = now - self._began
        text = f"{self._title}{self.done} of {self._total} requests, {elapsed:.0f} s"
        if 0 < self.done < self._total:
            text += f", {elapsed / self.done * (self._total - self.done):.0f} s to go"
        if self._terminal:
            filled = WIDTH * self.done // max(self._total, 1)
            print(f"\r[{'#' * filled}{'.' * (WIDTH - filled)}] {text}\033[K", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Draw no more."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
