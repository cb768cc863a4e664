"""The table of rules, by entry: a command that breaks one is refused in its words, and its flags' help tells it."""

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.cli.rules import EXCLUDES, NEEDS, parts_of, worded
from rwkv_peft.config.objective import LOADED, OWN_TEACHER
from rwkv_peft.config.rules import ALONE, BESIDE, INIT, SEVERAL, WHOLE
from rwkv_peft.objectives import OBJECTIVES
from rwkv_peft.training.flags.parser import RULES, build_parser
from rwkv_peft.training.flags.request import parse_flags

ACTIONS = build_parser()._option_string_actions
FACTS = {
    ALONE: "--peft none --train_parts state",
    BESIDE: "--train_parts state",
    WHOLE: "--peft none",
    LOADED: '--peft pissa --pissa_config {"pissa_load":"x"}',
    SEVERAL: "--data_file a b",
    INIT: '--peft pissa --peft_config {"pissa_init":"x"}',
    OWN_TEACHER: "--data_type contexts",
    "--think_labels": "--think_labels 3 9",
    "--state_parts": "--state_parts shift",
    "--encoding": "--encoding gbk",
}
SHOWN = {LOADED: f"{LOADED} (x)"}
ANOTHER = {"peft": "lora", "train_parts": "ln", "micro_bsz": "2", "loss_mask": "none", "eval_task": "choices"}
ANOTHER |= {"optim": "adamw8bit", "lr_schedule": "linear", "dataload": "pad", "data_type": "binidx"}
SHARES = ("val_split", "distill_beta", "distill_weight", "replay_share", "top_p")  # flags whose values are at most 1
CASES = [(rule, *pair) for rule in RULES for pair in zip(rule.subjects.split(", "), [rule.others.split(", ")] * 9)]


def words(condition):
    """A piece of a command line for which a condition holds."""
    name, wanted = parts_of(condition)
    if name == "objective":
        objective = wanted.split("|")[-1]
        return f"--objective {objective} --data_type {OBJECTIVES[objective].rows[-1]}"
    if condition in FACTS or wanted:
        return FACTS.get(condition) or f"--{name} {ANOTHER[name] if wanted[0] == '!' else wanted.split('|')[-1]}"
    action = ACTIONS[condition]
    unlike = [choice for choice in action.choices or () if choice != action.default]
    number = 1 if action.metavar == "0|1" else 0.3 if name in SHARES else 3
    return condition if action.nargs == 0 else f"{condition} {unlike[0] if unlike else number}"


def refusals(*conditions):
    command = " ".join(map(words, conditions))
    with pytest.raises(UserError) as refusal:  # of --ctx_len in any case
        parse_flags(["--data_file", "data", "--ctx_len", "0", *command.split()])
    return str(refusal.value)


@pytest.mark.parametrize("rule, subject, others", CASES, ids=lambda part: part if isinstance(part, str) else "")
def test_a_command_that_breaks_a_rule_is_refused_in_its_words(rule, subject, others):
    if rule.verb == NEEDS:
        other = ["--objective ipo"] * (others == ["--objective next_token"])  # which is that of no flag
        assert f"{NEEDS} {worded(' or '.join(others))}: {rule.why}; " in refusals(subject, *other)
        for other in others:
            assert rule.why not in refusals(subject, other)
        return
    for other in others:
        told, name = refusals(subject, other), parts_of(other)[0]
        shown = SHOWN.get(other, other) if other in FACTS else words(other) if parts_of(other)[1] else f"--{name}"
        assert f" {EXCLUDES} {shown}" in told and f": {rule.why}; " in told
        assert f"{rule.why}; {rule.remedy or 'leave one of them out'}" in told


@pytest.mark.parametrize("rule, subject, others", CASES, ids=lambda part: part if isinstance(part, str) else "")
def test_the_help_of_a_flag_tells_its_rules(rule, subject, others):
    for own, other in [(subject, other) for other in others] + [(other, subject) for other in others]:
        if own.startswith("--") and (own == subject or rule.verb == EXCLUDES):
            name, wanted = parts_of(own)
            _, _, note = ACTIONS[f"--{name}"].help.rpartition(" [")
            assert worded(other) in note and worded(wanted.removeprefix("1")) in note


def test_values_in_rules_are_those_of_their_flags():
    for rule in RULES:
        for condition in (*rule.subjects.split(", "), *rule.others.split(", ")):
            name, wanted = parts_of(condition)
            choices = ACTIONS[f"--{name}"].choices if condition not in FACTS else None
            for value in wanted.removeprefix("!").split("|") if wanted and choices else ():
                assert value in map(str, choices), condition
