"""Conversations with tools: their tokens are those of the same turns in training data, each read once."""

import json
import random
import shutil
import sys

import pytest
import torch

from families import DISTINCT, shaken
from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.data.chat import ChatLayout
from rwkv_peft.data.encoding import EncodeSettings, encoder
from rwkv_peft.data.tokenizer import BytesTokenizer, load_tokenizer
from rwkv_peft.data.tools import TOOL_FORMS
from rwkv_peft.environments.environments import Environments, Place
from rwkv_peft.inference.loading import Subject
from rwkv_peft.inference.settings import Sampling
from rwkv_peft.training import turns
from rwkv_peft.training.turns import TURN_CUT, Episode, TurnSettings, converse, hand_back, with_observation
from training.runs import ROOT, finish, start

ENVIRONMENT = """
class Shop:
    def reset(self, goods):
        self.goods = goods

    def price(self, name: str) -> int:
        "Look a price up."
        return self.goods[name]
"""
ANSWERED = {"role": "assistant", "content": "Yes."}
BAD = "<tool_call>\nprice tea\n</tool_call>"
END = "\0"


def call_in(form):
    """The call of a price, in a ToolForm."""
    return form.calls_text({"name": "price", "arguments": {"name": "tea"}})


def scripts(form):
    """The words of each conversation's answers, with what ends them."""
    tea, result, other = call_in(form), f"\n\n{form.speaker}:", "\n\nSystem:"
    bad = (f" {BAD}\n\nTool:", f" No.{END}")
    return (
        (f" {tea}{result}", f" 3{END}"),
        (f" {tea}\n{tea}{result}", f" {tea}{other}", f" 6{other}"),
        bad if form.speaker == "Tool" else (f" {BAD}{END}",),
        (f" It is 3.{END}",),
        (f" Well.\n{tea}{END}", f" 3{END}"),
        (f" {tea}{result}",) * 3,
    )


ENDS = ("end", "stop", "end", "end", "end", "turns")
SETTINGS = TurnSettings(Sampling(temperature=1.0, top_p=1.0, measured=True), 3, 200, 800, (), 4)


class Script:
    """A constraint that allows one text."""

    def __init__(self, text):
        self.tokens = BytesTokenizer().encode(text.removesuffix(END)) + [0] * text.endswith(END)

    def allowed(self):
        return torch.arange(257) == self.tokens[0]

    def accept(self, token):
        return token == self.tokens.pop(0)


@pytest.fixture
def held(tmp_path, monkeypatch):
    """held(family, settings) -> (the model, the conversations by scripts, the engine that read them)."""
    (tmp_path / "shop.py").write_text(ENVIRONMENT)
    made, engines, said = turns.completion_of, [], []

    def scripted(turn, sampling):
        completion = made(turn, sampling)
        completion.constraint = Script(said[turn.conversation.number][turn.conversation.answers])
        return completion

    class Engine(turns.Engine):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            engines.append(self)

    monkeypatch.setattr(turns, "completion_of", scripted)
    monkeypatch.setattr(turns, "Engine", Engine)

    def hold(family, settings=SETTINGS):
        model, said[:] = shaken(family, vocab_size=257).float().eval(), scripts(settings.chat.tool_form)
        prompt = BytesTokenizer().encode("".join(ChatLayout().question("What is tea?")))
        with Environments.open([f"{tmp_path}/shop.py:Shop"]) as environments:
            places, _ = environments.begin([{"goods": {"tea": 3}}] * len(said))
            conversations = [
                Episode(number, prompt, place, random.Random(number)) for number, place in enumerate(places)
            ]
            converse(Subject(model, None, BytesTokenizer()), environments, conversations, settings)
        return model, conversations, engines[-1]

    return hold


@pytest.mark.parametrize("form", TOOL_FORMS.values(), ids=TOOL_FORMS)
@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_a_conversation_is_its_turns_in_training_data_and_each_token_is_read_once(held, family, form):
    model, conversations, engine = held(family, SETTINGS._replace(chat=ChatLayout(tool_form=form)))
    assert tuple(each.end for each in conversations) == ENDS
    for each in conversations[:5]:
        text = BytesTokenizer().decode([*each.prompt, *each.tokens])
        messages = [{"role": "user", "content": "What is tea?"}, *each.turns]
        segments = ChatLayout(tool_form=form).chat(messages)
        assert text.removesuffix("\n\nSystem:") == "".join(words for words, _ in segments)
        counts = [counted for words, counted in segments for _ in words.encode()]
        due = counts[len(each.prompt) :]
        # if an answer ended otherwise than with a result's speaker, the opening of the results is not the model's
        own = each.sampled[: len(due)]
        assert own == due or each.number in (1, 4)
    second = BytesTokenizer().decode(conversations[1].tokens)
    assert second.count(f"{form.speaker}: {form.result}3") == 3 and second.count("System:") == 1
    if form.speaker == "Tool":
        assert "error: no call was found" in conversations[2].turns[1]["content"]
    tokens = [torch.tensor([[*each.prompt, *each.tokens]]) for each in conversations]
    for each, whole in zip(conversations, tokens):
        logits = model(whole[:, :-1])[0][0].log_softmax(-1)
        found = logits.gather(-1, whole[0, 1:, None])[len(each.prompt) - 1 :, 0]
        own = torch.tensor(each.sampled)
        assert own.sum() == len(each.logprobs) == len(each.entropies)
        torch.testing.assert_close(found[own], torch.tensor(each.logprobs), rtol=1e-4, atol=1e-4)
    prompt = len(conversations[0].prompt)
    handed = sum(
        each.sampled.count(False) + each.answers - 1 for each in conversations
    )  # and the last token of an answer
    left_out = len("\n\nSystem:") - 1 + len(f" Well.\n{call_in(form)}")  # and the call that the document's end followed
    assert prompt + handed <= engine.read <= prompt + handed + len(call_in(form)) + 2 + left_out


@pytest.mark.parametrize("most, turn", [(60, 200), (800, 20)])
def test_a_conversation_without_room_is_cut(held, most, turn):
    _, conversations, _ = held(DISTINCT[1], SETTINGS._replace(longest=most, turn_tokens=turn))
    assert max(len(each.tokens) for each in conversations) <= most
    end = "length" if most == 60 else TURN_CUT
    assert conversations[0].end == conversations[1].end == end and conversations[3].end == "end"


@pytest.mark.parametrize("think", ["", "on", "off"])
@pytest.mark.parametrize("name", ["bytes", "world"])
def test_results_and_the_next_opening_have_the_tokens_of_rows(name, think):
    tokenizer, chat = load_tokenizer(name), ChatLayout(think)
    call = {"name": "price", "arguments": {"name": "tea"}}
    turns = [{"role": "assistant", "content": "<think>.</think>", "tool_calls": [call]}]
    turns += [{"role": "tool", "content": words} for words in ("3\n\nUser: 4.", "5")]
    segments = chat.chat([*turns, {"role": "assistant", "content": "<think>.</think>Yes."}])
    opening, answer, *behind, _ = [tokenizer.encode(words) for words, _ in segments]
    place = Place("", None)
    for tokens in ([], [*behind[0], *behind[1]]):  # the model may have named the next speaker
        conversation = Episode(0, opening, place, None)
        conversation.add([*answer, *tokens], sampled=True)
        hand_back(conversation, ["3\n\nUser: 4.", "5"], tokenizer, SETTINGS._replace(chat=chat))
        assert conversation.tokens == sum([*behind], [*answer]) and sum(conversation.sampled) == len(answer + tokens)


@pytest.mark.parametrize(
    "row, fields, read",
    [
        ({"messages": [{"role": "User", "content": [{"type": "text", "text": "q"}]}, ANSWERED]}, (), "q OBS"),
        ({"conversations": [{"from": "human", "value": "q"}]}, (), "q OBS"),
        ({"conversation": [{"human": "q", "assistant": "Yes."}]}, (), "q OBS"),
        ({"query": 3}, (), "3 OBS"),
        ({"q": "q", "query": "other"}, ("q",), "q OBS"),
    ],
)
def test_each_conversation_of_a_row_gets_the_same_prompt(row, fields, read):
    encode = encoder(EncodeSettings("bytes", end_token=False, command="prompts", fields=fields))
    prompts = ["".join(words for words, _ in encode.documents(with_observation(row, " OBS", fields))[0]) for _ in "abc"]
    assert prompts == [f"User: {read}\n\nAssistant:"] * 3


RUN = """
class Shop:
    def reset(self, query, **row):
        self.called = 0
        return " Really?" if query == "0" else None

    def price(self, name: str) -> int:
        "Look a price up."
        self.called += 1
        return 3

    def get_reward(self):
        return float(self.called)


def called(completions, environments):
    return [1 - environment.called for environment in environments]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_state):
    folder = tmp_path_factory.mktemp("turns")
    save_model(folder / "base.pth", tiny_state(vocab_size=257))
    rows = [{"query": str(number), "other": number} for number in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "shop.py").write_text(RUN)
    return folder


def words_of(files, name, *more):
    words = ["--load_model", files / "base.pth", "--data_file", files / "rows.jsonl", "--data_type", "prompts"]
    words += ["--tokenizer", "bytes", "--ctx_len", 400, "--max_completion_length", 40, "--num_generations", 3]
    words += ["--precision", "fp32", "--accelerator", "cpu", "--bone_r", 16, "--lr_init", "1e-3", "--micro_bsz", 2]
    words += ["--answer_rows", 0, "--epoch_steps", 2, "--epoch_count", 1, "--proj_dir", files / name, *more]
    return list(map(str, words))


def trained(files, name, *more, code=0, program=ROOT / "train.py"):
    return finish(start([sys.executable, str(program), *words_of(files, name, *more)]), code)


@pytest.fixture(scope="module")
def without_fork(files):
    """train.py on a system whose processes do not fork, such as Windows."""
    program = files / "without_fork.py"
    train = f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    program.write_text(f"import os, runpy\n\ndel os.fork\n{train}\n")
    return program


@pytest.mark.parametrize("form", TOOL_FORMS)
def test_a_run_learns_from_conversations_and_goes_on_with_the_same_bits(files, form, without_fork):
    """Also where the judges and conversations are in processes that begin anew."""
    environment = ("--environment", f"{files}/shop.py:Shop", "--turn_tokens", "12", "--tool_form", form)
    reward = ("--reward", "match:.*a.*", f"{files}/shop.py:called")
    trained(files, f"{form}-whole", *environment, *reward)
    records = [json.loads(line) for line in (files / f"{form}-whole" / "answers.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 2 * 3
    for record in records:
        assert record["prompt"].startswith(f"System: {TOOL_FORMS[form].listing[0]}") and "price" in record["prompt"]
        really = record["row"] == 0
        assert record["prompt"].endswith(f"User: {record['row']}{' Really?' * really}\n\nAssistant:")
        assert set(record["rewards"]) == {"match", "called", "environment"}
        assert record["rewards"]["called"] == 1 - record["rewards"]["environment"]
        assert record["reward"] == sum(record["rewards"].values())
        assert record["turns"][-1]["content"] == record["completion"] and record["length"] <= 12
    line = json.loads((files / f"{form}-whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["gap"] < 1e-4 and {"reward/match", "reward/environment"} <= line.keys()
    trained(files, f"{form}-parts", *environment, *reward, "--save_every", "1", program=without_fork)
    shutil.rmtree(max(files.glob(f"{form}-parts/checkpoints/step-*")))
    trained(files, f"{form}-parts", *environment, *reward, "--save_every", "1", "--resume")
    first, again = ((files / name / "adapter.safetensors").read_bytes() for name in (f"{form}-whole", f"{form}-parts"))
    assert first == again


def test_a_conversation_that_fails_is_dropped_and_told_with_its_row(files):
    """The others of its group, and groups without any, are learned from; --sft_think opens each of their answers."""
    shop = RUN.replace("self.called = 0", "self.called = 0 if query != '1' else 1 / 0").replace(
        "return float(self.called)", "return float(self.called) if random.random() < 0.7 else float('nan')"
    )
    shop = shop.replace('" Really?" if query == "0"', '" Really?" * 40 if query == "0"')  # which leaves no room
    (files / "faulty.py").write_text(f"import random\n{shop}")
    environment = ("--environment", f"{files}/faulty.py:Shop", "--turn_tokens", "12", "--sft_think", "on")
    out, _ = trained(files, "faulty", *environment, "--micro_bsz", "8", "--epoch_steps", "1", "--reward", "match:.*a.*")
    lines = [json.loads(line) for line in (files / "faulty" / "answers.jsonl").read_text().splitlines()]
    faults = [line for line in lines if "fault" in line]
    assert len(lines) == 8 * 3 > len(faults) >= 6 and len({line["row"] for line in lines}) == 8
    assert sum("reset: it raised ZeroDivisionError" in line["fault"] for line in faults) == 3
    assert sum("raise the first, or lower the second" in line["fault"] for line in faults if line["row"] == 0) == 3
    assert all("nan; return a finite number" in line["fault"] for line in faults if line["row"] > 1)
    assert f"of {len(faults)}, was dropped" in out and "'query': " in out and "cut at --turn_tokens; raise" in out
    assert all(line["prompt"].endswith("Assistant: <think") for line in lines if "fault" not in line)
    assert (files / "faulty" / "adapter.safetensors").exists()


@pytest.mark.parametrize(
    "change, more, words",
    [
        (
            ("        return float(self.called)", "        return 'much'"),
            (),
            "get_reward: it returned 'much', no number",
        ),
        (("def get_reward", "def _get_reward"), (), "its class has no get_reward, and there is no --reward"),
        (("query, **row", "query, price, **row"), (), "row 1: reset of its environment takes price, and the row has"),
        (("name: str", "name"), (), "the parameter name of the tool price has no type"),
        (
            ('return " Really?" if query == "0" else None', 'return " Really?" * 40'),
            (),
            "raise the first, or lower the second",
        ),
        (("", ""), ("--max_turns", "0"), "--max_turns: 0 is below 1"),
    ],
)
def test_what_no_conversation_can_begin_with_is_told(files, change, more, words, tmp_path):
    (tmp_path / "shop.py").write_text(RUN.replace(*change))
    _, error = trained(files, tmp_path.name, "--environment", f"{tmp_path}/shop.py:Shop", *more, code=2)
    assert words in error and error.count("\n") <= 2, error
