"""lm_eval's tasks on the demo's base, from files alone, beside our own evaluation of the same rows."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evals.local_tasks import PASSAGES, TASKS, offline, write_tasks
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.evals import command, flags
from rwkv_peft.evals.scoring import score
from rwkv_peft.inference.loading import load_model
from rwkv_peft.inference.settings import Sampling

ROOT = Path(__file__).resolve().parents[2]
MODEL = ("--model", str(ROOT / "demo" / "rwkv6-demo.pth"))


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("rwkv_peft.evals.harness")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of tasks over files of rows."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def done(folder, harness):
    """Run the command as a user types it -> (its output, the results it wrote, {task: samples})."""
    words = ["eval", *(f"our_{name}" for name in TASKS), "--include_path", str(folder), *MODEL, "--batch", "2"]
    files = ["--output", str(folder / "results.json"), "--samples", str(folder / "samples.jsonl")]
    how = dict(env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}, cwd=folder)
    command = [sys.executable, "-m", "rwkv_peft", *words, *files]
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert done.returncode == 0 and "fatal" not in done.stderr, done.stderr  # git's word where there is no repository
    samples = {}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        samples.setdefault(sample["task"], []).append(sample)
    return done.stdout, json.loads((folder / "results.json").read_text()), samples


def ours(folder, task, *more):
    """The records of our own evaluation of the same rows."""
    output = folder / f"{task}-ours.jsonl"
    assert command.main([task, *MODEL, "--data", str(folder / f"{task}.jsonl"), "--output", str(output), *more]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()[1:]]


def test_choices_are_as_probable_as_ours(done, folder):
    table, results, samples = done
    records = ours(folder, "choices", "--template", "plain")
    for record, sample in zip(records, samples["our_choices"], strict=True):
        assert [float(logprob) for ((logprob, _),) in sample["resps"]] == pytest.approx(record["logprobs"], abs=1e-4)
        assert bool(sample["acc"]) is record["by sum"]
    assert results["results"]["our_choices"]["acc,none"] == 0.5
    assert "|our_choices|" in table and "|acc " in table
    assert results["config"]["model"] == MODEL[1]


def test_last_words_and_whole_texts_are_as_probable_as_their_tokens(done):
    (model, start), tokenizer, samples = load_model(MODEL[1]), load_tokenizer("bytes"), done[2]
    for row, last, whole in zip(PASSAGES, samples["our_lambada"], samples["our_rolling"], strict=True):
        before, word = row["text"].rsplit(" ", 1)
        prompts = [tokenizer.encode(before), [0]]
        texts = [[tokenizer.encode(f" {word}")], [tokenizer.encode(row["text"])]]
        (word_score,), (text_score,) = score(model, prompts, texts, start)
        ((logprob, greedy),) = last["resps"][0]
        assert float(logprob) == pytest.approx(word_score.logprob, abs=1e-4) and greedy is word_score.greedy
        assert float(whole["resps"][0][0]) == pytest.approx(text_score.logprob, abs=1e-3)


def test_answers_are_those_that_we_write(done, folder):
    _, _, samples = done
    (folder / "layout.txt").write_text("{question}\nA:")
    shutil.copy(folder / "gsm8k.jsonl", folder / "jsonl.jsonl")
    records = ours(folder, "jsonl", "--template", str(folder / "layout.txt"), "--stop", "\n", "--max_tokens", "20")
    for record, sample in zip(records, samples["our_gsm8k"], strict=True):
        assert sample["resps"] == [[record["generated"]]]
    assert [bool(sample["exact_match"]) for sample in samples["our_gsm8k"]] == [True, False]


def test_what_a_task_asks_of_its_answers(harness):
    manner, stops = harness.generation_of, harness.stops_of_request
    assert manner({"until": ["x"], "do_sample": False, "temperature": 0.7}) == (Sampling(temperature=0), 256)
    assert manner({"max_new_tokens": 9, "num_beams": 1}) == (Sampling(temperature=0), 9)
    assert manner({"do_sample": True, "temperature": 0.7, "top_p": 0.9}) == (Sampling(temperature=0.7, top_p=0.9), 256)
    assert manner({"temperature": 0.5, "top_k": 3}) == (Sampling(temperature=0.5, top_p=1.0, top_k=3), 256)
    assert stops({"until": ["a", ""]}) == stops({"until": "a"}) == ("a",)


def test_all_of_a_context_and_its_continuation_is_read(harness):
    world = load_tokenizer("world")
    for context, continuation in (("Answer:", " Paris"), ("Answer: ", "Paris"), ("is", "n't"), ("\n", "word")):
        before, behind = harness.in_two(world, context, continuation)
        assert world.decode(before + behind) == (context + continuation) and before
        assert world.decode(behind) == context[len(context.rstrip()) :] + continuation
    assert harness.in_two(world, "", "word")[0] == harness.question(harness.ROLLING, ("word",), world, 0).context == [0]


BROKEN = {
    "target": ("choices", "doc_to_target: answer", "doc_to_target: []", "cannot be asked: ValueError"),
    "type": ("choices", "output_type: multiple_choice", "", "cannot be asked: TypeError"),
    "text": ("lambada", "doc_to_text: .*", "doc_to_text: 7", "cannot be asked: AssertionError: Context is not a"),
    "metric": ("gsm8k", "metric_list: .*", "metric_list: 5", "cannot be loaded: TypeError"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_task_is_named_with_its_file(folder, tmp_path, monkeypatch, harness, case):
    task, old, new, message = BROKEN[case]
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    text = (folder / f"{task}.yaml").read_text().replace(f"task: our_{task}", "task: broken")
    (tmp_path / "broken.yaml").write_text(re.sub(old, new, text))
    with pytest.raises(UserError, match=re.escape(f"broken ({tmp_path / 'broken.yaml'}) ") + message):
        command.main(["broken", "--include_path", str(tmp_path), *MODEL, "--limit", "1"])


def test_requests_that_are_no_texts_are_told(harness):
    world = load_tokenizer("world")
    for kind, arguments in ((harness.SCORED, ("a", ["b"])), (harness.ROLLING, (5,)), (harness.GENERATED, (None, {}))):
        with pytest.raises(UserError, match="a text is due .doc_to_text, doc_to_target"):
            harness.question(kind, arguments, world, 0)
    for until in (5, ["a", 5], {"a": 1}):
        with pytest.raises(UserError, match="a text is due, or a list of texts"):
            harness.stops_of_request({"until": until})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["our_choice", "--include_path", "."], "there is no task our_choice in lm_eval or in .; is it our_choices"),
        (["gone", "--include_path", "."], r"the data of gone \(.*gone.yaml\) is not on this disk, and "),
        (["beams", "--include_path", "."], "asks for num_beams 4 in its generation_kwargs"),
        (["our_choices", "--include_path", ".", "--output", "choices.yaml"], "is the file given as --include_path"),
    ],
)
def test_tasks_that_cannot_serve_are_told(folder, monkeypatch, harness, arguments, message):
    offline(monkeypatch)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        command.main([*arguments, *MODEL])


@pytest.mark.parametrize(
    "group, members, reads_all",
    [("own", "our_choices, our_lambada", False), ("mixed", "our_choices, of_theirs", True), ("nested", "own", True)],
)
def test_a_group_of_a_folders_own_tasks_needs_no_others(
    harness, folder, tmp_path, monkeypatch, group, members, reads_all
):
    from lm_eval.tasks import TaskManager

    everything, read = TaskManager.__init__, []

    def with_few_defaults(self, include_path, include_defaults):
        """Put the tasks of `folder` in place of lm_eval's own."""
        read.append(include_defaults)
        everything(self, include_path=[str(tmp_path), *[str(folder)] * include_defaults], include_defaults=False)

    for name in ("choices", "lambada"):
        shutil.copy(folder / f"{name}.yaml", tmp_path)
    theirs = (folder / "choices.yaml").read_text().replace("our_choices", "of_theirs")
    (folder / "theirs.yaml").write_text(theirs)
    (tmp_path / "own.yaml").write_text("group: own\ntask: [our_choices, our_lambada]\n")
    (tmp_path / f"{group}.yaml").write_text(f"group: {group}\ntask: [{members}]\n")
    monkeypatch.setattr(TaskManager, "__init__", with_few_defaults)
    tasks, names = harness.load_tasks([group], str(tmp_path))
    assert names == [group] and any(read) == reads_all
    leaves = {"own": "our_lambada", "mixed": "of_theirs", "nested": "our_lambada"}
    assert tasks.load(names)["tasks"].keys() == {"our_choices", leaves[group]}


def test_without_the_harness_its_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="arc_easy: .* whose package lm_eval this Python lacks; .*setup.sh eval"):
        flags.parse_flags(["arc_easy", *MODEL])


def test_tasks_that_were_ours_too_are_the_harnesss(monkeypatch):
    """Also with --harness, which asked for that."""
    for words in (["gsm8k"], ["gsm8k", "--harness"]):
        args = flags.parse_flags([*words, *MODEL])
        assert args.harness and args.tasks == ["gsm8k"]
