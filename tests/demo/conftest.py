"""The demo's scripts as modules."""

import pytest

from programs import load


@pytest.fixture(scope="session")
def task():
    return load("demo", "task")


@pytest.fixture(scope="session")
def thinking():
    return load("demo", "thinking")


@pytest.fixture(scope="session")
def evaluate():
    return load("demo", "evaluate")
