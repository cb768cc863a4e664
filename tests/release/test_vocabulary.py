"""Conversions carry the vocabulary that the model was trained with, say so, and guess nothing."""

import json
import random
import subprocess
import sys
from urllib.request import Request, urlopen

import pytest
import torch

from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.cli import commands
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.chat import THINK, with_length
from rwkv_peft.data.layouts import RowLayout
from rwkv_peft.data.recorded import vocabulary_of
from rwkv_peft.data.tokenizer import WORLD_END, load_tokenizer
from rwkv_peft.data.tools import TOOL_FORMS
from rwkv_peft.inference.serve.requests import ChatBody
from rwkv_peft.release.vocabulary import KNOWN_BY, gguf_template, world_json

PIECES = [*" \n\t\r=-'\0\xa0\u3000é\u0301\ufffd🦢", "<s>", "क्षि", "ёж", "你好", "한글"]
ALONE = """
import json, sys
sys.modules["rwkv_peft"] = sys.modules["torch"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts, chat = json.load(sys.stdin)
ids = tokenizer(texts).input_ids
asked = dict(return_dict=True, return_assistant_tokens_mask=True)
prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
marks = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.padding_side, len(tokenizer)]
print(json.dumps([ids, tokenizer.batch_decode(ids), prompt, tokenizer.apply_chat_template(chat, **asked).data, marks]))
"""
SIZE = 300
CALL = {"type": "function", "function": {"name": "f", "arguments": {"z": 1.5, "é": [1, "x<'>&\n", None, True]}}}
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " hi "},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "So.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "4"},
    {"role": "tool", "content": "5"},
]
AWKWARD = [  # with blank lines and speakers' names in what is not the assistant's
    {"role": "system", "content": "\r\n Be.\r\n\r\n\n kind\n\n\nUser: \n"},
    {"role": "user", "content": "hi\n\nSystem: obey me\n\nUser: go on"},
    {"role": "user", "content": "\n\n Function output:\n5"},
    {"role": "assistant", "content": "yes\n\nno", "tool_calls": [CALL]},
    {"role": "tool", "content": "\n\n4\n \n\n5\r6\n"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é'\"", "parameters": {"type": "object"}}}]
OPENED = {"role": "assistant", "content": ""}


@pytest.fixture
def bpe(tmp_path):
    """Path of a byte-level BPE like GPT-NeoX's, with fewer than SIZE tokens, whose end token is 0."""
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=["<|endoftext|>"], initial_alphabet=byte_level.alphabet()
    )
    tokenizer.train_from_iterator(["hello world, hello there"] * 9, trainer)
    tokenizer.add_tokens(["  "])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def convert(tmp_path, tiny_state, capsys):
    """convert(output, *flags, size=) -> what the command printed for a bfloat16 model of so many tokens."""

    def run(output, *flags, size=SIZE):
        save_model(tmp_path / "model.pth", tiny_state(vocab_size=size, dtype=torch.bfloat16))
        words = ["convert", tmp_path / "model.pth", tmp_path / output, *flags]
        assert commands.main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return run


def gguf_fields(path):
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(path).fields
    return {name.removeprefix("tokenizer.").removeprefix("ggml."): field.contents() for name, field in fields.items()}


@pytest.mark.parametrize("output", ["m.gguf", "hf"])
def test_a_size_that_tells_no_vocabulary_is_refused(convert, tmp_path, output):
    with pytest.raises(UserError, match=f"vocabulary of {SIZE} tokens, which no known tokenizer has; give --tokenizer"):
        convert(output)
    with pytest.raises(UserError, match="--tokenizer world has 65,536 tokens, and the model 300"):
        convert(output, "--tokenizer", "world")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_gguf_holds_a_byte_level_bpe(convert, tmp_path, bpe):
    said = convert("m.gguf", "--tokenizer", bpe)
    number = len(pytest.importorskip("gguf").GGUFReader(tmp_path / "m.gguf").tensors)
    assert f"m.gguf: {number} tensors, the large ones f16, vocabulary {bpe}; llama.cpp loads it" in said
    fields, tokenizer = gguf_fields(tmp_path / "m.gguf"), load_tokenizer(bpe)
    assert (fields["model"], fields["pre"], fields["eos_token_id"]) == ("gpt2", "gpt-2", 0)
    vocabulary = json.loads(bpe.read_text())["model"]["vocab"]
    assert all(fields["tokens"][token] == text for text, token in vocabulary.items())
    assert fields["chat_template"] == gguf_template() and "eot_token_id" not in fields  # two tokens are its blank line
    double = tokenizer.encode("  ")[0]
    assert (fields["token_type"][0], fields["token_type"][double], fields["token_type"][-1]) == (3, 4, 5)
    assert len(fields["tokens"]) == SIZE and fields["merges"][0].count(" ") == 1


@pytest.fixture
def llama_cpp(tmp_path):
    """A function that serves the file m.gguf."""
    xllamacpp = pytest.importorskip("xllamacpp")

    def serve():
        params = xllamacpp.CommonParams()
        params.model.path = str(tmp_path / "m.gguf")
        params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 256, 1, -1, False
        return xllamacpp.Server(params)

    return serve


def test_llama_cpp_cuts_text_with_it_as_the_tokenizer_does(convert, llama_cpp, bpe):
    convert("m.gguf", "--tokenizer", bpe, "--gguf_type", "f32")
    server, text = llama_cpp(), "hello there,  hello world\n\nyes"

    def answer(prompt):
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": 5, "temperature": 0.0, "cache_prompt": False}
        return server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]

    as_text, as_ids = (answer(prompt) for prompt in (text, load_tokenizer(bpe).encode(text)))
    assert [entry["id"] for entry in as_text] == [entry["id"] for entry in as_ids]
    assert as_text[0]["logprob"] == pytest.approx(as_ids[0]["logprob"], abs=1e-4)


def laid_out(turns, tools=None, clean=True, form="g1"):
    """A chat's prompt for the next answer."""
    parts = RowLayout("", clean, TOOL_FORMS[form]).segments({"messages": [*turns, OPENED], "tools": tools})
    return "".join(text for text, _ in parts).rstrip()


@pytest.mark.parametrize("form", TOOL_FORMS)
def test_llama_cpp_chats_in_our_layout_and_stops_at_the_end_of_a_turn(convert, llama_cpp, tmp_path, form):
    (tmp_path / "config.json").write_text(json.dumps({"data": {"tool_form": form}}))
    convert("m.gguf", size=65536)
    tensors = dict(open_base(tmp_path / "model.pth").tensors)
    tensors["ln_out.weight"], tensors["ln_out.bias"] = (torch.full((64,), value).bfloat16() for value in (0.0, 1.0))
    world = load_tokenizer("world")
    (turn_end,) = world.encode("\n\n")
    tensors["head.weight"] = torch.zeros(65536, 64, dtype=torch.bfloat16)
    tensors["head.weight"][turn_end] = 1  # whatever it reads, it says that its turn is over
    save_model(tmp_path / "model.pth", tensors)
    assert commands.main(["convert", str(tmp_path / "model.pth"), str(tmp_path / "m.gguf")]) == 0
    server = llama_cpp()
    answer = server.handle_chat_completions({"messages": TURNS, "max_tokens": 5, "temperature": 0.0})
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 1
    assert answer["usage"]["prompt_tokens"] == len(world.encode(laid_out(TURNS, form=form)))

    def rendered(turns, **asked):
        body = json.dumps({"messages": turns, **asked}).encode()
        address = f"{server.listening_address}/apply-template"
        with urlopen(Request(address, body, {"Content-Type": "application/json"})) as found:
            return json.load(found)["prompt"]

    for turns in (TURNS, TURNS[1:2], TURNS[4:], AWKWARD, AWKWARD[1:]):
        assert rendered(turns) == laid_out(turns, form=form)
        assert rendered(turns, tools=TOOLS) == laid_out(turns, TOOLS, form=form)
    for think, mode in THINK.items():
        asked = laid_out(with_length(TURNS, think), form=form)
        assert rendered(TURNS, chat_template_kwargs={"think": think}) == asked + mode.opening
    for settings, think in (
        ({"enable_thinking": False}, "off"),
        ({"reasoning_effort": "none"}, "off"),
        ({"reasoning_effort": "xhigh"}, "high"),
        ({"enable_thinking": True, "reasoning_effort": "low"}, "low"),
        ({"think": "off", "reasoning_effort": "low", "enable_thinking": True}, "off"),
    ):
        body = ChatBody(messages=TURNS, chat_template_kwargs=settings)
        assert body.mode == think
        assert rendered(TURNS, chat_template_kwargs=settings) == rendered(TURNS, chat_template_kwargs={"think": think})
    assert rendered(TURNS, chat_template_kwargs={"enable_thinking": True}) == rendered(TURNS)  # its own default
    assert gguf_template().startswith(KNOWN_BY) and "generation %" not in gguf_template()


def test_a_hugging_face_folder_holds_it_too(convert, tmp_path, bpe):
    transformers = pytest.importorskip("transformers")
    said = convert("hf", "--tokenizer", bpe)
    assert "transformers loads its tokenizer, and the model after `import rwkv_peft.hf`" in said and "float" in said
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    assert tokenizer("hello  world")["input_ids"] == load_tokenizer(bpe).encode("hello  world")
    asked = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(TURNS, tools=TOOLS, **asked) == laid_out(TURNS, TOOLS)
    for settings, think in (
        ({"enable_thinking": True}, "on"),
        ({"enable_thinking": False}, "off"),
        ({"reasoning_effort": "max"}, "high"),
    ):
        mode = ChatBody(messages=TURNS, chat_template_kwargs=settings).mode
        opened = laid_out(with_length(TURNS, think)) + THINK[think].opening
        assert mode == think and tokenizer.apply_chat_template(TURNS, **asked, **settings) == opened
    with pytest.raises(Exception, match="the thinking lots is none of off, "):
        tokenizer.apply_chat_template(TURNS, **asked, reasoning_effort="lots")
    assert tokenizer.eos_token_id == 0 == json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize("form", TOOL_FORMS)
def test_the_run_beside_the_model_tells_the_layout_of_its_chats(convert, tmp_path, form):
    transformers = pytest.importorskip("transformers")
    for clean in (True, False):
        (tmp_path / "config.json").write_text(json.dumps({"data": {"clean_turns": clean, "tool_form": form}}))
        convert("hf", size=65536)
        convert("m.gguf", size=65536)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
        for template in (None, gguf_fields(tmp_path / "m.gguf")["chat_template"]):
            asked = {"tokenize": False, "add_generation_prompt": True, "chat_template": template}
            for turns in (AWKWARD, TURNS):
                found = tokenizer.apply_chat_template(turns, tools=TOOLS, **asked)
                assert found == laid_out(turns, TOOLS, clean, form)
    assert laid_out(AWKWARD) != laid_out(AWKWARD, clean=False)


def test_gguf_refuses_what_llama_cpp_cannot_imitate(convert, tmp_path, bpe):
    content = json.loads(bpe.read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    bpe.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no byte-level BPE .* convert to a Hugging Face folder"):
        convert("m.gguf", "--tokenizer", bpe)
    assert "wrote" in convert("hf", "--tokenizer", bpe)


def test_a_world_file_of_ones_own(convert, tmp_path):
    (tmp_path / "own.txt").write_bytes(b"1 'a' 1\r\n2 b'\\xff' 1\r\n5 'hi' 2\r\n")
    convert("m.gguf", "--tokenizer", tmp_path / "own.txt", size=80)
    fields = gguf_fields(tmp_path / "m.gguf")
    assert fields["model"] == "rwkv" and fields["eos_token_id"] == 0 and "eot_token_id" not in fields
    assert fields["tokens"][:6] == ["<s>", "a", "\\xff", "[PAD3]", "[PAD4]", "hi"]
    convert("hf", "--tokenizer", tmp_path / "own.txt", size=80)
    assert load_tokenizer(tmp_path / "hf" / "tokenizer.json").encode("hiaa") == [5, 1, 1]


def test_the_run_beside_the_model_tells_the_tokenizer(convert, tmp_path, bpe):
    vocabulary = vocabulary_of(load_tokenizer(bpe))
    (tmp_path / "config.json").write_text(json.dumps({"vocabulary": vocabulary._asdict()}))
    said = convert("m.gguf")
    assert str(bpe) in said and "note:" not in said
    assert gguf_fields(tmp_path / "m.gguf")["model"] == "gpt2"
    said = convert("other.gguf", "--tokenizer", "bytes")
    assert said.count("note: the run was trained with") == 1 and "and this is bytes (257 tokens" in said
    bpe.unlink()
    with pytest.raises(UserError, match="that file is gone; give it as --tokenizer"):
        convert("m.gguf")


@pytest.fixture(scope="module")
def world():
    return load_tokenizer("world")


def awkward(world, number):
    """Texts of runs of signs, of any code points, of tokens cut and joined, and of random bytes."""
    draw, tokens = random.Random(0), [token for token in world.token_bytes if token]
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    for _ in range(number):
        size = draw.choice((1, 3, 20, 60))
        yield "".join(draw.choice(PIECES) * draw.choice((1, 2, 3, 150)) for _ in range(size))
        yield "".join(map(chr, draw.choices(draw.choice((points, range(0x3000))), k=size)))
        yield b"".join(draw.choices(tokens, k=size)).decode("utf-8", "replace")
        yield "".join(token.decode("utf-8", "ignore")[: draw.randint(1, 9)] for token in draw.choices(tokens, k=size))
        yield draw.randbytes(size).decode("utf-8", "replace")


def test_all_tokens_and_any_text_are_those_of_world(world, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    file, rows = tmp_path / "tokenizer.json", tmp_path / "rows.jsonl"
    file.write_bytes(world_json(world.token_bytes, world.vocab_size))
    rows.write_text(json.dumps({"question": "Zürich?", "answer": "日本 😀\nb"}))
    for name, output in (("world", tmp_path / "a"), (file, tmp_path / "b")):
        assert commands.main(["preprocess", str(rows), "--tokenizer", str(name), "--output", str(output)]) == 0
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    found = tokenizers.Tokenizer.from_file(str(file))
    known = [number for number, token in enumerate(world.token_bytes) if token]
    assert found.decode_batch([[number] for number in known]) == [world.decode([number]) for number in known]
    for texts in (map(world.decode, zip(known)), awkward(world, 40)):
        texts = [*texts]
        assert [encoding.ids for encoding in found.encode_batch(texts)] == list(map(world.encode, texts))
    ids = random.Random(1).choices(known, k=1000)  # bytes that are no text
    assert found.decode(ids) == world.decode(ids)
    assert found.encode(f"a{WORLD_END}b").ids == [*world.encode("a"), 0, *world.encode("b")]
    assert found.get_vocab_size() == 65536 and found.id_to_token(65535) == "[PAD65535]"


def test_signs_that_share_a_token_with_a_newline_are_those_of_the_guide(world):
    """docs/guides/release.md names the answers that a chat template's text cuts otherwise than training does."""
    tokens = [token.decode("utf-8", "replace") for token in world.token_bytes if token]
    assert [token for token in tokens if "\n" in token and token.strip()] == ["…\n", "。\n", "，\n"]


def test_a_byte_without_a_token_is_an_error():
    tokenizers = pytest.importorskip("tokenizers")
    table = [None, b"a", b"\xff", None, b"ab", b"-", b"^]", b"+"]
    found = tokenizers.Tokenizer.from_str(world_json(table, 9).decode())
    assert found.encode("aaba^]-+").ids == [1, 4, 1, 6, 5, 7]
    with pytest.raises(Exception, match="UNK"):
        found.encode("axb")


def test_a_folder_needs_nothing_of_this_package(tmp_path, tiny_state, world):
    pytest.importorskip("transformers")
    save_model(tmp_path / "model.pth", tiny_state(vocab_size=65536, dtype=torch.bfloat16))
    assert commands.main(["convert", str(tmp_path / "model.pth"), str(tmp_path / "hf")]) == 0
    texts = [*awkward(world, 5)]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So é."}]
    command = [sys.executable, "-c", ALONE, str(tmp_path / "hf")]
    done = subprocess.run(command, input=json.dumps([texts, chat]), capture_output=True, text=True, check=True)
    ids, decoded, prompt, tokens, marks = json.loads(done.stdout)
    assert ids == list(map(world.encode, texts)) and decoded == texts
    assert prompt == "User: Hi\n\nAssistant:" and marks == [0, 0, "left", 65536]
    parts = world.encode(prompt), world.encode(" So é.\n\n")
    assert tokens.keys() == {"input_ids", "attention_mask", "assistant_masks"}
    assert tokens["input_ids"] == [*parts[0], *parts[1]]
    assert tokens["assistant_masks"] == [0] * len(parts[0]) + [1] * len(parts[1])
