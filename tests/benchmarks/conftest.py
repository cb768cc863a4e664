"""The programs of benchmarks/ as modules."""

from functools import partial

import pytest

from programs import load


@pytest.fixture(scope="session")
def benchmark():
    """(name of a program) -> its module."""
    return partial(load, "benchmarks")
