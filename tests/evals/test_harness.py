"""lm_eval's tasks on the demo's base, from files alone, beside our own evaluation of the same rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_peft.errors import UserError
from rwkv_peft.evals import command, harness_command, harness_flags
from rwkv_peft.generate.loading import Subject

ROOT = Path(__file__).resolve().parents[2]
MODEL = ("--model", str(ROOT / "demo" / "rwkv6-demo.pth"))
STORY = "The sun is up. Tom has 3 brown grapes. A dog sleeps.\nQ: {}\nA:"
CHOICES = [
    {"question": STORY.format("What is there?"), "choices": ["3 brown grapes", "4 red dolls", "5 hats"], "answer": 0},
    {"question": STORY.format("How many?"), "choices": ["9", "3"], "answer": 0},
]
PASSAGES = [{"text": STORY.format("How many?") + word} for word in (" 3", " golden")]
NUMBERS = [{"query": STORY.format("How many?").removesuffix("\nA:"), "response": f"#### {n}"} for n in ("3", "4")]
TASKS = {
    "choices": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "lambada": """output_type: loglikelihood
doc_to_text: "{{text.rsplit(' ', 1)[0]}}"
doc_to_target: "{{' ' + text.rsplit(' ', 1)[1]}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: perplexity}]
""",
    "rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
""",
    "gsm8k": """output_type: generate_until
doc_to_text: "{{query}}\\nA:"
doc_to_target: "{{response.split('#### ')[1]}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 20}
filter_list: [{name: number, filter: [{function: regex, regex_pattern: "([0-9]+)"}, {function: take_first}]}]
metric_list: [{metric: exact_match}]
""",
}
DATA = {"choices": CHOICES, "lambada": PASSAGES, "rolling": PASSAGES, "gsm8k": NUMBERS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of tasks over files of rows."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in DATA[name]))
        head = f"task: our_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{head}test_split: test\n{text}")
    (folder / "gone.yaml").write_text(
        "task: gone\ndataset_path: nobody/has-this\ntest_split: test\n" + TASKS["rolling"]
    )
    (folder / "beams.yaml").write_text(
        (folder / "gsm8k.yaml").read_text().replace("our_gsm8k", "beams").replace("max_gen_toks: 20", "num_beams: 4")
    )
    return folder


@pytest.fixture(scope="module")
def done(folder):
    """What the command as a user types it printed and wrote: (its output, results, {task: samples})."""
    pytest.importorskip("lm_eval")
    words = ["lm_eval", *(f"our_{name}" for name in TASKS), "--include_path", str(folder), *MODEL, "--batch", "2"]
    files = ["--output", str(folder / "results.json"), "--samples", str(folder / "samples.jsonl")]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    done = subprocess.run(
        [sys.executable, "-m", "rwkv_peft", *words, *files], capture_output=True, text=True, env=offline, cwd=folder
    )
    assert done.returncode == 0, done.stderr
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


def test_last_words_are_as_probable_as_ours(done, folder):
    _, _, samples = done
    for record, sample in zip(ours(folder, "lambada"), samples["our_lambada"], strict=True):
        ((logprob, greedy),) = sample["resps"][0]
        assert float(logprob) == pytest.approx(record["logprobs"][0], abs=1e-4) and greedy is record["last word"]


def test_a_whole_text_is_as_probable_as_its_tokens(done, folder):
    from rwkv_peft.evals.scoring import score

    _, _, samples = done
    model, start, tokenizer = subject()
    for row, sample in zip(PASSAGES, samples["our_rolling"], strict=True):
        ((found,),) = score(model, [[0]], [[tokenizer.encode(row["text"])]], start)
        assert float(sample["resps"][0][0]) == pytest.approx(found.logprob, abs=1e-3)


def test_answers_are_those_that_we_write(done, folder):
    _, _, samples = done
    (folder / "layout.txt").write_text("{question}\nA:")
    records = ours(folder, "gsm8k", "--template", str(folder / "layout.txt"), "--stop", "\n", "--max_tokens", "20")
    assert [record["flexible"] for record in records] == [True, False]
    for record, sample in zip(records, samples["our_gsm8k"], strict=True):
        assert sample["resps"] == [[record["generated"]]] and bool(sample["exact_match"]) is record["flexible"]


def subject():
    from rwkv_peft.data.tokenizer import load_tokenizer
    from rwkv_peft.generate.loading import load_model

    model, start = load_model(MODEL[1])
    return Subject(model, start, load_tokenizer("bytes"))


def test_what_a_task_asks_of_its_answers():
    pytest.importorskip("lm_eval")
    from rwkv_peft.evals.harness import manner, stops_of_request
    from rwkv_peft.generate.settings import Sampling

    assert manner({"until": ["x"], "do_sample": False, "temperature": 0.7}) == (Sampling(temperature=0), 256)
    assert manner({"max_new_tokens": 9, "num_beams": 1}) == (Sampling(temperature=0), 9)
    assert manner({"do_sample": True, "temperature": 0.7, "top_p": 0.9}) == (Sampling(temperature=0.7, top_p=0.9), 256)
    assert manner({"temperature": 0.5, "top_k": 3}) == (Sampling(temperature=0.5, top_p=1.0, top_k=3), 256)
    assert stops_of_request({"until": ["a", ""]}) == stops_of_request({"until": "a"}) == ("a",)


def test_all_of_a_context_and_its_continuation_is_read():
    pytest.importorskip("lm_eval")
    from rwkv_peft.data.tokenizer import load_tokenizer
    from rwkv_peft.evals.harness import Harness

    world = load_tokenizer("world")
    harness = Harness(Subject(None, None, world), 1)
    for context, continuation in (("Answer:", " Paris"), ("Answer: ", "Paris"), ("is", "n't"), ("\n", "word")):
        before, behind = harness._encode_pair(context, continuation)
        assert world.decode(before + behind) == (context + continuation) and before
        assert world.decode(behind) == context[len(context.rstrip()) :] + continuation
    assert harness.eot_token_id == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["our_choice", "--include_path", "."], "there is no task our_choice in lm_eval or in .; is it our_choices"),
        (["gone", "--include_path", "."], "the data of gone is not on this disk, and .* cannot be reached"),
        (["beams", "--include_path", "."], "asks for num_beams 4 in its generation_kwargs"),
        (["our_choices", "--include_path", ".", "--output", "choices.yaml"], "is the file given as --include_path"),
    ],
)
def test_tasks_that_cannot_serve_are_told(folder, monkeypatch, arguments, message):
    pytest.importorskip("lm_eval")
    import datasets
    from lm_eval.tasks import TaskManager

    everything = TaskManager.__init__
    monkeypatch.setattr(  # whose half a minute is not what is tested
        TaskManager, "__init__", lambda self, **options: everything(self, **options | {"include_defaults": False})
    )
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        harness_command.main([*arguments, *MODEL])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["x", "--batch", "0"], "--batch 0"),
        (["x", "--limit", "0"], "0 is below 1"),
        (["x", "--include_path", "absent"], "--include_path absent is no folder"),
        (["x", "--fewshot", "2"], "did you mean --num_fewshot"),
    ],
)
def test_mistaken_flags_are_told(arguments, message):
    with pytest.raises(UserError, match=message):
        harness_flags.parse_flags([*arguments, *MODEL])
