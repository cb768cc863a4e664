"""Environments: a class in trl's form gives tools, conversations and scores; what is wrong with one is told, and a tool
that raises, hangs, prints, forks or floods takes no other conversation with it."""

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.tools import ToolCall
from rwkv_peft.environments.environments import Environments

SHOP = '''
import os, subprocess, sys, time
from typing import Literal


class Shop:
    def __init__(self):
        self.made = 0

    def reset(self, goods, **row):
        self.made += 1
        self.goods, self.looked = goods, []
        return f"(visit {self.made})" if "visit" in row else None

    def price(self, name: str, currency: Literal["EUR", "USD"] = "EUR") -> int:
        """Look a price up.

        Args:
            name: The name of the good,
                as it stands in the list.
            currency (str): The currency.

        Returns:
            The price.
        """
        print("looked", file=sys.stderr)
        self.looked.append(name)
        return self.goods[name]

    async def later(self, seconds: float) -> str:
        """Wait."""
        time.sleep(seconds)
        return "now"

    def leave(self, child: bool) -> str:
        """End the process, or leave one behind."""
        if not child:
            os._exit(3)
        subprocess.Popen(["sleep", "100"])
        return "left"

    def flood(self, tags: list[str], count: int | None = None) -> str:
        """Say much."""
        return "x" * 10_000_000

    def get_reward(self):
        return float(len(self.looked))

    def _private(self):
        pass
'''


@pytest.fixture
def shop(tmp_path):
    (tmp_path / "shop.py").write_text(SHOP)
    return f"{tmp_path}/shop.py:Shop"


def test_tools_are_public_methods_by_their_types_and_docstrings(shop):
    with Environments.open([shop]) as environments:
        ((name, environment),) = environments.known.items()
    assert name == "" and environment.scores and environment.required == ["goods"]
    tools = {tool["name"]: tool for tool in environment.tools}
    assert sorted(tools) == ["flood", "later", "leave", "price"]
    assert tools["price"] == {
        "name": "price",
        "description": "Look a price up.",
        "parameters": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "description": "The name of the good, as it stands in the list."},
                "currency": {"enum": ["EUR", "USD"], "description": "The currency."},
            },
            "required": ["name"],
        },
    }
    properties = tools["flood"]["parameters"]["properties"]
    assert properties == {"tags": {"type": "array", "items": {"type": "string"}}, "count": {"type": "integer"}}


def test_conversations_are_apart_and_their_processes_serve_again(shop):
    rows = [{"goods": {"tea": 3}}, {"goods": {"tea": 5}, "visit": True}]
    with Environments.open([shop]) as environments:
        places, texts = environments.begin(rows)
        assert texts == ["", "(visit 1)"]
        calls = [ToolCall("price", {"name": "tea"}), ToolCall("price", {"name": "tea"})]
        assert environments.call(places, calls) == ["3", "5"]
        assert environments.call(places[:1], [ToolCall("later", {"seconds": 0})]) == ["now"]
        assert environments.scores(places) == [1.0, 1.0]
        environments.release(places)
        again, texts = environments.begin([rows[1]])
        assert texts == ["(visit 2)"] and again[0] in places and environments.scores(again) == [0.0]


@pytest.mark.parametrize(
    "call, words, lost",
    [
        (ToolCall("price", {"name": "coffee"}), "error: KeyError: 'coffee'", False),
        (ToolCall("price", {}), "error: TypeError: ", False),
        (ToolCall("steal", {}), "error: there is no tool steal; there is flood, later, leave, price", False),
        (ToolCall("_private", {}), "error: there is no tool _private", False),
        (ToolCall("flood", {"tags": []}), "xxx", False),
        (ToolCall("leave", {"child": True}), "left", False),
        (ToolCall("leave", {"child": False}), "error: its process ended, and its conversation is lost", True),
        (ToolCall("later", {"seconds": 600}), "error: it takes longer than 3 seconds", True),
    ],
)
def test_a_fault_is_one_conversations(shop, call, words, lost):
    with Environments.open([shop], timeout=3) as environments:
        places, _ = environments.begin([{"goods": {"tea": 1}}] * 2)
        results = environments.call(places, [call, ToolCall("price", {"name": "tea"})])
        assert results[0].startswith(words) and len(results[0]) <= 20_001 and results[1] == "1"
        assert environments.scores(places)[1] == 1.0 and (environments.scores(places)[0] is None) == lost
        again = environments.call(places[:1], [ToolCall("later", {"seconds": 0})])
        assert ("lost" in again[0] or "longer" in again[0]) == lost
        environments.release(places)
        assert len(environments.begin([{"goods": {}}] * 2)[0]) == 2


ENVIRONMENT = """class Env:
    def reset(self, **row):
        {reset}
    def tool(self, a{kind}):
        {doc}
        return 1
"""
MISTAKES = [
    ("class Env: pass", "Env has no method reset(**row)"),
    ("class Env:\n    def reset(self): pass", "has no public method besides reset, and so no tool"),
    (ENVIRONMENT.format(reset="pass", kind="", doc='"Do."'), "the parameter a of the tool tool has no type"),
    (ENVIRONMENT.format(reset="pass", kind=": int", doc="pass"), "the tool tool has no docstring"),
    (ENVIRONMENT.format(reset="pass", kind=": object", doc='"Do."'), "which JSON does not have"),
    (ENVIRONMENT.format(reset="pass", kind=": 'Missing'", doc='"Do."'), "the types of the tool tool are not known"),
    ("Env = 3", "has no class Env"),
    ("import nosuchmodule", "the file cannot be loaded: ModuleNotFoundError"),
    ("import os; os._exit(0)", "its file ends the process that loads it"),
    ("while True: pass", "loading takes longer than"),
]


@pytest.mark.parametrize("text, words", MISTAKES)
def test_an_environment_that_cannot_serve_is_refused_before_work(tmp_path, text, words, monkeypatch):
    (tmp_path / "env.py").write_text(text)
    monkeypatch.setattr("rwkv_peft.environments.environments.LOADING", 8)
    told = pytest.raises(UserError, match="--environment .*env.py:Env: ")
    with told as refusal, Environments.open([f"{tmp_path}/env.py:Env"]):
        pass
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("Env", "is FILE.py:CLASS or module:CLASS"),
        ("absent.py:Env", "no such file"),
        ("nosuch:Env", "cannot be imported"),
    ],
)
def test_a_word_that_names_no_environment_is_refused(spec, words):
    with pytest.raises(UserError, match=words), Environments.open([spec]):
        pass


@pytest.mark.parametrize(
    "reset, words",
    [
        ("raise ValueError(row['a'])", "it raised ValueError: 7 (.*env.py, line 3); mend the class"),
        ("return 3", "reset returned int; return a text"),
    ],
)
def test_a_reset_that_fails_is_told_with_its_row(tmp_path, reset, words):
    (tmp_path / "env.py").write_text(ENVIRONMENT.format(reset=reset, kind=": int", doc='"Do."'))
    words = r"reset\(\{'a': 7\}\): " + words.replace("(", r"\(").replace(")", r"\)")
    with Environments.open([f"{tmp_path}/env.py:Env"]) as environments, pytest.raises(UserError, match=words):
        environments.begin([{"a": 7}])


def test_rows_name_one_of_several_environments_and_hold_what_it_takes(shop, tmp_path):
    (tmp_path / "env.py").write_text(ENVIRONMENT.format(reset="pass", kind=": int", doc='"Do."'))
    with Environments.open([f"shop={shop}", f"other={tmp_path}/env.py:Env"]) as environments:
        row = {"environment": "shop", "goods": {}}
        assert environments.of_row(row) == "shop" and environments.begin([row])[1] == [""]
        with pytest.raises(UserError, match="its environment is None, and there is shop, other"):
            environments.of_row({"goods": {}})
        with pytest.raises(UserError, match="reset of its environment takes goods, and the row has the fields environ"):
            environments.of_row({"environment": "shop"})
