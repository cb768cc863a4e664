"""Has a model ask questions about the parts of a document and answer them, each part read once."""

from collections import Counter
from collections.abc import Callable, Sequence

from ..data.templates import stops_of
from ..data.turns import TURN_END
from ..evals.asking import GREEDY, write
from ..generate.loading import Subject
from ..generate.reading import prefill
from ..generate.settings import Sampling
from .flags import Study

SEEDS = 1 << 24  # more than the questions of any document
BATCH = 32
Row = dict[str, str]


def draw(reader: Subject, parts: Sequence[str], study: Study, say: Callable[[str], object]) -> list[Row]:
    """Draw questions about the parts of a document, with answers, as rows of --data_type contexts. Questions that were
    asked about the part before, and what has no words or no end, are left out; `say` hears how many."""
    rows, left_out = list[Row](), Counter[str]()
    for place, part in enumerate(parts):
        _, state = prefill(reader.model, [reader.tokenizer.encode(part + TURN_END)], reader.start)
        behind = reader._replace(start=state)
        seed = study.seed * SEEDS + place * study.questions
        questions = ask(behind, study, Sampling(temperature=study.temperature, top_p=study.top_p, seed=seed), left_out)
        found = answered(behind, study, questions, left_out)
        rows += [{"context": part, **row} for row in found]
        say(f"part {place + 1} of {len(parts)}: {len(found)} questions")
    for what, number in left_out.items():
        say(f"left out: {number} {what}")
    return rows


def ask(reader: Subject, study: Study, sampling: Sampling, left_out: Counter[str]) -> list[str]:
    prompt = reader.tokenizer.encode(study.ask)
    stops = (*stops_of(study.ask), *study.stop, "\n")
    found: dict[str, None] = {}
    prompts = [prompt] * study.questions  # one list, which is read once
    drawn = dict(write(reader, prompts, [stops] * study.questions, sampling, study.question_tokens, BATCH))
    for _, question in sorted(drawn.items()):
        text = question.text.strip()
        if question.end == "length" or not text:
            left_out["questions without end or words"] += 1
        elif text in found:
            left_out["questions that were asked before"] += 1
        else:
            found[text] = None
    return list(found)


def answered(reader: Subject, study: Study, questions: Sequence[str], left_out: Counter[str]) -> list[Row]:
    prompts = [(study.answer or "User: {question}\n\nAssistant:").replace("{question}", each) for each in questions]
    stops = [(*stops_of(prompt), *study.stop) for prompt in prompts]
    tokens = list(map(reader.tokenizer.encode, prompts))
    rows = []
    for place, answer in sorted(dict(write(reader, tokens, stops, GREEDY, study.answer_tokens, BATCH)).items()):
        if answer.end == "length" or not answer.text.strip():
            left_out["answers without end or words"] += 1
        elif study.answer:
            end = study.stop[0] if study.stop and answer.end == "stop" else ""
            rows.append({"prompt": prompts[place], "completion": answer.text + end})
        else:
            rows.append({"question": questions[place], "answer": answer.text.strip()})
    return rows
