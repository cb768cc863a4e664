"""Tasks of lm_eval over files of rows, which need no network; the demo's base knows some of the answers."""

import json

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
GROUP = """group: ours
task: [our_choices, our_lambada]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
FICKLE = """import itertools

numbers = itertools.count()


def text(doc):
    return f"Question {next(numbers)}"
"""
DATA = {"choices": CHOICES, "lambada": PASSAGES, "rolling": PASSAGES, "gsm8k": NUMBERS}


def offline(monkeypatch):
    """Without lm_eval's own tasks, whose half a minute is not what is tested, and without a network."""
    from lm_eval.tasks import TaskManager

    everything = TaskManager.__init__
    own = lambda self, **options: everything(self, **options | {"include_defaults": False})  # noqa: E731
    monkeypatch.setattr(TaskManager, "__init__", own)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write_tasks(folder):
    """Write our_choices, our_lambada, the group ours of both, our_rolling and our_gsm8k into a folder, and three that
    cannot be used: gone, beams, fickle."""
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
    (folder / "ours.yaml").write_text(GROUP)
    (folder / "fickle.py").write_text(FICKLE)
    rolling = (folder / "rolling.yaml").read_text().replace("our_rolling", "fickle")
    (folder / "fickle.yaml").write_text(rolling.replace('"{{text}}"', "!function fickle.text"))
    return folder
