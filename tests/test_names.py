"""The names by which flags are judged are those of the things themselves; judging needs neither torch nor numpy."""

import subprocess
import sys

import pytest

from rwkv_peft import names
from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.commands import COMMANDS
from rwkv_peft.data.sources import SAMPLINGS
from rwkv_peft.models import FAMILIES
from rwkv_peft.training.step.schedule import SCHEDULES


def test_words_of_peft_are_those_of_the_methods():
    assert [(m.peft, m.name, m.json_flag) for m in METHODS.values()] == [
        (word, form, methods.json_flag) for word, methods in names.WORDS.items() for form in methods.forms
    ]
    assert tuple(m.name for m in METHODS.values() if m.mini) == names.MINIS


def test_generations_samplings_and_schedules():
    assert tuple((family.name, family.version) for family in FAMILIES) == names.GENERATIONS
    assert tuple(SAMPLINGS) == names.DATALOADS
    assert tuple(SCHEDULES) == tuple(names.SCHEDULES)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.flags], ids=lambda c: c.name)
def test_a_mistaken_flag_is_told_without_torch_and_at_once(command):
    code = (
        "import sys\n"
        "from rwkv_peft.commands import main\n"
        "try:\n"
        f"    main([{command.name!r}, '--no_such_flag'])\n"
        "except ValueError as error:\n"
        "    print(type(error).__name__, bool({'torch', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["UserError", "False"], done.stderr
