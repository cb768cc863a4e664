"""The commands' tables of rules, by entry: a command that breaks one is refused in its words, and its help tells it."""

import re
import shlex

import pytest

from rwkv_peft.cli.commands import main
from rwkv_peft.cli.errors import UserError
from rwkv_peft.cli.parser import Parser
from rwkv_peft.cli.rules import EXCLUDES, NEEDS, parts_of, worded
from rwkv_peft.data import preprocess_flags as preprocess
from rwkv_peft.evals import flags as evals
from rwkv_peft.inference import flags as generate
from rwkv_peft.inference.serve import flags as serve
from rwkv_peft.release import flags as release
from rwkv_peft.tools.plan import command as plan
from rwkv_peft.tools.study import flags as study

TRAIN = "--load_model b.pth --data_file rows.jsonl --data_type sft --tokenizer bytes"
# a command, its rules, and a command line that lacks what they are about; {} is the place of that
COMMANDS = (
    ("generate", generate.RULES, "--model m.pth {}"),
    ("eval", evals.RULES, "--model m.pth {}"),
    ("serve", serve.RULES, "--model m.pth {}"),
    ("merge", release.MERGE_RULES, "--base_model b.pth --bone_checkpoint a.safetensors {}"),
    ("check", release.CHECK_RULES, "--merged m.pth {}"),
    ("prove", release.PROVE_RULES, "out {}"),
    ("convert", release.CONVERT_RULES, "a.safetensors a.pth {}"),
    ("preprocess", preprocess.RULES, "rows.jsonl {}"),
    ("plan", plan.RULES, "{}"),
    ("study", study.RULES, "--load_model b.pth --output s {}"),
)
OURS, HARNESS, CHOICES = "jsonl", "arc_easy", "choices"
FACTS = {
    evals.OTHERS: f"{OURS} {HARNESS}",
    evals.LEFT: "lambada",
    evals.OURS: OURS,
    evals.HARNESS: HARNESS,
    evals.CHOICES: CHOICES,
    serve.REACHED: "--host 0.0.0.0",
}
# a value of a flag for which its condition holds, if another than 3
VALUES = {
    "--output": "x.png",
    "--to": "lora",
    "--think": "on",
    "--clean_turns": "0",
    "--tool_form": "hermes",
    "--encoding": "gb18030",
    "--document_end": "stars",
    "--turns_in_text": "auto",
    "--gguf_types": "q8_0",
    "--gpu": "24GiB",
    "--part_tokens": "64",
    "--top_p": "0.5",
    "--at_least": "0.5",
    "--append_eod 0": "--no-append_eod",
    "--shots !0": "--shots 3",
    "--train_parts": "ln",
    "--state_parts": "shift",
    "--val_split": "0.1",
}
WITH = {"objective": "--objective dpo --data_type pairs"}
CASES = [
    (name, line, rule, subject, rule.others.split(", "))
    for name, rules, line in COMMANDS
    for rule in rules
    for subject in rule.subjects.split(", ")
]
BY_CASE = pytest.mark.parametrize(
    "name, line, rule, subject, others", CASES, ids=[f"{case[0]} {case[3]} {case[2].others}" for case in CASES]
)
SWITCHES = (
    *("--chat", "--dry_run", "--escapes", "--ids", "--overwrite", "--skip_bad_rows"),
    *("--drop_duplicates", "--runtimes", "--any_base"),
)


def words(condition):
    """A piece of a command line for which a condition holds."""
    flag, wanted = parts_of(condition)
    if not condition.startswith("--"):
        return FACTS.get(condition, "")
    if condition in SWITCHES or condition in VALUES and VALUES[condition].startswith("--"):
        return VALUES.get(condition, condition)
    if flag in WITH:
        return WITH[flag]
    return f"--{flag} {wanted.split('|')[0] or VALUES.get(condition, '3')}"


def refusal(name, line, *conditions):
    """What a command says of a command line for which conditions hold; no file of it exists."""
    own = [words(condition) for condition in conditions]
    if name == "eval" and not set(FACTS) & set(conditions):
        own.append(OURS)
    try:
        main([name, *shlex.split(line.format(" ".join(sorted(own, reverse=True))))])
    except UserError as error:
        return str(error)
    return ""


@BY_CASE
def test_a_command_that_breaks_a_rule_is_refused_in_its_words(name, line, rule, subject, others):
    if rule.verb == NEEDS:
        assert f"{NEEDS} {worded(' or '.join(others))}: {rule.why}; " in refusal(name, line, subject)
        assert all(rule.why not in refusal(name, line, subject, other) for other in others)
        return
    for other in others:
        told = refusal(name, line, subject, other)
        assert re.search(rf" {EXCLUDES} .*: {re.escape(rule.why)}; {rule.remedy or 'leave one of them out'}", told)


@BY_CASE
def test_the_help_of_a_flag_tells_its_rules(name, line, rule, subject, others, monkeypatch):
    actions = {}
    monkeypatch.setattr(Parser, "print_help", lambda parser: actions.update(parser._option_string_actions))
    with pytest.raises(SystemExit):
        main([name, "--help"])
    for own, other in [(subject, other) for other in others] + [(other, subject) for other in others]:
        flag, wanted = parts_of(own)
        if f"--{flag}" in actions and own.startswith("--") and (own == subject or rule.verb == EXCLUDES):
            _, _, note = actions[f"--{flag}"].help.rpartition(" [")
            assert worded(other) in note and worded(wanted) in note
