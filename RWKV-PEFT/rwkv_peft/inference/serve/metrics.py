"""Figures of the server in Prometheus's text form."""

from collections import Counter

from ..engine import Engine


class Metrics:
    """Counts what is answered: HTTP's statuses, and the seconds until the first token of each request."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.first_tokens = 0
        self.first_seconds = self.longest = 0.0

    def answered(self, status: int) -> None:
        self.statuses[status] += 1

    def began(self, seconds: float) -> None:
        """Count a request whose first token came after so many seconds."""
        self.first_tokens += 1
        self.first_seconds += seconds
        self.longest = max(self.longest, seconds)

    def text(self, engine: Engine, answers: int) -> str:
        """answers: those that are waiting or being drawn."""
        rows = engine.rows
        figures = (
            ("tokens_drawn_total", "counter", engine.drawn),
            ("prompt_tokens_read_total", "counter", engine.read),
            ("prompt_tokens_known_total", "counter", engine.reused),
            ("answers_drawn_now", "gauge", rows),
            ("answers_waiting", "gauge", max(answers - rows, 0)),
            ("known_state_bytes", "gauge", engine.known.size),
            ("first_token_seconds_count", "counter", self.first_tokens),
            ("first_token_seconds_sum", "counter", self.first_seconds),
            ("first_token_seconds_longest", "gauge", self.longest),
        )
        lines = [f"# TYPE rwkv_peft_{name} {kind}\nrwkv_peft_{name} {value}" for name, kind, value in figures]
        lines.append("# TYPE rwkv_peft_requests_total counter")
        lines += [f'rwkv_peft_requests_total{{status="{key}"}} {value}' for key, value in sorted(self.statuses.items())]
        return "\n".join(lines) + "\n"
