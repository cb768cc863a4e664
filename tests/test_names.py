"""The tables by which flags are judged hold what they say; judging needs neither torch nor numpy."""

import subprocess
import sys

from rwkv_peft.adapters.methods import METHODS, word_of
from rwkv_peft.cli.commands import COMMANDS
from rwkv_peft.cli.tables import GENERATIONS, SAMPLINGS, TASKS
from rwkv_peft.data.samples import Samples
from rwkv_peft.evals.rows import Choices, Exact
from rwkv_peft.models import FAMILIES


def test_a_methods_settings_are_told_by_its_word():
    for name, method in METHODS.items():
        word = word_of(method)
        assert method.name == name and all(word.takes(field) for field in method.tensors.size)
        assert word.takes("alpha") == (method.alpha is not None)
        assert all(word.takes(field) for _, field in method.rates)


def test_things_are_what_their_tables_call_them():
    assert [family.version for family in FAMILIES] == list(GENERATIONS)
    assert all(issubclass(sampling, Samples) for sampling in SAMPLINGS.values())
    assert list(TASKS.values()) == [Exact, Choices]


def test_a_mistaken_flag_is_told_without_torch_and_at_once():
    names = [command.name for command in COMMANDS if command.flags]
    code = (
        "import sys\n"
        "from rwkv_peft.cli.commands import main\n"
        f"for name in {names}:\n"
        "    try:\n"
        "        main([name, '--no_such_flag'])\n"
        "    except Exception as error:\n"
        "        print(name, type(error).__name__, bool({'torch', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name} UserError False" for name in names], done.stderr
