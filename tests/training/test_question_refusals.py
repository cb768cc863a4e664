"""Questions while training that cannot be asked are told before the run begins."""

from types import SimpleNamespace

import pytest

from evals.local_tasks import offline, write_tasks
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import TrainConfig
from rwkv_peft.data.preprocess import main as preprocess
from rwkv_peft.data.recorded import vocabulary_of
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.evals.exam import Exam
from rwkv_peft.training.flags.request import parse_flags
from rwkv_peft.training.measuring.exams import find_exams
from rwkv_peft.training.run import main as run_training
from training.test_questions import BASE, QUESTIONS, needs_lm_eval, write


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of data and of lm_eval's tasks."""
    folder = tmp_path_factory.mktemp("refused")
    rows = write(folder / "rows.jsonl", 60 * [{"text": "to be or not to be"}])
    preprocess([rows, "--tokenizer", "bytes", "--output", str(folder / "data")])
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")
    return folder


@needs_lm_eval
@pytest.mark.parametrize(
    "task, message",
    [
        ("gone", "the data of gone .*is not on this disk, .* of your own with --lm_eval_include_path"),
        ("beams", "asks for num_beams 4 in its generation_kwargs"),
        ("fickle", "--lm_eval fickle: a task asks other questions each time"),
        ("our_choice", "there is no task our_choice in lm_eval or in .*; is it our_choices"),
    ],
)
def test_tasks_that_cannot_serve_are_told_before_the_run_begins(files, monkeypatch, task, message):
    offline(monkeypatch)
    words = ["--load_model", BASE, "--data_file", str(files / "data"), "--ctx_len", "64", "--accelerator", "cpu"]
    more = ["--proj_dir", str(files / "none"), "--lm_eval", task, "--lm_eval_include_path", str(files / "tasks")]
    with pytest.raises(UserError, match=message):
        run_training([*words, *more])
    assert not list((files / "none").rglob("*.json*"))


def test_lm_eval_without_its_package_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--lm_eval arc_easy needs the package lm_eval; "):
        parse_flags(["--data_file", "x", "--load_model", "y", "--lm_eval", "arc_easy"])


@pytest.mark.parametrize(
    "rows, more, message",
    [
        ([{"prompt": "x"}], (), r"questions.jsonl, line 1: "),
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


def test_a_tokenizer_that_nothing_tells_is_refused(tmp_path):
    """The data has no record of it, and the vocabulary has no usual size."""
    train = TrainConfig(eval_data=write(tmp_path / "questions.jsonl", QUESTIONS))
    samples = SimpleNamespace(vocabulary=None, notes=[])

    def config(size):
        return SimpleNamespace(
            train=train, model=SimpleNamespace(vocab_size=size), data=SimpleNamespace(path="d", clean_turns=True)
        )

    with pytest.raises(UserError, match="no known tokenizer has 80 tokens; make the data with rwkv-peft"):
        find_exams(config(80), samples)
    assert len(find_exams(config(257), samples)["answers.jsonl"]) == 5 and "5 questions of " in samples.notes[0]
    samples.vocabulary = vocabulary_of(load_tokenizer("bytes"))
    with pytest.raises(UserError, match="the tokenizer bytes has 257 tokens, and the model 80"):
        find_exams(config(80), samples)


@pytest.mark.parametrize(
    "more, message",
    [
        (("--lm_eval", "t", "--eval_task", "choices"), "--eval_task choices needs --eval_data"),
        (("--eval_data", "q", "--lm_eval_num_fewshot", "0"), "--lm_eval_num_fewshot 0 needs --lm_eval"),
        (("--lm_eval", "t", "--lm_eval_include_path", "absent"), "--lm_eval_include_path absent is no folder"),
        (("--eval_data", "q", "--strategy", "deepspeed_stage_3"), "take stage 1 or 2"),
        (
            ("--eval_data", "q", "--eval_task", "choices", "--eval_max_tokens", "9"),
            "--eval_task choices: its answers are not written",
        ),
        (("--eval_data", "q", "--eval_task", "choice"), "invalid choice: 'choice' .*; did you mean choices"),
        (("--eval_data", "q", "--eval_task", "gsm8k"), "invalid choice: 'gsm8k' .* is --lm_eval gsm8k here"),
        (("--eval_data", "q", "--eval_task", "math"), "math of other tools is --lm_eval hendrycks_math"),
        (("--eval_data", "q", "--eval_task", "lambada"), "lambada of other tools is --lm_eval lambada_openai"),
        (("--eval_data", "q", "--eval_batch", "0"), "0 is below 1"),
    ],
)
def test_flags_that_contradict_each_other_are_told(more, message):
    with pytest.raises(UserError, match=message):
        parse_flags(["--data_file", "x", "--load_model", "y", *more])
