"""A model trained on chats stops after its answer: data, training and generation by the commands that a user types."""

import json

import pytest

from rwkv_peft.cli import commands

CHATS = (("2+2?", "2 and 2.", "4"), ("Sky?", "Look up.", "blue\n\nMostly."))
SIZES = ("--n_layer", "2", "--n_embd", "64", "--dim_ffn", "64", "--vocab_size", "257")
RATES = ("--lr_init", "5e-3", "--lr_final", "5e-4", "--warmup_steps", "5", "--beta2", "0.99")


@pytest.fixture(scope="module")
def model(files, train):
    """An RWKV-7 that knows two chats by heart: a greeting, an answer with thinking, a farewell."""
    turns = [("Hi", "Yo."), None, ("Bye", "Bye.")]
    rows = []
    for question, thinking, answer in CHATS:
        turns[1] = (question, f"<think>\n{thinking}\n</think>\n{answer}")
        words = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]
        rows.append(json.dumps({"messages": words}))
    (files / "chats.jsonl").write_text("\n".join(rows))
    argv = [str(files / "chats.jsonl"), "--output", str(files / "chats"), "--tokenizer", "bytes", "--think", "on"]
    assert commands.main(["preprocess", *argv, "--repeat", "8"]) == 0
    data = ("--data_file", str(files / "chats"), "--dataload", "pad", "--ctx_len", "128", "--micro_bsz", "4")
    steps = ("--epoch_steps", "4", "--epoch_count", "25", "--precision", "fp32")
    train("chats", "--load_model", "", "--generation", "7", "--peft", "none", *SIZES, *data, *RATES, *steps)
    return files / "chats" / "rwkv.pth"


def test_a_turn_ends_where_the_next_begins_and_the_last_with_the_document(model, capsys):
    asked = "User: Hi\n\nAssistant:"
    prompts = [asked, *(f"{asked} Yo.\n\nUser: {question}\n\nAssistant: <think" for question, _, _ in CHATS)]
    expected = [(" Yo.", "stop"), *((f">\n{thinking}\n</think>\n{answer}", "stop") for _, thinking, answer in CHATS)]
    question, thinking, answer = CHATS[0]
    prompts.append(f"{prompts[1]}>\n{thinking}\n</think>\n{answer}\n\nUser: Bye\n\nAssistant:")
    argv = ["generate", "--model", str(model), "--temperature", "0", "--prompt", *prompts]
    assert commands.main(argv) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["generated"], row["end"]) for row in rows] == [*expected, (" Bye.", "end")]
