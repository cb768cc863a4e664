"""The tables by which flags are judged hold what they say; judging needs neither torch nor numpy."""

import subprocess
import sys

import pytest

from rwkv_peft.adapters.methods import METHODS, word_of
from rwkv_peft.commands import COMMANDS
from rwkv_peft.data.samples import Samples
from rwkv_peft.evals.task import AnswerTask, ChoiceTask
from rwkv_peft.models import FAMILIES
from rwkv_peft.tables import GENERATIONS, SAMPLINGS, SCORED, WRITTEN


def test_a_methods_settings_are_told_by_its_word():
    for name, method in METHODS.items():
        word = word_of(method)
        assert method.name == name and all(word.takes(field) for field in method.tensors.size)
        assert word.takes("alpha") == (method.alpha is not None)
        assert all(word.takes(field) for _, field in method.rates)


def test_things_are_what_their_tables_call_them():
    assert [family.version for family in FAMILIES] == list(GENERATIONS)
    assert [family.name for family in FAMILIES] == ["RWKV-6", "RWKV-7", "RWKV-7a", "RWKV-7b"]
    assert all(issubclass(sampling, Samples) for sampling in SAMPLINGS.values())
    assert all(issubclass(task, AnswerTask) for task in WRITTEN.values())
    assert all(issubclass(task, ChoiceTask) for task in SCORED.values())


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.flags], ids=lambda c: c.name)
def test_a_mistaken_flag_is_told_without_torch_and_at_once(command):
    code = (
        "import sys\n"
        "from rwkv_peft.commands import main\n"
        "try:\n"
        f"    main([{command.name!r}, '--no_such_flag'])\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, bool({'torch', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["UserError", "False"], done.stderr
