"""Choose how many tokens of prompts are read between two that are drawn."""

import time

LEAST, MOST = 16, 4096
CROWD = 8  # times as many tokens at most are read while more wait for their first token than for their next


class Pace:
    """Reads so many `tokens` in a step, and more while few answer and many wait. If `seconds` are given, tokens become
    more or fewer until a step takes about that long: between its half and its double."""

    def __init__(self, tokens: int, seconds: float = 0.0) -> None:
        self.tokens, self.seconds = tokens, seconds
        self.read, self.began = 0, 0.0

    def piece(self, waiting: int, answering: int) -> int:
        """The tokens to read while so many wait for the end of their prompts, and so many answer."""
        return self.tokens * min(max(waiting // max(answering, 1), 1), CROWD)

    def begin(self, tokens: int) -> None:
        """Hear that so many tokens are being read."""
        self.read, self.began = tokens, time.perf_counter()

    def end(self) -> None:
        """Hear that what was read has been computed."""
        if self.seconds and self.read:
            took = (time.perf_counter() - self.began) / max(self.read / self.tokens, 1.0)
            if took > 2 * self.seconds:
                self.tokens = max(self.tokens // 2, LEAST)
            elif took < self.seconds / 2 and self.read >= self.tokens:
                self.tokens = min(self.tokens * 2, MOST)
        self.read = 0
