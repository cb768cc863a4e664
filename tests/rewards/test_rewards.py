"""Rewards judge answers as their words say, and each failure names the answer or the row, and a remedy."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkv_peft.children import python_command
from rwkv_peft.cli.errors import UserError
from rwkv_peft.rewards import Rewards
from traps import set_traps

ROWS = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 3?", "answer": "#### 5"}]
PROMPTS = ["User: 1 + 1?\n\nAssistant:", "User: 2 + 3?\n\nAssistant:"]


def judge(specs, completions, weights=(), rows=None, **options):
    """Judge completions of so many prompts by the given rewards."""
    rows = rows or [ROWS[n % 2] for n in range(len(completions))]
    with Rewards.open(specs, weights, **options) as rewards:
        rewards.check_rows(rows)
        return rewards.score([f"question {n + 1}" for n in range(len(completions))], completions, rows)


@pytest.fixture
def reward(tmp_path):
    """Write a file of rewards; -> the word that names its function f."""

    def write(code):
        (tmp_path / "mine.py").write_text(code)
        return f"{tmp_path}/mine.py:f"

    return write


@pytest.mark.parametrize(
    "spec, completions, rows, expected",
    [
        ("gsm8k", [" so 2\n#### 2", " so 2", "#### 5"], [ROWS[0]] * 3, [1, 0, 0]),
        ("gsm8k:flexible", [" so 2\n#### 2", " so 2", "#### 5"], [ROWS[0]] * 3, [1, 1, 0]),
        ("jsonl", ["yes ", "Yes.", "no"], [{"prompt": "Is it?", "completion": " yes"}] * 3, [1, 0, 0]),
        ("jsonl:flexible", ["yes ", "Yes.", "no"], [{"prompt": "Is it?", "completion": " yes"}] * 3, [1, 1, 0]),
        ("math", ["\\boxed{\\frac{1}{2}}", "\\boxed{2}"], [{"problem": "x?", "solution": "\\boxed{0.5}"}] * 2, [1, 0]),
        ("choices", [" B", "(B).", "blue", "A"], [{"choices": ["red", "blue"], "answer": 1}] * 4, [1, 1, 1, 0]),
        (r"match:\d+", [" 12\n", "12 a", ""], [{}] * 3, [1, 0, 0]),
        (r"match:(?s)<think>.*:.*</think>", ["<think>a:\nb</think>"], [{}], [1]),
    ],
)
def test_rewards_by_name_judge_as_eval_does(spec, completions, rows, expected):
    if spec == "math":
        pytest.importorskip("math_verify")
    judged = judge([spec], completions, rows=rows)
    assert judged.total == expected and list(judged.each.values()) == [expected]


def test_a_schema_judges_the_whole_answer(tmp_path):
    pytest.importorskip("jsonschema")
    file = tmp_path / "person.json"
    properties = {"age": {"$ref": "#/$defs/n"}}
    form = {"type": "object", "required": ["age"], "properties": properties, "$defs": {"n": {"minimum": 0}}}
    file.write_text(json.dumps(form))
    answers = [' {"age": 3}\n', '{"age": -1}', '{"age": 3} done', '{"age": NaN}', "", "[" * 100_000]
    assert judge([f"json:{file}"], answers).each == {"person": [1, 0, 0, 0, 0, 0]}


def test_a_function_is_given_what_it_takes(reward):
    code = "def f(completions, answer, missing=None): return [len(c) + len(a) for c, a in zip(completions, answer)]"
    assert judge([reward(code)], ["a", "bcd"]).total == [7, 9]
    code = "def f(prompts, completions, **fields): return [sorted(fields), None]"
    with pytest.raises(UserError, match=r"answer 1 of 2 \('question 1'\).*\['answer', 'question'\], no number"):
        judge([reward(code)], ["a", "b"])


def test_a_function_may_import_what_lies_beside_it_but_nothing_there_stands_in_for_a_package(tmp_path, monkeypatch):
    ran = set_traps(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").write_text("VALUE = 3")
    (tmp_path / "mine.py").write_text(
        "import json, beside\ndef f(completions): return [beside.VALUE] * len(completions)"
    )
    assert judge(["mine.py:f"], ["a"]).total == [3]
    assert not ran.exists()


def test_numbers_of_numpy_and_torch_are_numbers(reward):
    code = (
        "import numpy, torch\ndef f(completions): return [numpy.float32(2), torch.tensor(3), True, numpy.bool_(True)]"
    )
    assert judge([reward(code)], list("abcd")).total == [2, 3, 1, 1]
    assert judge([reward("import numpy\ndef f(completions): return numpy.ones(len(completions))")], ["a"]).total == [1]


def test_totals_are_weighted_sums_of_those_that_judge(reward):
    code = "def f(completions): return [None if c == 'none' else float(c) for c in completions]"
    specs, answers = [reward(code), r"match:[12]"], ["1", "none", "3", "2"]
    judged = judge(specs, answers, (2.0, -0.5))
    assert judged.each == {"f": [1, None, 3, 2], "match": [1, 0, 0, 1]}
    assert judged.total == [1.5, -0.0, 6, 3.5]
    assert judge(specs[:1], ["none", "1"]).total == [None, 1]
    assert judge(specs, []) == ([], {"f": [], "match": []})
    assert list(judge(["match:a", "match:b", "match:c"], ["a"]).each) == ["match", "match 2", "match 3"]


def test_what_a_function_prints_is_not_seen(reward, capfd):
    judge(
        [reward("import os\ndef f(completions):\n  print('printed')\n  os.write(2, b'written')\n  return [0]")], ["a"]
    )
    assert capfd.readouterr() == ("", "")


RAISES = "def f(completions):\n  return [1 / len(c) for c in completions]"


@pytest.mark.parametrize(
    "code, completions, message",
    [
        (RAISES, ["a", ""], r"answers 1 to 2 of 2 \('question 1'\): it raised ZeroDivisionError.*mine\.py, line 2"),
        ("def f(completions): return [0, float('nan')]", "ab", r"answer 2 of 2 .* it returned nan; return a finite"),
        ("def f(completions): return [float('inf'), 0]", "ab", r"answer 1 of 2 .* it returned inf; return a finite"),
        ("def f(completions): return [10 ** 400]", "a", r"answer 1 of 1 .* return a finite number"),
        ("def f(completions): return [-1e308]", "a", r"answer 1 of 1 .* return a finite number"),
        ("def f(completions): return ['1', 0]", "ab", r"answer 1 of 2 .* '1', no number; return a number, or None"),
        ("def f(completions): return [1]", "ab", r"answers 1 to 2 of 2 .*returned 1 values for 2 completions; return"),
        ("def f(completions): return 1", "a", r"it returned int; return a list with a number for each"),
        ("def f(completions): pass", "a", r"it returned NoneType; return a list"),
        ("def f(prompts, /): return [1]", "a", "it raised TypeError: .*positional"),
        ("async def f(completions): return [1]", "a", "it returned coroutine; return a list"),
        ("import sys\ndef f(completions): sys.exit(1)", "a", r"answer 1 of 1 .* it raised SystemExit: 1 .*line 2\)"),
        ("import os\ndef f(completions): os._exit(3)", "ab", r"answers 1 to 2 of 2 .* ended with exit code 3; mend"),
        ("import os\ndef f(completions): os.kill(os.getpid(), 9)", "a", r"was killed, as the system does when memory"),
        ("import os\ndef f(completions): os.kill(os.getpid(), 11)", "a", r"ended by SIGSEGV; mend the reward"),
        ("import time\ndef f(completions): time.sleep(99)", "ab", r"answers 1 to 2 .* takes longer than 1 seconds"),
    ],
)
def test_a_function_that_fails_names_the_answer_and_a_remedy(reward, code, completions, message):
    word = reward(code)
    with pytest.raises(UserError, match=message) as error:
        judge([word], list(completions), timeout=1 if "sleep" in code else 60)
    assert str(error.value).startswith(f"--reward {word}: ")


def test_an_expression_that_never_ends_is_ended(monkeypatch):
    """The first answer has a minute, because a busy machine may take a second for it."""
    monkeypatch.setattr(Rewards, "left", property(lambda rewards: 1.0 if rewards.call.first else 60.0))
    with pytest.raises(UserError, match=r"--reward match:\(a\+\)\+b: answer 2 of 2 .* longer than 1 seconds; make it"):
        judge(["match:(a+)+b"], ["b", "a" * 99], timeout=1)


@pytest.mark.parametrize(
    "specs, message",
    [
        (["gsm9k"], "--reward gsm9k: rewards are a task .gsm8k, math, jsonl, choices; .* or FILE.py:FUNCTION"),
        (["lambada"], "--reward lambada: rewards are a task"),
        (["gsm8k:loose"], "--reward gsm8k:loose: gsm8k has no measure 'loose'; name strict or flexible"),
        (["match:a(b"], r"--reward match:a\(b: no regular expression of Python: .*; mend it"),
        (["json:no.json"], "--reward json:no.json: no such file; name a JSON schema"),
        (["no.py:f"], "--reward no.py:f: no such file; name a Python file, as FILE.py:FUNCTION"),
    ],
)
def test_words_that_name_no_reward_are_refused_at_once(specs, message):
    with pytest.raises(UserError, match=message), Rewards.open(specs):
        pass


@pytest.mark.parametrize(
    "code, message",
    [
        ("def g(completions): pass", "the file has no function f; name a function of it"),
        ("f = 3", "the file has no function f"),
        ("x = 1\nimport nothing_of_this_name", r"cannot be loaded: ModuleNotFoundError: .*mine\.py, line 2\); mend it"),
        ("def f(:", "cannot be loaded: SyntaxError"),
        ("raise SystemExit(0)", "cannot be loaded: SystemExit: 0"),
        ("import os; os._exit(0)", "ended with exit code 0; mend the reward"),
    ],
)
def test_files_without_such_a_function_are_refused_at_once(reward, code, message):
    word = reward(code)
    with pytest.raises(UserError, match=message) as error, Rewards.open(["match:a", word]):
        pass
    assert str(error.value).startswith(f"--reward {word}: ")


@pytest.mark.parametrize(
    "schema, reason",
    [("{", "Expecting property"), ("3", ""), ('{"type": "text"}', "'text' is not valid"), ("[" * 99_999, "")],
)
def test_schemas_that_are_none_are_refused_at_once(tmp_path, schema, reason):
    pytest.importorskip("jsonschema")
    (tmp_path / "form.json").write_text(schema)
    message = f"form.json: the file is no JSON schema that is read here: .*{reason}.*; write it by draft 2020-12"
    with pytest.raises(UserError, match=message), Rewards.open([f"json:{tmp_path}/form.json"]):
        pass


def test_a_schema_fetches_nothing(tmp_path):
    pytest.importorskip("jsonschema")
    (tmp_path / "form.json").write_text('{"$ref": "https://example.org/schema"}')
    with pytest.raises(UserError, match="answer 1 of 1 .* it raised .*example.org"):
        judge([f"json:{tmp_path}/form.json"], ["{}"])


def test_a_missing_package_is_named_with_what_installs_it(tmp_path, monkeypatch):
    from rwkv_peft.rewards import judges

    monkeypatch.setattr(judges.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"has no package jsonschema; .*setup.sh eval\)"):
        judges.Schema(str(tmp_path / "form.json"))


@pytest.mark.parametrize(
    "code, last, message",
    [
        ("def f(completions, gold): pass", {}, "row 1: the function takes gold, and the row has the fields question"),
        ("def f(completions, extra): pass", {}, "row 1002: the function takes extra, .*; add the field, or give"),
        ("def f(completions): pass", {"question": "?"}, "row 1002: a row has the fields question; one of answer"),
    ],
)
def test_rows_that_cannot_be_judged_are_told_before_training(reward, code, last, message):
    rows = [{**ROWS[0], "extra": 1}] * 1001 + [last or ROWS[0]]
    with Rewards.open(["gsm8k", reward(code)]) as rewards, pytest.raises(UserError, match=message):
        rewards.check_rows(rows)


def gone(pid):
    """True if a process ends within a minute."""
    for _ in range(600):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


STARTS = """
import os, subprocess
def f(completions):
    child = subprocess.Popen(["sleep", "99"])
    return [os.getpid(), child.pid]
"""


def test_processes_end_with_the_rewards(reward):
    pids = judge([reward(STARTS)], ["a", "b"]).total
    assert all(gone(int(pid)) for pid in pids)


def test_processes_end_with_a_run_that_is_killed(reward, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import time\nfrom rwkv_peft.rewards import Rewards\n"
        f"with Rewards.open([{reward(STARTS)!r}]) as rewards:\n"
        "    print(*map(int, rewards.score(['a'] * 2, ['b'] * 2, [{}] * 2).total), flush=True)\n    time.sleep(99)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(python_command("x")[1]).parents[1])}
    run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    pids = run.stdout.readline().split()
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert len(pids) == 2 and all(gone(pid) for pid in pids)
