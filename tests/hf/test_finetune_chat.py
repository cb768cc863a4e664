"""Chats as rows: the tokens that the command trains on, and its messages on rows that it cannot take."""

import json

import pyarrow
import pytest
from finetuning import losses, run
from pyarrow import parquet

from rwkv_peft.errors import UserError
from rwkv_peft.hf import finetune

STEPS = ("--bits", "fp32", "--max_steps", "2", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2")


def turns(*words, form=("role", "content"), names=("user", "assistant")):
    return [{form[0]: names[i % 2], form[1]: text} for i, text in enumerate(words)]


def write(path, column, *chats):
    path.write_text("".join(json.dumps({column: chat}) + "\n" for chat in chats), encoding="utf-8")
    return str(path)


def learned(tiny, tmp_path, monkeypatch, path, *flags):
    """The text that counts in the loss, row by row, of a run that stops before its first step."""
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    seen = []

    def train(trainer, **_):
        tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
        for batch in trainer.get_train_dataloader():
            for labels in batch["labels"]:
                seen.append(tokenizer.decode(labels[labels != -100]))
        raise UserError("seen")

    monkeypatch.setattr(SFTTrainer, "train", train)
    with pytest.raises(UserError, match="seen"):
        run(tiny, tmp_path / "out", "--data_path", path, *STEPS, *flags)
    return sorted(seen)


def test_one_question_is_learned_as_its_row_of_two_columns_is(tiny, tmp_path):
    rows = [json.loads(line) for line in (tiny / "data.jsonl").read_text().splitlines()]
    chats = [turns(row["query"], row["response"]) for row in rows]
    path = write(tmp_path / "chats.jsonl", "messages", *chats)
    assert run(tiny, tmp_path / "columns", *STEPS) == 0 == run(tiny, tmp_path / "turns", "--data_path", path, *STEPS)
    assert losses(tmp_path / "turns") == pytest.approx(losses(tmp_path / "columns"), rel=1e-6)


def test_every_answer_of_a_chat_counts_and_nothing_else(tiny, tmp_path, monkeypatch):
    chats = [turns("Hi", "Yo", "So?", "No"), turns("A", "B")]
    path = write(tmp_path / "chats.jsonl", "messages", *chats)
    assert learned(tiny, tmp_path, monkeypatch, path) == [" B</s>", " Yo</s> No</s>"]


def test_all_of_it_counts_where_that_is_asked(tiny, tmp_path, monkeypatch):
    path = write(tmp_path / "chats.jsonl", "messages", turns("A", "B"))
    text = "### USER: A\n### ASSISTANT: B</s>"
    assert learned(tiny, tmp_path, monkeypatch, path, "--completion_only_loss", "False") == [text]


def test_other_names_of_columns_roles_and_fields(tiny, tmp_path, monkeypatch):
    chat = turns("A", "B", form=("from", "value"), names=("human", "gpt"))
    chat[0]["train"] = False  # as of all that are not the model's
    assert learned(tiny, tmp_path, monkeypatch, write(tmp_path / "a.jsonl", "conversations", chat)) == [" B</s>"]
    chat = turns("A", "B", "C", form=("from", "value"), names=("observation", "gpt"))
    path = write(tmp_path / "c.jsonl", "conversations", chat)
    text = "### TOOL: A\n### ASSISTANT: B</s>\n### TOOL: C"
    assert learned(tiny, tmp_path, monkeypatch, path, "--completion_only_loss", "False") == [text]
    path = write(tmp_path / "b.jsonl", "talk", turns("A", "C"))
    assert learned(tiny, tmp_path, monkeypatch, path, "--dataset_field", "talk") == [" C</s>"]


def test_a_tokenizers_own_template_lays_turns_out(tiny, tmp_path, monkeypatch):
    template = "{% for m in messages %}<{{ m.content }}>{% generation %}!{% endgeneration %}{% endfor %}"
    loaded = finetune.load_tokenizer

    def with_template(*arguments):
        tokenizer = loaded(*arguments)
        tokenizer.chat_template = template
        return tokenizer

    monkeypatch.setattr(finetune, "load_tokenizer", with_template)
    path = write(tmp_path / "chats.jsonl", "messages", turns("A", "B"))
    assert learned(tiny, tmp_path, monkeypatch, path) == ["!!"]
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="row 1 of .* refused by the tokenizer's chat template: roles must alternate"):
        run(tiny, tmp_path / "again", "--data_path", path)


def test_tools_reach_the_template(tiny, tmp_path, monkeypatch):
    tokenizer = finetune.load_tokenizer(str(tiny / "model"), {})
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}"
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    monkeypatch.setattr(finetune, "load_tokenizer", lambda *_: tokenizer)
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": turns("A", "B"), "tools": tools} for tools in ('[{"name": "t"}]', None)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--completion_only_loss", "False"
    assert learned(tiny, tmp_path, monkeypatch, str(path), *flags) == ["AB", "tAB"]
    path.write_text(json.dumps({"messages": turns("A", "B"), "tools": "[{"}))
    with pytest.raises(UserError, match="row 1 of .* is refused by the tokenizer's chat template"):
        run(tiny, tmp_path / "again", "--data_path", str(path))


def test_a_system_text_beside_turns_or_a_question_stands_before_them(tiny, tmp_path, monkeypatch):
    chat = turns("A", "B")
    whole = ["### SYSTEM: Be.\n### USER: A\n### ASSISTANT: B</s>"] * 4
    rows = [
        {"messages": chat, "system": "Be."},
        {"messages": chat, "system": None, "system_prompt": "Be."},
        {"messages": [{"role": "system", "content": "Be."}, *chat], "system": "No."},
        {"messages": [{"role": "system", "content": "Be."}, *chat]},
    ]
    for name, made in (("chats", rows), ("rows", [{"query": "A", "response": "B", "system": "Be."}] * 4)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        assert learned(tiny, tmp_path, monkeypatch, str(path), "--completion_only_loss", "False") == whole


CALL = [{"type": "function", "function": {"name": "t", "arguments": {"x": 1}}}]
CALLED = {"role": "assistant", "content": None, "tool_calls": CALL}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": turns("A", "B"), "tools": [{"name": "t"}]}, "holds tools, which the .* template leaves out"),
        ({"messages": [*turns("A"), CALLED]}, "holds calls of tools, which the .* template leaves out"),
        (
            {"conversations": [*turns("A"), {"from": "function_call", "value": "t(1)"}, *turns("B", "C")]},
            "has a turn of function_call, .* write it as the tool_calls of an assistant's turn",
        ),
        ({"query": "A", "response": "B", "history": [["C", "D"]]}, "has a history, .* --dataset_field query response"),
        ({"messages": turns("A", "B"), "system": ["Be."]}, "has a list for its system text, and text is due"),
        ({"messages": [turn | {"weight": 0} for turn in turns("A", "B")]}, "a turn is not to count, and every answer"),
        ({"query": "A", "response": "B", "weight": 2}, "field 'weight' holds 2, and rows have no weights here"),
        ({"query": "A", "response": "B", "image": "x.png"}, "field 'image' is no text, and only text is read"),
    ],
)
def test_what_would_be_lost_of_a_row_is_refused(tiny, tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"row 1 of .*{message}"):
        run(tiny, tmp_path / "out", "--data_path", str(path), *STEPS)


@pytest.mark.parametrize("form, given", [("jsonl", None), ("parquet", 1)])
def test_a_chat_may_end_in_a_call_where_the_template_has_a_place_for_it(tiny, tmp_path, monkeypatch, form, given):
    """A null that was written is an argument, and one that fills the columns of a .parquet is none."""
    tokenizer = finetune.load_tokenizer(str(tiny / "model"), {})
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% for call in m.tool_calls or [] %}"
        "{{ call.function.name }}({{ call.function.arguments | join }}){% endfor %}{% endgeneration %}{% endfor %}"
    )
    monkeypatch.setattr(finetune, "load_tokenizer", lambda *_: tokenizer)
    calls = CALL, [{"function": {"name": "s", "arguments": {"y": given}}}]  # with none of the other's arguments
    chats = [[*turns("A"), {"role": "assistant", "tool_calls": call}] for call in calls]
    path = write(tmp_path / "a.jsonl", "messages", *chats)
    if form == "parquet":
        path = str(tmp_path / "a.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat} for chat in chats]), path)
    assert learned(tiny, tmp_path, monkeypatch, path, "--completion_only_loss", "False") == ["As(y)", "At(x)"]


def test_a_layout_that_the_tokenizer_gets_is_told_and_kept(tiny, tmp_path, capsys):
    from transformers import AutoTokenizer

    path = write(tmp_path / "chats.jsonl", "messages", *[turns("A", "B")] * 8)
    assert run(tiny, tmp_path / "out", "--data_path", path, *STEPS, "--merge_and_save") == 0
    assert "no chat template: turns are laid out as ### USER: … ### ASSISTANT: …" in capsys.readouterr().out
    kept = AutoTokenizer.from_pretrained(tmp_path / "out" / "bone_merged")
    asked = kept.apply_chat_template([{"role": "user", "content": "A"}], tokenize=False, add_generation_prompt=True)
    assert asked == "### USER: A\n### ASSISTANT:"


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": []}, "row 2 of .* has no turn of the assistant's to learn from"),
        ({"messages": turns("A")}, "row 2 of .* has no turn of the assistant's to learn from"),
        ({"messages": turns("A", "")}, "row 2 of .* has no turn of the assistant's to learn from"),
        ({"messages": None}, "row 2 of .* has a NoneType for its messages, and a list of turns is due"),
        ({"messages": [{"role": "user"}]}, "row 2 of .* has a turn whose content is NoneType, and text is due"),
        ({"messages": [{"content": "A"}]}, "row 2 of .* has a turn that is no object with role and content"),
    ],
)
def test_turns_that_cannot_be_learned_are_refused(tiny, tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ({"messages": turns("A", "B")}, row))))
    with pytest.raises(UserError, match=message):
        run(tiny, tmp_path / "out", "--data_path", str(path))


def test_text_where_turns_are_due_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="row 1 of .* has a str for its query, and a list of turns is due"):
        run(tiny, tmp_path / "out", "--dataset_field", "query")
