"""Fixtures that every test may use: the shared data folder, and a tiny RWKV-6 state dict."""

import gc
import os
import resource
import signal
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

import warm
from rwkv_peft.models.rwkv6.keys import RWKV6Config, shapes

LONG = ("training", "scripts", "tools", "hf")  # folders whose tests run whole commands


def pytest_addoption(parser):
    parser.addoption("--accelerator", choices=("cpu", "gpu"), default="cpu", help="where the tests of train.py train")


def pytest_configure(config):
    """Restore Ctrl-C: a process that a script starts in the background ignores it, and so would the tests' children.
    All workers of a session share the process that warm.py forks, and are forks of it themselves."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):
        warm.folder = config.workerinput["warm"]
        return
    config.warm = tempfile.TemporaryDirectory(prefix="warm")
    config.add_cleanup(config.warm.cleanup)
    warm.folder = config.warm.name
    if getattr(config.option, "tx", None) and config.option.accelerator == "cpu":
        config.option.tx = [f"{spec}//python={warm.worker()}" for spec in config.option.tx]
        with suppress(ImportError, AttributeError, TypeError, SyntaxError):  # another pytest; or of a test, told later
            rewrite_assertions(config)


def rewrite_assertions(config):
    """Fill pytest's cache of tests with assertions that tell of their values, while the shared process imports; in a
    fresh clone each worker would take seconds for it, all at once."""
    from _pytest.assertion import rewrite

    for pattern in ("conftest.py", "test_*.py"):
        for path in Path(__file__).parent.rglob(pattern):
            cache = rewrite.get_cache_dir(path)
            compiled = cache / (path.stem + rewrite.PYC_TAIL)
            if sys.dont_write_bytecode or not rewrite.try_makedirs(cache) or rewrite._read_pyc(path, compiled):
                continue
            source, code = rewrite._rewrite_test(path, config)
            rewrite._write_pyc(config.stash[rewrite.assertstate_key], code, source, compiled)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["warm"] = node.config.warm.name


def pytest_collection_modifyitems(config, items):
    """Have each worker begin with its share of the long tests, so that none waits at the end for another's long test.
    worksteal deals one part of the list to each, and moves tests from the ends of parts later."""
    here = Path(__file__).parent
    long = [item for item in items if item.path.relative_to(here).parts[0] in LONG]
    short = [item for item in items if item.path.relative_to(here).parts[0] not in LONG]
    items.clear()
    for workers in range(getattr(config, "workerinput", {}).get("workercount", 1), 0, -1):
        size, first = (len(long) + len(short)) // workers, len(long) // workers
        items += long[:first] + short[: size - first]
        del long[:first], short[: size - first]


def pytest_collection_finish():
    """Freeze the objects that exist now, because some code collects garbage often, and need not look through them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def as_if_no_command_had_run():
    """Restore what a command changes in its process, which is about to end, while this one goes on: Ctrl-C is heard, a
    terminal's end as before, and Python looks for modules beside a program (children.py). A fixture of a whole module
    may have run one, too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("PYTHONSAFEPATH", None)
    hangup = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, hangup)


@pytest.fixture(scope="session")
def accelerator(request):
    """The value for train.py's --accelerator: cpu, unless pytest's --accelerator says otherwise."""
    return request.config.getoption("--accelerator")


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data beside the repository; without it the test is skipped."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the shared data folder beside the repository")
    return folder


@pytest.fixture(scope="module")
def quiet_torch():
    """One thread, because the references' many small operations gain nothing from more, and crawl on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def warm_python(monkeypatch, accelerator):
    """A program that runs files as Python does, and begins at once; it stands in for Python in commands that start
    others."""
    python = sys.executable if accelerator == "gpu" else warm.python()  # what is forked must not have used a GPU
    monkeypatch.setattr(sys, "executable", python)
    return python


@pytest.fixture
def largest_file():
    """with largest_file(bytes): no file may become larger, not even pytest's own log."""

    @contextmanager
    def limited(size=None):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def ctrl_c_while_writing(monkeypatch):
    """Send a Ctrl-C as soon as a file is about to be flushed to the disk."""

    def interrupted(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)


@pytest.fixture(scope="session")
def tiny_state():
    """Factory of a random RWKV-6 state dict: a flat dict of tensors under official keys, in file order."""
    return make_tiny_state


TINY = dict(n_layer=2, n_embd=64, dim_ffn=96, head_size=16, vocab_size=80, maa_rank=8, decay_rank=12)


def make_tiny_state(dtype=torch.float32, seed=0, **sizes):
    """A state dict of TINY's sizes but those given, whose scales resemble a trained model's, so that its logits are
    neither flat nor huge."""
    sizes = TINY | sizes
    config = RWKV6Config(**({"dim_att": sizes["n_embd"]} | sizes))
    generator = torch.Generator().manual_seed(seed)

    def tensor(key, shape):
        random = torch.randn(shape, generator=generator)
        if key.endswith(("ln0.weight", "ln1.weight", "ln2.weight", "ln_x.weight", "ln_out.weight")):
            return 1 + 0.1 * random
        if key.endswith(".bias"):
            return 0.1 * random
        if "time_maa_" in key and shape[:2] == (1, 1):
            return torch.rand(shape, generator=generator)
        if key.endswith("time_decay"):
            return random - 3
        if key.endswith("time_faaaa"):
            return 0.5 * random
        return random / shape[-1] ** 0.5

    return {key: tensor(key, shape).to(dtype) for key, shape in shapes(config).items()}
