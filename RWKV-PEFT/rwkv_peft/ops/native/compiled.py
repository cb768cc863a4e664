"""Marks functions for torch.compile without importing it."""

from collections.abc import Callable
from typing import Any, TypeVar

Wrapped = TypeVar("Wrapped", bound=Callable[..., Any])


def constant_when_compiled(function: Wrapped) -> Wrapped:
    """torch.compiler.assume_constant_result: under torch.compile the function's result is a constant of the graph.

    That decorator imports torch's compiler, which takes as long as the rest of torch, to set the one attribute that is
    set here; tests/ops/test_compiled.py compares the two.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function
