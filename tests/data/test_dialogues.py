"""Turns that are written out in a text or a question become a chat by --turns_in_text, which a note offers."""

import pytest

from data.documents import texts
from rwkv_peft.data.sources import build_samples
from rwkv_peft.data.tokenizer import load_tokenizer

TURNS = "User: Q\n\nAssistant: A\n\nUser: R\n\nAssistant: B"
COUNTED = " A\n\nUser: B"
LLAMA_3 = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
SAID = (("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B"))
ROWS = {
    "BELLE": {"instruction": "Human: Q\nAssistant: A\nHuman: R\nAssistant:", "input": "", "output": "B"},
    "guanaco": {"text": "### Human: Q### Assistant: A### Human: R### Assistant: B"},
    "ChatML": {"text": "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in SAID)},
    "Llama 2": {"text": "<s>[INST] Q [/INST] A </s><s>[INST] R [/INST] B </s>"},
    "Llama 3": {"text": "<|begin_of_text|>" + "".join(LLAMA_3.format(*said) for said in SAID)},
    "Gemma": {
        "text": "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
        "<start_of_turn>user\nR<end_of_turn>\n<start_of_turn>model\nB<end_of_turn>\n"
    },
    "names": {"text": "User: Q\nAssistant: A\nUser: R\nAssistant: B"},
    "Anthropic": {"prompt": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant:", "completion": " B"},
    "问答": {"question": "用户：Q\n助手：A\n用户：R\n助手：", "answer": "B"},
}


@pytest.mark.parametrize("name", ROWS)
def test_turns_in_a_text_are_offered_and_become_a_chat(preprocess, capsys, name):
    row = ROWS[name]
    assert texts(preprocess([row]))[0][0] != TURNS
    assert "1 row in which a text or a question holds turns" in capsys.readouterr().out
    assert texts(preprocess([row], "--turns_in_text", "auto")) == [(TURNS, COUNTED)]
    assert "holds turns" not in capsys.readouterr().out
    assert texts(preprocess([row], "--turns_in_text", "auto", "--fields", *[key for key in row if key != "input"])) == [
        (TURNS, COUNTED)
    ]


def test_a_text_file_that_is_a_chat_is_one_too(preprocess, capsys):
    written = "User: Q\nAssistant: A\n\nUser: R\nAssistant: B\n"
    assert texts(preprocess(written, name="chat.txt")) == [(written, written)]
    assert "holds turns" in capsys.readouterr().out
    assert texts(preprocess(written, "--turns_in_text", "auto", name="chat.txt")) == [(TURNS, COUNTED)]
    assert "holds turns" not in capsys.readouterr().out


def test_a_system_text_and_an_input_stay(preprocess):
    llama = {"text": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s>"}
    alpaca = {"text": "S\n\n### Instruction:\nQ\n\n### Input:\nI\n\n### Response:\nA"}
    belle = {"instruction": "Human: Q\nAssistant:", "input": "I", "output": "A", "system": "S"}
    found = texts(preprocess([llama, alpaca, belle], "--turns_in_text", "auto"))
    assert [text for text, _ in found] == [f"System: S\n\nUser: Q{more}\n\nAssistant: A" for more in ("", "\nI", "\nI")]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "A story. User: no.\n\nAssistant: no."},
        {"text": "Assistant: A\n\nAssistant: B"},
        {"query": "Human: Q\nAssistant: A", "response": "B"},
        {"text": "<|im_start|>robot\nQ<|im_end|><|im_start|>assistant\nA"},
        {"text": "The answer: 4.\nA response"},
    ],
)
def test_other_texts_stay_as_they_are(preprocess, row):
    assert texts(preprocess([row], "--turns_in_text", "auto")) == texts(preprocess([row]))


def test_pairs_and_prompts_of_written_turns_are_chats(answers, tmp_path):
    prompt = "\n\nHuman: Q\n\nAssistant:"
    pair = {"prompt": prompt, "chosen": "A", "rejected": "B"}
    for data_type, row in (("pairs", pair), ("prompts", {"prompt": prompt}), ("sft", pair | {"completion": "A"})):
        row = {name: value for name, value in row.items() if data_type != "sft" or name in ("prompt", "completion")}
        samples = build_samples(answers(data_type)([row, row], turns_in_text="auto", ctx_len=512), 257)
        assert load_tokenizer("bytes").decode(samples.dataset[0].tolist()).startswith("User: Q\n\nAssistant:")
