"""Environments: a class in trl's form gives tools, conversations and scores; what is wrong with one is told, and a tool
that raises, hangs, prints, forks or floods takes no other conversation with it."""

import json
import re
from pathlib import Path

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.tools import ToolCall
from rwkv_peft.environments import environments as environments_module
from rwkv_peft.environments.environments import Environments
from rwkv_peft.rewards.rewards import Rewards

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

    def fork(self, half: bool, wait: float) -> str:
        """Have two of one, or write half a message wherever there is a pipe."""
        if not half:
            os.fork()
        for fd in range(3, 64) if half else ():
            try:
                os.write(fd, b"\\0\\0\\xff\\xff[")
            except OSError:
                pass
        time.sleep(wait)
        return "forked"

    def echo(self, text: str) -> str:
        """Say it again."""
        return text

    def flood(self, tags: list[str], count: int | None = None) -> str:
        """Say much."""
        return "x" * 10_000_000

    def get_reward(self):
        return float(len(self.looked))

    def _private(self):
        pass
'''


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    path = tmp_path_factory.mktemp("shop") / "shop.py"
    path.write_text(SHOP)
    return f"{path}:Shop"


@pytest.fixture(scope="module")
def shops(shop):
    with Environments.open([shop], timeout=3) as environments:
        yield environments


def test_tools_are_public_methods_by_their_types_and_docstrings(shop):
    with Environments.open([shop]) as environments:
        ((name, environment),) = environments.known.items()
    assert name == "" and environment.scores and environment.required == ["goods"]
    tools = {tool["name"]: tool for tool in environment.tools}
    assert sorted(tools) == ["echo", "flood", "fork", "later", "leave", "price"]
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


@pytest.mark.parametrize("forks", [True, False])
def test_conversations_are_apart_and_their_processes_serve_again(shop, monkeypatch, forks):
    """Also in processes that begin anew, as on Windows; one that ends takes no other conversation with it there."""
    monkeypatch.setattr(environments_module, "can_fork", lambda: forks)
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
        assert all((place.child is None) == forks for place in places)
        places, _ = environments.begin(rows)
        ended, answered = environments.call(places, [ToolCall("leave", {"child": False}), calls[0]])
        assert ended.startswith("error: its process ended") and answered == "5"


@pytest.mark.parametrize(
    "call, words, lost",
    [
        (ToolCall("price", {"name": "coffee"}), "error: KeyError: 'coffee'", False),
        (ToolCall("price", {}), "error: TypeError: ", False),
        (
            ToolCall("steal", {}),
            "error: there is no tool steal; there is echo, flood, fork, later, leave, price",
            False,
        ),
        (ToolCall("_private", {}), "error: there is no tool _private", False),
        (ToolCall("flood", {"tags": []}), "xxx", False),
        (ToolCall("leave", {"child": True}), "left", False),
        (ToolCall("leave", {"child": False}), "error: its process ended, and its conversation is lost", True),
        (ToolCall("later", {"seconds": 600}), "error: it takes longer than 3 seconds", True),
        (ToolCall("fork", {"half": False, "wait": 0}), "forked", False),
        (ToolCall("fork", {"half": True, "wait": 0}), "error: what its process sent is no reply", True),
        (ToolCall("fork", {"half": True, "wait": 600}), "error: it takes longer than 3 seconds", True),
        (ToolCall("echo", {"text": "a\ud83db\ude00 \U0001f600"}), "a\ufffdb\ufffd \U0001f600", False),
        (ToolCall("\ud83d", {}), "error: there is no tool \ufffd; there is echo", False),
        (ToolCall("price", {"name": "\ud83d"}), "error: KeyError: '\\ud83d'", False),
    ],
)
def test_a_fault_is_one_conversations(shops, call, words, lost):
    places, _ = shops.begin([{"goods": {"tea": 1}}] * 2)
    results = shops.call(places, [call, ToolCall("price", {"name": "tea"})])
    assert results[0].startswith(words) and len(results[0]) <= 20_001 and results[1] == "1"
    assert shops.scores(places)[1] == 1.0 and (shops.scores(places)[0] is None) == lost
    again = shops.call(places[:1], [ToolCall("later", {"seconds": 0})])
    assert ("lost" in again[0] or "longer" in again[0]) == lost and (lost or again == ["now"])
    shops.release(places)
    assert len(shops.begin([{"goods": {}}] * 2)[0]) == 2


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


RESETS = [
    ("raise ValueError(7)", r"it raised ValueError: 7 \(.*env.py, line 3\)"),
    ("return 3", "reset returned int; return a text"),
    ("exit(3)", "it raised SystemExit: 3"),
    ("import os; os._exit(3)", "its process ended"),
    ("import time; time.sleep(600)", "it takes longer than 2 seconds"),
    ("return '\\ud83d'", None),
    ("pass", None),
]


def test_a_reset_that_fails_is_one_conversations(tmp_path):
    lines = [f"if row['a'] == {place}: {reset}" for place, (reset, _) in enumerate(RESETS)]
    act = "\n        ".join(lines) + "\n    def get_reward(self): return float('nan')"
    (tmp_path / "env.py").write_text(ENVIRONMENT.format(reset=act, kind=": int", doc='"Do."'))
    with Environments.open([f"{tmp_path}/env.py:Env"], timeout=2) as environments:
        places, texts = environments.begin([{"a": place} for place in range(len(RESETS))])
        for text, (_, words) in zip(texts, RESETS):
            assert text in ("\ufffd", "") if words is None else re.match(words, text.message)
        assert "it returned nan; return a finite number" in environments.scores(places)[-1].message


def test_rows_name_one_of_several_environments_and_hold_what_it_takes(shop, tmp_path):
    (tmp_path / "env.py").write_text(ENVIRONMENT.format(reset="pass", kind=": int", doc='"Do."'))
    with Environments.open([f"shop={shop}", f"other={tmp_path}/env.py:Env"]) as environments:
        row = {"environment": "shop", "goods": {}}
        assert environments.of_row(row) == "shop" and environments.begin([row])[1] == [""]
        with pytest.raises(UserError, match="its environment is None, and there is shop, other"):
            environments.of_row({"goods": {}})
        with pytest.raises(UserError, match="reset of its environment takes goods, and the row has the fields environ"):
            environments.of_row({"environment": "shop"})


def test_the_guides_shop_rewards_the_right_answer_alone(tmp_path):
    guide = (Path(__file__).parents[2] / "docs/guides/rewards.md").read_text(encoding="utf-8")
    file = tmp_path / "shop.py"
    file.write_text(next(block for block in re.findall(r"```python\n(.*?)```", guide, re.S) if "class Shop" in block))
    row = json.loads(re.search(r'`(\{"prompt": .*?\}\})`', guide)[1])
    with Environments.open([f"{file}:Shop"]) as environments, Rewards.open([f"{file}:right"]) as rewards:
        places, _ = environments.begin([row] * 3)
        assert environments.call(places[:1], [ToolCall("price", {"name": row["asked"]})]) == ["2.5"]
        answers = ["It is 2.5 euros.", "2.5? No, 3", "I cannot say."]
        judged = rewards.score([row["prompt"]] * 3, answers, [row] * 3, environments.states(places))
    assert judged.total == [1.0, 0.0, 0.0]
