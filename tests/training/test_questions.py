"""Questions while training: the current model answers them, scored as by `rwkv-peft eval`, without changing the run.

The base is the demo's, which answers questions about little stories.
"""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import TrainConfig
from rwkv_peft.data.preprocess import main as preprocess
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.evals.command import main as evaluate
from rwkv_peft.evals.questions import Exam
from rwkv_peft.inference.loading import load_model
from rwkv_peft.training.flags.request import parse_flags
from rwkv_peft.training.measuring import Examiner
from rwkv_peft.training.step.plan import Plan
from training.runs import ROOT, finish, metrics, start

BASE = str(ROOT / "demo" / "rwkv6-demo.pth")
STORY = "The sun is up. Tom has {} brown grapes. A dog sleeps.\nQ: {}\nA:"
QUESTIONS = [
    {"prompt": STORY.format(n, question), "completion": f" {right}"}
    for n, question, right in [
        (3, "How many?", "3"),
        (4, "What is there?", "4 Brown grapes."),
        (5, "How many?", "nine"),
        (6, "What color?", "brown"),
        (7, "How many?", "never asked"),
    ]
]
ASK = ("--eval_every", "2", "--eval_limit", "4", "--eval_max_tokens", "24", "--eval_batch", "3", "--eval_stop", r"\n")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Stories that end at a line's end, as data; and questions about others."""
    folder = tmp_path_factory.mktemp("questions")
    rows = [{"text": STORY.format(2 + n % 7, "How many?") + f" {2 + n % 7}"} for n in range(60)]
    preprocess([write(folder / "rows.jsonl", rows), "--tokenizer", "bytes", "--output", str(folder / "data")])
    write(folder / "questions.jsonl", QUESTIONS)
    return folder


@pytest.fixture(scope="module")
def train(files):
    """(name of the run's folder, flags) -> train.py's stdout and stderr; with dropout."""

    def run(name, *more, code=0):
        flags = f"--load_model {BASE} --data_file {files}/data --proj_dir {files / name} --ctx_len 64 --epoch_steps 3"
        flags += """ --epoch_count 2 --peft lora --lora_config {"lora_r":4,"lora_dropout":0.2} --lr_init auto
            --lr_schedule constant --accelerator cpu --devices 1 --strategy deepspeed_stage_2 --precision fp32
            --val_split 0.1"""
        return finish(start([sys.executable, str(ROOT / "train.py"), *flags.split(), *more]), code)

    return run


@pytest.fixture(scope="module")
def asked(files, train):
    """The output of a run of six steps with questions after every second one, stopped after three and resumed."""
    questions = ("--eval_data", str(files / "questions.jsonl"), *ASK)
    train("asked", *questions, "--epoch_count", "1")
    assert sorted({answer["step"] for answer in answers(files, "asked")}) == [1, 2]  # the last step ended that run
    with open(files / "asked" / "answers.jsonl", "a") as file:
        file.write('{"step": 3, "number": 0}\n{"step": 4, "nu')  # of steps that were not saved
    out, _ = train("asked", *questions, "--resume")
    assert "rate      0.0061 (--lr_init auto: as the run began; docs/guides/learning-rates.md)" in out
    return out


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(files, name):
    return lines_of(files / name / "answers.jsonl")


def numbers(files, name):
    return [(line["step"], line["loss"], line["grad_norm"], line.get("val_loss")) for line in metrics(files, name)]


def test_the_scores_are_logged_and_the_answers_kept(files, asked):
    lines = metrics(files, "asked")
    assert [line["step"] for line in lines if "eval_score" in line] == [1, 2, 3, 5]
    found = answers(files, "asked")
    assert [(answer["step"], answer["number"]) for answer in found] == [(s, n) for s in (1, 2, 3, 5) for n in range(4)]
    for line in (lines[3], lines[5]):
        mine = [answer for answer in found if answer["step"] == line["step"]]
        assert line["eval_score"] == sum(answer["strict"] for answer in mine) / 4
        assert line["eval_flexible"] == sum(answer["flexible"] for answer in mine) / 4
        assert line["eval_flexible"] > line["eval_score"] > 0
        assert f"step {line['step'] + 1}: of 4 questions right: score {line['eval_score']:.1%}" in asked
    assert found[0]["prompt"] == QUESTIONS[0]["prompt"] and found[0]["answer"] == "3" and found[0]["generated"] == " 3"
    assert f"4 questions of {files / 'questions.jsonl'}, asked every 2 steps and at the end" in asked


def test_the_last_answers_are_those_that_eval_finds_of_what_is_saved(files, asked):
    words = ["jsonl", "--model", BASE, "--adapter", str(files / "asked"), "--data", str(files / "questions.jsonl")]
    output = files / "eval.jsonl"
    assert evaluate([*words, "--max_tokens", "24", "--split", "[:4]", "--stop", "\n", "--output", str(output)]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()[1:]]
    assert [{"step": 5, "samples": 6} | record for record in records] == answers(files, "asked")[-4:]


def test_what_the_run_computes_does_not_change(files, train, asked):
    """With dropout, whose random draws the questions must not change."""
    train("silent")
    assert numbers(files, "silent") == numbers(files, "asked")
    silent, other = (load_file(files / name / "adapter.safetensors") for name in ("silent", "asked"))
    assert silent and all(torch.equal(tensor, other[key]) for key, tensor in silent.items())


def test_ranks_share_the_questions_and_each_has_all_answers(tmp_path, monkeypatch):
    """Two ranks run in turn; a stand-in gathers the answers of both."""
    train = TrainConfig(eval_data=write(tmp_path / "questions.jsonl", QUESTIONS), eval_max_tokens=2, eval_every=1)
    model, _ = load_model(BASE)
    plan = Plan(step_samples=2, epoch_steps=9, total_steps=9, first_step=0, first_sample=0)
    exam = Exam(train, load_tokenizer("bytes"))
    examiner = Examiner(exam, tmp_path / "answers.jsonl", train, plan)
    asked = {}

    def gather(parts, records):
        asked[engine.rank] = records
        parts[:] = [asked.get(rank, []) for rank in range(2)]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    for rank in (1, 0):  # the first one writes, and comes last
        engine = SimpleNamespace(model=model, rank=rank, ranks=2)
        scores, words = examiner(engine, done=8, ending=False)
    assert [[record["number"] for record in asked[rank]] for rank in range(2)] == [[0, 2, 4], [1, 3]]
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(line["step"], line["samples"], line["number"]) for line in lines] == [(7, 16, n) for n in range(5)]
    assert scores["eval_score"] == sum(line["strict"] for line in lines) / 5
    assert model.training


@pytest.mark.parametrize(
    "rows, more, message",
    [
        ([{"prompt": "x"}], (), "questions.jsonl, line 1: "),
        ([{"text": "no question"}], (), "no question before an answer"),
        ([{"question": "q", "answer": "none"}], ("--eval_task", "choices"), "line 1: the row has no choices"),
        ([], (), "holds no problem"),
        ([QUESTIONS[0]], ("--eval_template", "absent"), "--eval_template absent: no such file"),
    ],
)
def test_bad_questions_are_told(tmp_path, rows, more, message):
    path = write(tmp_path / "questions.jsonl", rows)
    train = parse_flags(["--data_file", "x", "--load_model", "y", "--eval_data", path, *more]).train
    with pytest.raises(UserError, match=message):
        Exam(train, load_tokenizer("bytes"))


@pytest.mark.parametrize(
    "more, message",
    [
        (("--lm_eval", "gsm8k"), "--lm_eval .*--eval_data, or after the run rwkv-peft eval TASK"),
        (("--eval_data", "q", "--eval_task", "choice"), "invalid choice: 'choice' .*; did you mean choices"),
    ],
)
def test_flags_that_contradict_each_other_are_told(more, message):
    with pytest.raises(UserError, match=message):
        parse_flags(["--data_file", "x", "--load_model", "y", *more])
