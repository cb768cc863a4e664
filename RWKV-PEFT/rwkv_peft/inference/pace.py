"""Choose how many tokens of prompts are read between two that are drawn."""

import math
import time

LEAST, MOST = 16, 4096
CROWD = 8  # times as many tokens at most are read while more wait for their first token than for their next


class Pace:
    """Reads so many `tokens` in a step, and more while few answer and many wait.

    If `seconds` are given, tokens become as many as are read in that time, or in the time that the answers take for a
    step of their own if that is longer: nobody's next token is delayed by much more than it takes by itself.
    """

    def __init__(self, tokens: int, seconds: float = 0.0) -> None:
        self.tokens, self.seconds = tokens, seconds
        self.read, self.began, self.ended = 0, 0.0, math.inf

    def piece(self, waiting: int, answering: int) -> int:
        """The tokens to read while so many wait for the end of their prompts, and so many answer."""
        tokens = self.tokens * min(max(waiting // max(answering, 1), 1), CROWD)
        if not self.seconds or not answering:
            return tokens
        own = time.perf_counter() - self.ended
        return max(tokens, min(int(tokens * own / self.seconds), MOST))

    def begin(self, tokens: int) -> None:
        """Hear that so many tokens are being read."""
        self.read, self.began = tokens, time.perf_counter()

    def end(self) -> None:
        """Hear that what was read has been computed, and that the answers' own step begins."""
        self.ended = time.perf_counter()
        if self.seconds and self.read >= LEAST:  # fewer take the time of a pass, and tell little of a token's
            fitting = self.read * self.seconds / (self.ended - self.began)
            mean = math.sqrt(self.tokens * fitting)  # so that one slow pass does not undo many
            self.tokens = int(min(max(mean, LEAST), MOST))
        self.read = 0
