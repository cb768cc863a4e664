"""Whatever is wrong with a file, a command ends in one message about it, without a traceback and without running code.

The seed is fixed, so that a failure repeats; a case's name tells the file, the mutation and its number.
"""

import random
import resource
import warnings
from pathlib import Path

import pytest

from fuzz.mutations import BYTES
from fuzz.specimens import SPECIMENS, write_all
from rwkv_peft.cli.errors import UserError

SEED = 6
SWAPPED = 10  # every so many mutants are whole files of another kind
MEMORY = 4 << 30  # bytes beyond those of a process that has read whole files
LONGEST = 2000  # characters of a message that a person reads


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_state):
    """A folder with every file of SPECIMENS, whole."""
    folder = tmp_path_factory.mktemp("files")
    write_all(
        folder, tiny_state(n_layer=1, n_embd=16, dim_ffn=16, head_size=8, vocab_size=257, maa_rank=2, decay_rank=2)
    )
    return folder


@pytest.fixture
def bounded():
    """Let a file that claims gigabytes fail here, and spare the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def broken(specimen, number, others):
    """(description, content) of the number-th mutant of a specimen; others are contents of other files."""
    content, rng = others[specimen.file], random.Random(f"{SEED} {specimen.file} {number}")
    if number % SWAPPED == 0:
        name = rng.choice(sorted(others))
        return f"the content of {name}", others[name]
    mutations = (*BYTES, *specimen.mutations, *specimen.mutations)
    mutation = mutations[number % len(mutations)]
    return mutation.__qualname__, mutation(content, rng)


@pytest.mark.parametrize(
    "specimen", SPECIMENS, ids=lambda specimen: f"{specimen.file}-{specimen.use.__qualname__.split('.')[0]}"
)
@pytest.mark.filterwarnings("ignore")  # of torch, on the tensors that a mutation makes
def test_a_broken_file_ends_in_a_message(folder, bounded, specimen):
    if not (folder / specimen.file).exists():
        pytest.skip(f"nothing here writes {specimen.file}")
    others = {other.file: (folder / other.file).read_bytes() for other in SPECIMENS if (folder / other.file).exists()}
    specimen.use(folder)  # the whole file is read
    failures = []
    try:
        for number in range(specimen.count):
            what, content = broken(specimen, number, others)
            (folder / specimen.file).write_bytes(content)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    specimen.use(folder)
            except UserError as error:
                if len(str(error)) > LONGEST:
                    failures.append(f"{number}, {what}: a message of {len(str(error))} characters")
            except Exception as error:  # whatever it is, it is what must not come out
                failures.append(f"{number}, {what}: {type(error).__name__}: {str(error)[:200]}")
    finally:
        (folder / specimen.file).write_bytes(others[specimen.file])
    assert failures == []


def test_about_two_thousand_files_are_tried():
    assert 1600 <= sum(specimen.count for specimen in SPECIMENS) <= 2900
