"""Conversations over several turns with tools, sampled together: one state a conversation.

At each turn the answers of all conversations that go on are sampled in one batch. Then their calls of tools are run;
the results are read in one batch. Every token is read once: the next turn goes on from the cached State after a turn.
The first turn of several conversations of a prompt reads it once.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..cli.errors import UserError
from ..data.chat import CHAT, SPEAKERS, TURN_END, ChatLayout, role_in, stops_of, words_of
from ..data.encoding import EncodeSettings, encoder
from ..data.fields import field as text_field
from ..data.forms import ANSWERS, TURNS, question_of, turns_of
from ..data.tokenizer import Tokenizer
from ..data.tools import ToolCall, parse_calls
from ..environments.environments import Environments, FailedRequest, Place
from ..inference.batch import DAMAGED
from ..inference.decode import damaged_error
from ..inference.engine import Engine
from ..inference.loading import Subject
from ..inference.requests import Completion, GenerationRequest, Logprobs, PrefixCache
from ..inference.settings import Sampling
from ..inference.speakers import Speaker
from ..inference.text import Continuation
from ..models.state import State

TURN_CUT = "turn_length"  # the end of a conversation with an answer of turn_tokens, which had room for more
UNCALLED = ToolCall("", {})  # of an answer that hands over to a tool and holds no call
MALFORMED = 'error: no call was found; answer <tool_call>{"name": …, "arguments": {…}}</tool_call>'
CACHED = 3  # states of each conversation: after its prompt or results, after its answer, and one that is made


@dataclass(eq=False)
class Episode:
    """A conversation of the prompt with this number, in its own environment: the tokens of the prompt and those behind
    it, of which `sampled` are the model's, with their log-probabilities and entropies. turns are its texts by role; end
    is "end" (of the document), "stop", "length" (of the conversation), TURN_CUT, "turns" or "lost" at last, and score
    its environment's, if it has one.
    fault is the message of a reset or a get_reward that failed: nothing is learned from such a conversation."""

    number: int
    prompt: list[int]
    place: Place
    draws: random.Random
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    turns: list[dict[str, str]] = field(default_factory=list)
    answers: int = 0
    end: str = ""
    score: float | None = None
    fault: str = ""
    state: dict[str, Any] = field(default_factory=dict)

    def add(self, tokens: Sequence[int], sampled: bool) -> None:
        self.tokens += tokens
        self.sampled += [sampled] * len(tokens)


class Turn:
    """The listener for one answer of a conversation, of at most `longest` tokens."""

    def __init__(self, conversation: Episode, tokenizer: Tokenizer, stops: Sequence[str], longest: int) -> None:
        self.conversation, self.longest = conversation, longest
        self.text = Continuation({}, tokenizer, stops)
        self.measures: list[tuple[float, float]] = []
        self.damaged = False

    def cancelled(self) -> str:
        return ""

    def on_token(self, token: int, logprobs: Logprobs | None) -> str:
        assert logprobs is not None  # the sampling is measured
        self.measures.append((logprobs.logprob, logprobs.entropy))
        return self.text.feed(token)

    def on_end(self, reason: str) -> None:
        self.damaged = reason == DAMAGED
        self.text.finish(reason)


class TurnSettings(NamedTuple):
    """At most `turns` answers of a conversation, `turn_tokens` tokens in each, and `longest` tokens behind the prompt,
    results included; `batch` answers are sampled at a time, each up to a text of `stop` or of a known layout. Results
    and the openings of the answers to them are in the layout `chat`, as the rows'."""

    sampling: Sampling
    turns: int
    turn_tokens: int
    longest: int
    stop: tuple[str, ...]
    batch: int
    chat: ChatLayout = CHAT

    @property
    def result(self) -> str:
        """The opening of a result's turn behind an answer."""
        return f"{TURN_END}{self.chat.tool_form.speaker}:"


def converse(
    subject: Subject, environments: Environments, conversations: Sequence[Episode], settings: TurnSettings
) -> None:
    """Hold conversations that have begun up to their ends. Raises UserError for logits that are not finite."""
    model, start, tokenizer = subject
    weight, vocab_size = model.emb.weight, model.config.vocab_size
    # Bytes of a cached State with the logits after it. On meta, no memory is taken to count them.
    cached = State.zeros(model.config, 1, "meta", weight.dtype).nbytes + 4 * vocab_size
    longest = max((len(each.prompt) for each in conversations), default=0) + settings.longest
    cache = PrefixCache(CACHED * len(conversations) * (cached + 4 * longest))
    engine = Engine(min(tokenizer.vocab_size, vocab_size), settings.batch, cache, overlap=weight.is_cuda)
    speaker = Speaker("", model, start)
    # All conversations take their nth turn together, in one batch. The slowest decides how long a turn takes.
    going = list(conversations)
    while going:
        turns = [turn_of(each, tokenizer, settings) for each in going]
        # One request for those that are equal so far, such as the first turns of a group: it is read once.
        for tokens, several in grouped_by_tokens(turns):
            engine.add(GenerationRequest(speaker, tokens, [completion_of(turn, settings.sampling) for turn in several]))
        while engine.busy:
            engine.step()
        if damaged := [turn for turn in turns if turn.damaged]:
            raise damaged_error(model, damaged[0].conversation.number, len(damaged[0].text.tokens), len(damaged) - 1)
        # Tools run between the turns, outside of the model's batch: they may be slow, or processes of their own.
        calling = [(turn.conversation, calls) for turn in turns if (calls := answered(turn, tokenizer, settings))]
        for conversation, results in zip([each for each, _ in calling], results_of(environments, calling)):
            hand_back(conversation, results, tokenizer, settings)
        going = [each for each in going if not each.end]


class EpisodeSampler:
    """Samples episodes of rows in their environments: `encode` has the settings by which rows become prompts. A prompt
    has `room` tokens with those after it."""

    def __init__(self, environments: Environments, settings: TurnSettings, encode: EncodeSettings, room: int) -> None:
        self.environments, self.encode, self.room = environments, encode, room
        # Results of tools are laid out as the rows that were learned from have them.
        self.settings = settings._replace(chat=encoder(encode).layout)

    def sample(self, subject: Subject, rows: Mapping[int, Mapping[str, Any]], times: int) -> list[list[Episode]]:
        """Hold `times` episodes of each row, {number: row}. The draws of an episode depend on the run's seed, the row's
        number and its own alone."""
        requests = [(number * times + place, row) for number, row in rows.items() for place in range(times)]
        places, openings = self.environments.begin([row for _, row in requests])
        episodes = []
        for (key, row), place, opening in zip(requests, places, openings):
            prompt, fault = list[int](), ""
            if isinstance(opening, FailedRequest):
                fault = f"reset: {opening.message}"
            else:
                try:
                    prompt = self.prompt(row, place, opening)
                except UserError as error:  # its text may leave no room
                    fault = f"reset: {error}"
            # One generator for a conversation, which goes on over its turns.
            draws = random.Random(self.settings.sampling.seed + key)
            episodes.append(Episode(key, prompt, place, draws, fault=fault))
        begun = [episode for episode in episodes if not episode.fault]
        converse(subject, self.environments, begun, self.settings)
        ended = [episode.place for episode in begun]
        for episode, score, state in zip(begun, self.environments.scores(ended), self.environments.states(ended)):
            if isinstance(score, FailedRequest):
                episode.fault = f"get_reward: {score.message}"
            else:
                episode.score, episode.state = score, state
        self.environments.release(places)
        return [episodes[first : first + times] for first in range(0, len(episodes), times)]

    def prompt(self, row: Mapping[str, Any], place: Place, text: str) -> list[int]:
        """The tokens of a row's prompt, with the tools of its environment, and a text at the end of the last user's
        turn."""
        tools = self.environments.known[place.name].tools
        row_encoder = encoder(self.encode)
        asked = with_observation(row, text, self.encode.fields) | {"tools": tools}
        if question_of(asked) == "prompt" and not self.encode.fields and isinstance(asked["prompt"], str):
            asked["query"] = asked.pop("prompt")  # tools need a chat, and a text prompt is used as it is
        (segments,) = row_encoder.documents(asked)
        tokens = [token for words, _ in segments for token in row_encoder.tokenizer.encode(words)]
        if len(tokens) + self.settings.longest > self.room:
            raise UserError(
                f"a prompt has {len(tokens):,} tokens with its tools, and --ctx_len {self.room:,} less "
                f"--max_completion_length {self.settings.longest:,} is the most; raise the first, or lower the second"
            )
        return tokens


def with_observation(row: Mapping[str, Any], text: str, fields: Sequence[str] = ()) -> dict[str, Any]:
    """A row with a text at the end of its last user's turn, or of its question; its prompt is in fields[0] if any are
    named. Nothing of the row itself changes: its other conversations begin from it, too."""
    if not text:
        return dict(row)
    if name := next((name for name in TURNS if isinstance(row.get(name), list) and not fields), ""):
        turns: Any = turns_of(row, name)
        users = [place for place, turn in enumerate(turns) if SPEAKERS.get(role_in(turn)) == "User"]
        if not users:
            raise UserError("a row has no turn of a user, which the text that its environment's reset returns goes on")
        last = turns[users[-1]]
        words = "content" if "role" in last else "value"
        turns[users[-1]] = {**last, words: words_of(last, words) + text}
        return {**row, name: turns}
    question = next((name for name in fields[:1] or ANSWERS if name in row), "question")
    return {**row, question: (text_field(row, question) if question in row else "") + text}


def turn_of(conversation: Episode, tokenizer: Tokenizer, settings: TurnSettings) -> Turn:
    """The next answer of a conversation."""
    stops = (*stops_of(tokenizer.decode(conversation.prompt)), *settings.stop)
    longest = min(settings.turn_tokens, settings.longest - len(conversation.tokens))
    return Turn(conversation, tokenizer, stops, longest)


def grouped_by_tokens(turns: Sequence[Turn]) -> list[tuple[list[int], list[Turn]]]:
    """Group the turns that go on from the same tokens: these are read once."""
    by_tokens: dict[tuple[int, ...], list[Turn]] = {}
    for turn in turns:
        by_tokens.setdefault((*turn.conversation.prompt, *turn.conversation.tokens), []).append(turn)
    return [(list(tokens), same) for tokens, same in by_tokens.items()]


def completion_of(turn: Turn, sampling: Sampling) -> Completion:
    """The engine's request for an answer; its random numbers go on over the conversation's turns."""
    return Completion(sampling, turn.longest, turn, draws=turn.conversation.draws)


def answered(turn: Turn, tokenizer: Tokenizer, settings: TurnSettings) -> list[ToolCall]:
    """Add an answer to its conversation -> its calls, [] if the conversation ends with it.

    An answer hands over to a tool by a call, or by the name of the speaker Tool. If another name follows a call, or the
    end of the document, as after a row's last call, it is left out: the results follow there."""
    conversation, text = turn.conversation, turn.text
    _, calls = parse_calls(text.text)
    opens = text.end == "stop" and tokenizer.decode(text.tokens).startswith(text.text + settings.result)
    hands_over = opens and settings.chat.tool_form.speaker == "Tool"
    tokens = text.tokens if opens or not calls or text.end == "length" else text.shown_tokens()
    # The text may encode to other tokens than were sampled. Then all of these stay: their probabilities are known.
    length = len(tokens) if tokens == text.tokens[: len(tokens)] else len(text.tokens)
    conversation.add(text.tokens[:length], sampled=True)
    logprobs, entropies = zip(*turn.measures[:length]) if length else ((), ())
    conversation.logprobs += logprobs
    conversation.entropies += entropies
    conversation.turns.append({"role": "assistant", "content": text.text.strip()})
    conversation.answers += 1
    if text.end == "length" or not (calls or hands_over):
        room = settings.longest - len(conversation.tokens)
        conversation.end = TURN_CUT if text.end == "length" and room else text.end
    elif conversation.answers == settings.turns:
        conversation.end = "turns"
    return [] if conversation.end else calls or [UNCALLED]


def results_of(environments: Environments, calling: Sequence[tuple[Episode, Sequence[ToolCall]]]) -> list[list[str]]:
    """Run the calls of each conversation, one after the other, side by side with those of the others -> results."""
    results: list[list[str]] = [[] for _ in calling]
    for number in range(max((len(calls) for _, calls in calling), default=0)):
        # Calls of one answer may build on each other, so they run in turn; conversations do not.
        open_places = [place for place, (_, calls) in enumerate(calling) if number < len(calls)]
        called = [at for at in open_places if calling[at][1][number] is not UNCALLED]
        places, calls_made = [calling[at][0].place for at in called], [calling[at][1][number] for at in called]
        texts = dict(zip(called, environments.call(places, calls_made)))
        for at in open_places:
            results[at].append(texts.get(at, MALFORMED))
    return results


def hand_back(conversation: Episode, results: Sequence[str], tokenizer: Tokenizer, settings: TurnSettings) -> None:
    """Add the results of an answer's calls and the opening of the next answer to its conversation, as a chat lays them
    out. A conversation ends if they leave it no room, or if its environment is lost."""
    turns = [{"role": "tool", "content": settings.chat.cleaned(result)} for result in results]
    conversation.turns += turns
    # The model may have written the opening of the result by itself. The last tokens are enough to tell.
    opened = tokenizer.decode(conversation.tokens[-16:]).endswith(settings.result)
    speaker, *texts = settings.chat.prompt(turns)
    texts = texts if opened else [TURN_END, speaker, *texts]
    tokens = [token for text in texts for token in tokenizer.encode(text)]
    if conversation.place.lost:
        conversation.end = "lost"
    elif len(conversation.tokens) + len(tokens) >= settings.longest:
        conversation.end = "length"
    else:
        conversation.add(tokens, sampled=False)
