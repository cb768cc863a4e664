"""An engine of a tiny model, and listeners that keep what they hear."""

from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.inference.asked import Answer, Request
from rwkv_peft.inference.engine import Engine
from rwkv_peft.inference.known import Known
from rwkv_peft.inference.pace import Pace
from rwkv_peft.inference.settings import Sampling

GREEDY = Sampling(temperature=0)
PROMPTS = [[66, 5, 9], [7], [30, 1, 50, 3, 4, 5, 70, 8, 9], [2, 2], [79]]


def model_file(tiny_state, path):
    state = tiny_state(seed=3)
    state["head.weight"] = state["head.weight"] * 4  # logits far enough apart for rounding not to matter
    save_model(path, state)
    return path


class Heard:
    """A listener that keeps what it hears, and ends after some tokens by itself."""

    def __init__(self, most=10**9, gone=False):
        self.tokens, self.odds, self.end, self.most, self.gone = [], [], "", most, gone

    def over(self):
        return "gone" if self.gone else ""

    def draw(self, token, odds):
        self.tokens.append(token)
        self.odds.append(odds)
        return "gone" if self.gone else "enough" if len(self.tokens) == self.most else ""

    def finish(self, end):
        assert not self.end
        self.end = end


def engine_of(voice, batch=8, piece=64, ahead=False):
    return Engine(voice.model.config.vocab_size, batch, Known(1 << 30), Pace(piece), ahead)


def ask(running, voice, prompt, *samplings, most=10**9, max_tokens=12, **settings):
    heard = [Heard(most) for _ in samplings]
    answers = [Answer(sampling, max_tokens, listener) for sampling, listener in zip(samplings, heard)]
    running.add(Request(voice, prompt, answers, **settings))
    return heard


def finish(running):
    while running.busy:
        running.step()
