"""The guide's quick start with trl names arguments that the installed trl has."""

import ast
import inspect
import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "hugging-face.md"


def test_the_quick_start_names_arguments_of_the_installed_trl():
    trl = pytest.importorskip("trl", minversion="1.0")
    block = next(text for text in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S) if "SFTTrainer(" in text)
    for call in (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)):
        if call.func.id in ("SFTConfig", "SFTTrainer"):
            known = inspect.signature(getattr(trl, call.func.id)).parameters
            assert {keyword.arg for keyword in call.keywords} <= set(known), call.func.id
