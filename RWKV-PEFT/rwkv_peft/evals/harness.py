"""A model as EleutherAI's lm-evaluation-harness asks one: its TemplateLM over what `rwkv-peft generate` loads.

The one file that knows the package lm_eval.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table
from tqdm import tqdm

from ..errors import UserError, told
from ..generate.loading import Subject
from ..generate.prompts import encode
from ..generate.settings import Sampling
from .asking import GREEDY, write
from .contexts import score_pairs
from .task import Score

MAX_TOKENS = 256  # where a task names no other, as lm_eval has it
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
SAMPLES = ("do_sample", "temperature", "top_p", "top_k")
NEUTRAL = {"num_beams": 1}.items()  # what a task may say that is so anyway
Results = dict[str, Any]


class Harness(TemplateLM):
    """Answers lm_eval's requests with a Subject, `batch` sequences at a time, in the order of the requests.

    A context that several continuations share is read once, and so is the opening that many contexts share. No text is
    cut: a state holds any length.
    """

    def __init__(self, subject: Subject, batch: int) -> None:
        super().__init__()
        self.subject, self.batch = subject, batch

    @property
    def eot_token_id(self) -> int:
        """The token that starts and ends a document. Raises UserError where the tokenizer has none."""
        return encode(self.subject.tokenizer, "", 0)[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        tokens: list[int] = self.subject.tokenizer.encode(string)
        return tokens

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm_eval's, space at the end of the context counted to the continuation; but where a token of the whole
        text would reach over the border, each part is encoded by itself, so that all of both is read."""
        text = context.rstrip()
        continuation = context[len(text) :] + continuation
        before, whole = self.tok_encode(text), self.tok_encode(text + continuation)
        if whole[: len(before)] != before:
            return before, self.tok_encode(continuation)
        return before or [self.prefix_token_id], whole[len(before) :]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """lm_eval's, with one progress bar instead of two."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **others: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        found = [Score(0.0, True)] * len(pairs)
        scores = score_pairs(self.subject.model, pairs, self.batch, self.subject.start)
        for number, score in tqdm(scores, total=len(pairs), unit=" continuations", dynamic_ncols=True):
            found[number] = score
        return [(score.logprob, score.greedy) for score in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text behind the token that starts a document."""
        start = [self.prefix_token_id]
        texts = [(None, start, self.tok_encode(*request.args)) for request in requests]
        return [logprob for logprob, _ in self._loglikelihood_tokens(texts)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to one of the texts that the task says."""
        kinds: dict[tuple[Sampling, int], list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(manner(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        written = self.written(requests, kinds)
        for number, text in tqdm(written, total=len(requests), unit=" answers", dynamic_ncols=True):
            texts[number] = text
        return texts

    def written(
        self, requests: Sequence[Any], kinds: Mapping[tuple[Sampling, int], list[int]]
    ) -> Iterator[tuple[int, str]]:
        """(number, text) of each request as it ends; kinds are {how it is written: its numbers}."""
        for (sampling, length), numbers in kinds.items():
            prompts = [encode(self.subject.tokenizer, requests[number].args[0], number) for number in numbers]
            stops = [stops_of_request(requests[number].args[1]) for number in numbers]
            for place, answer in write(self.subject, prompts, stops, sampling, length, self.batch):
                yield numbers[place], answer.text


def manner(settings: Mapping[str, Any]) -> tuple[Sampling, int]:
    """How a task wants its answers written, and how long at most; greedily unless it says do_sample, or a temperature
    and not do_sample. Raises UserError for what is not offered."""
    for name, value in settings.items():
        if name not in ("until", *LENGTHS, *SAMPLES) and (name, value) not in NEUTRAL:
            raise UserError(f"a task asks for {name} {value!r} in its generation_kwargs, which is not offered here")
    length = next((int(settings[name]) for name in LENGTHS if settings.get(name) is not None), MAX_TOKENS)
    temperature = float(settings.get("temperature") or 0.0)
    if not settings.get("do_sample", temperature > 0) or temperature == 0:
        return GREEDY, length
    top_p, top_k = settings.get("top_p", 1.0), settings.get("top_k", 0)
    return Sampling(temperature=temperature, top_p=float(top_p), top_k=int(top_k)), length


def stops_of_request(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts that end an answer; an empty one would end it before it began, and counts for none."""
    until = settings.get("until") or ()
    return tuple(filter(None, [until] if isinstance(until, str) else until))


class Tasks(TaskManager):
    """lm_eval's tasks and those of a folder; what cannot be loaded is told in words, and what can is loaded once."""

    def __init__(self, folder: str | None, alone: bool = False) -> None:
        """alone: the folder's tasks and no others, since reading the files of all of lm_eval's takes half a minute."""
        super().__init__(include_path=folder, include_defaults=not alone)
        self.loaded: dict[tuple[str, ...], Any] = {}

    def load(self, task_list: Any) -> Any:
        names = tuple(task_list)
        if names not in self.loaded:
            try:
                self.loaded[names] = super().load(list(names))
            except Exception as error:  # whatever a task's file, its code and its data may raise
                raise UserError(unloadable(names, error)) from error
        for name, task in self.loaded[names]["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(f"{name} runs code that the model writes, which is not offered here")
            if getattr(task, "MULTIMODAL", False):
                raise UserError(f"{name} shows pictures or sounds, which an RWKV model does not take")
        return self.loaded[names]


def unloadable(names: Sequence[str], error: Exception) -> str:
    """What became of loading tasks, in words."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    listed = ", ".join(names)
    if kinds & {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        return (
            f"the data of {listed} is not on this disk, and the Hugging Face hub cannot be reached "
            f"({told(error)}); run it once where there is a network (unset HF_HUB_OFFLINE), or give tasks over files "
            "of your own with --include_path"
        )
    return f"{listed} cannot be loaded: {told(error)}"


def load_tasks(names: Sequence[str], folder: str | None) -> tuple[Tasks, list[str]]:
    """(the tasks that there are, those that are meant loaded; their names: patterns such as mmlu_* stand for all that
    match). Raises UserError for a name that is none, and for what cannot be loaded."""
    tasks = Tasks(folder, alone=folder is not None)
    if not set(names) <= set(tasks.all_subtasks):  # groups in the folder may name tasks of lm_eval's
        tasks = Tasks(folder)
    found: list[str] = []
    for name in names:
        matches = tasks.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, tasks.all_tasks, 3)
            where = f"in lm_eval or in {folder}" if folder else "in lm_eval, and no --include_path with others"
            raise UserError(f"there is no task {name} {where}" + (f"; is it {' or '.join(near)}?" if near else ""))
        found += matches
    found = list(dict.fromkeys(found))
    tasks.load(found)
    return tasks, found


def evaluate(
    subject: Subject, tasks: Tasks, names: list[str], batch: int, num_fewshot: int | None, limit: int | None
) -> Results:
    """lm_eval's results of a model on tasks."""
    found: Results = simple_evaluate(
        model=Harness(subject, batch),
        tasks=names,
        task_manager=tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch,
    )
    return found


def tables(results: Results) -> str:
    """lm_eval's tables, of tasks and of groups of them."""
    found = [make_table(results)]
    if results.get("groups"):
        found.append(make_table(results, "groups"))
    return "\n".join(found)


def plain(value: object) -> object:
    """What JSON has no word for, as lm_eval writes it."""
    return handle_non_serializable(value)
