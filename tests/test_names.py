"""The names by which flags are judged are those of the things themselves; judging needs neither torch nor numpy."""

import subprocess
import sys

import pytest

from rwkv_peft import names
from rwkv_peft.adapters.methods import METHODS, word_of
from rwkv_peft.commands import COMMANDS
from rwkv_peft.data.sources import SAMPLINGS
from rwkv_peft.models import FAMILIES


def test_a_methods_settings_are_told_by_its_word():
    for name, method in METHODS.items():
        word = word_of(method)
        assert method.name == name and all(word.takes(field) for field in method.tensors.size)
        assert word.takes("alpha") == (method.alpha is not None)
        assert all(word.takes(field) for _, field in method.rates)


def test_generations_and_samplings():
    assert tuple((family.name, family.version) for family in FAMILIES) == names.GENERATIONS
    assert tuple(SAMPLINGS) == names.DATALOADS


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
