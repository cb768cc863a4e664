"""The settings of sampling; sampling.py draws by them."""

from dataclasses import dataclass, fields, replace

from ..cli.errors import UserError
from ..cli.names import is_finite, is_whole


@dataclass(frozen=True)
class Sampling:
    """The settings by which a token is sampled from logits; the fields act in this order.

    logit_bias, pairs (token, value), is added to the logits. repetition_penalty divides the positive logits of tokens
    generated before, and multiplies the negative ones (1: off). presence_penalty is subtracted from the logit of each
    of these tokens, and frequency_penalty times the count of that token; penalty_decay multiplies the counts at every
    step (1: nothing is forgotten). temperature divides the logits; 0 takes the most probable token. top_k keeps the k
    most probable tokens (0: all); top_p then keeps the fewest most probable ones whose probabilities, among those kept,
    reach it; min_p drops those below that share of the most probable one. seed plus the prompt's number seeds its
    draws. measured adds log-probabilities and entropies; top_logprobs adds log-probabilities before penalties and
    temperature, of the token and of so many most probable ones. Raises UserError for a value out of range.
    """

    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.3  # at 0.7 a tuned demo misses one answer's end in ten (docs/guides/learning-rates.md)
    min_p: float = 0.0
    seed: int = 0
    measured: bool = False
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("logit_bias", "measured", "top_logprobs") and not is_finite(value):
                raise UserError(f"--{field.name} {value!r}: a finite number is due")
        for name, rule, holds in (
            # logits are float32, which cannot hold much larger penalties or divide by much smaller temperatures
            ("repetition_penalty", "a factor from 1e-30 to 1e30 (1: off)", 1e-30 <= self.repetition_penalty <= 1e30),
            ("presence_penalty", "a number from -1e30 to 1e30", abs(self.presence_penalty) <= 1e30),
            ("frequency_penalty", "a number from -1e30 to 1e30", abs(self.frequency_penalty) <= 1e30),
            ("penalty_decay", "a factor from 0 to 1 (1 forgets nothing)", 0 <= self.penalty_decay <= 1),
            (
                "temperature",
                "0 (always the most probable token), or 1e-30 or more",
                self.temperature == 0 or self.temperature >= 1e-30,
            ),
            ("top_k", "a number of tokens, 0 for all", self.top_k >= 0),
            ("top_p", "a probability from 0 to 1 (1 keeps every token)", 0 <= self.top_p <= 1),
            ("min_p", "a share from 0 to 1 (0 keeps every token)", 0 <= self.min_p <= 1),
            ("top_logprobs", "a number of tokens", self.top_logprobs is None or is_whole(self.top_logprobs, 0)),
        ):
            if not holds:
                raise UserError(f"--{name} {getattr(self, name)}: it is {rule}")

    @property
    def penalizes(self) -> bool:
        """True if a draw depends on the tokens generated before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def seeded(self, more: int) -> "Sampling":
        """The same settings with a seed larger by `more`."""
        return replace(self, seed=self.seed + more)
