"""The package in Python: the documented examples run, and what they compute is what the commands do."""

import copy
import json
import pickle
import random
import re
import shutil
import signal
import string
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rwkv_peft as rp
from rwkv_peft.adapters.methods import METHODS, words_of
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.layouts import RowLayout
from rwkv_peft.data.tools import TOOL_FORMS
from rwkv_peft.inference import command
from rwkv_peft.inference.forward import prefill
from rwkv_peft.inference.loading import load_model, save_state_file
from rwkv_peft.ops.decode.tape import Tape
from rwkv_peft.release import check, merge_command
from training.runs import finish, metrics, start

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["Two birds sing. ", "Q: What?\nA:", "One"]
HI = [{"role": "user", "content": "Hi"}]
ROWS = [{"prompt": f"Say {word}:", "completion": f" {word}!"} for word in "one two three four five six".split()]
ROWS += [{"messages": [*HI, {"role": "assistant", "content": "Yes?"}], "weight": 0.5}]


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_state):
    """The path of a random byte-vocabulary model."""
    path = tmp_path_factory.mktemp("base") / "base.pth"
    save_model(path, tiny_state(vocab_size=257, seed=3))
    return path


@pytest.fixture
def model(base):
    return rp.load(base, device="cpu")


def train(model):
    """Take two steps on a row -> the loss of each."""
    settings = {"epoch_count": 2, "ctx_len": 32, "lr_schedule": "constant", "progress": False}
    return [metrics["loss"] for metrics in rp.train(model, ROWS[:1], **settings)]


def test_the_documented_examples_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "demo").mkdir()
    shutil.copy(ROOT / "demo" / "rwkv7-demo.pth", tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    names = {}
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "python.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith(" red\n") and printed.count(" red\n") == 2
    assert "18 layers adapted" in printed
    assert printed.rstrip().endswith(" Aye, white spoons!")
    assert names["history"][-1]["loss"] < 0.5 and "Aye, white spoons!\n" in printed
    assert len(names["answer"].top_logprobs[0]) == 3 and len(names["hidden"]) == 4
    assert torch.isfinite(names["more"]).all()


def test_prompts_are_continued_as_by_the_command(base, model, capsys):
    expected = []
    for prompt in PROMPTS:
        assert command.main(f"--model {base} --max_tokens 12 --top_p 0.5".split() + ["--prompt", prompt]) == 0
        expected.append(capsys.readouterr().out.removesuffix("\n"))
    assert model.generate(PROMPTS[0], 12, top_p=0.5) == expected[0]
    many = model.generate(PROMPTS, 12, temperature=0, batch=2)
    assert many == [model.generate(prompt, 12, temperature=0) for prompt in PROMPTS]
    pieces = list(model.stream(PROMPTS, 12, temperature=0))
    assert ["".join(p.text for p in pieces if p.number == n) for n in range(3)] == many
    ends = [piece for piece in pieces if piece.end]
    assert sorted(piece.number for piece in ends) == [0, 1, 2] and {piece.end for piece in ends} <= {"length", "end"}
    first = many[0][3]
    assert model.generate(PROMPTS[0], 12, temperature=0, stop=first) == many[0].split(first)[0]


def test_prompts_go_on_from_a_state(model):
    _, state = model(torch.tensor([model.tokenizer.encode(PROMPTS[0])]))
    before = [tensor.clone() for layer in state for tensor in layer]
    due = model.generate([PROMPTS[0] + "Ann", PROMPTS[0] + "Bo"], 9, temperature=0, stop=())
    for _ in range(2):
        assert model.generate(["Ann", "Bo"], 9, temperature=0, stop=(), state=state) == due
    assert all(map(torch.equal, before, (tensor for layer in state for tensor in layer)))


def test_a_prompt_is_a_text_or_tokens_or_messages(model):
    encode = model.tokenizer.encode
    turns = [*HI, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "How\n\n\nmuch?"}]
    tool = {"name": "count", "description": "", "parameters": {}}
    listed = "".join(text for text, _ in RowLayout().chat([{"role": "system", "content": "", "tools": [tool]}, *HI]))
    asked = "User: Hi\n\nAssistant: Yes?\n\nUser: How\nmuch?\n\nAssistant:"
    ink = {"logit_bias": {1 + ord(space): -99.0 for space in string.whitespace}}  # an answer begins without whitespace
    for prompt, text, settings in (
        (encode("One"), "One", {}),
        (torch.tensor(encode("One")), "One", {}),
        (torch.tensor([encode("One")] * 2), ["One", "One"], {}),
        ([encode("One"), "Two", HI], ["One", "Two", "User: Hi\n\nAssistant:"], {}),
        (turns, asked, {}),
        ([HI, turns], ["User: Hi\n\nAssistant:", asked], {}),
        ([*HI, {"role": "assistant", "content": "Yes"}], "User: Hi\n\nAssistant: Yes", {}),
        ({"messages": HI, "tools": [tool]}, listed + "\n\nAssistant:", {}),
        (HI, "User: Hi\n\nAssistant: <think></think", {"think": "off"}),
    ):
        assert model.generate(prompt, 8, **settings, **ink) == model.generate(text, 8, stop="\n\nUser:", **ink)
    thinking = model.generate("User: Hi (think a bit)\n\nAssistant: <think", 8, **ink)
    assert model.generate(HI, 8, think="low", **ink) == "<think" + thinking
    blank = {"logit_bias": {1 + ord(" "): 99.0}}
    assert model.generate(HI, 4, **blank) == "" and model.generate("Hi", 4, **blank) == " " * 4


def test_several_answers_have_seeds_of_their_own(model):
    due = [model.generate("One", 8, seed=number) for number in range(3)]
    assert model.generate("One", 8, n=3) == due and len({*due}) == 3
    several = [[model.generate(text, 8, seed=2 * i + j) for j in range(2)] for i, text in enumerate(PROMPTS)]
    assert model.generate(PROMPTS, 8, n=2) == several
    assert model.generate(["One"], 8, n=1) == [[due[0]]] and model.generate([], n=2) == []


def test_details_are_those_of_the_plain_forward(model):
    prompt = model.tokenizer.encode("One")
    found = model.generate("One", 12, details=True, top_logprobs=3, temperature=0.7, presence_penalty=0.3, n=2)
    assert [one.text for one in found] == model.generate("One", 12, temperature=0.7, presence_penalty=0.3, n=2)
    for one in found:
        assert len(one.tokens) == len(one.logprobs) == len(one.top_logprobs) == 12 and one.end == "length"
        due = model(torch.tensor([prompt + one.tokens]))[0][0, len(prompt) - 1 : -1].log_softmax(-1)
        places = torch.arange(12)
        torch.testing.assert_close(torch.tensor(one.logprobs), due[places, one.tokens], rtol=1e-4, atol=1e-4)
        tokens, logprobs = torch.tensor(one.top_logprobs).unbind(-1)
        torch.testing.assert_close(logprobs, due.topk(3).values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(due.gather(1, tokens.long()), logprobs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.state, model(torch.tensor([prompt + one.tokens]))[1], rtol=1e-4, atol=1e-4)
    pieces = list(model.stream("One", 12, temperature=0.7, presence_penalty=0.3, top_logprobs=0))
    assert "".join(piece.text for piece in pieces) == pieces[-1].completion.text == found[0].text
    assert [one.token for piece in pieces for one in piece.tokens] == found[0].tokens
    assert pieces[-1].completion.logprobs == found[0].logprobs
    none = model.generate("One", 0, details=True)
    assert (none.text, none.tokens, none.end) == ("", [], "length")


@pytest.mark.parametrize("stop", ((), "e"))
def test_a_completion_goes_on_from_its_state(model, stop):
    letters = {"temperature": 0, "logit_bias": {1 + byte: 9.0 for byte in b"abcdefgh"}, "repetition_penalty": 5.0}
    first = model.generate("One", 7, details=True, stop=stop, **letters)
    assert first.end == ("stop" if stop else "length") and first.text.isalpha()
    due = model.generate("One" + first.text + "Two", 7, **letters)
    assert model.generate("Two", 7, state=first.state, **letters) == due
    chat = model.generate(HI, 7, details=True, stop=stop, **letters)
    turns, more = [*HI, {"role": "assistant", "content": chat.text}], [{"role": "user", "content": "So?"}]
    assert model.generate(more, 7, state=chat.state, **letters) == model.generate([*turns, *more], 7, **letters)


def test_an_answer_repeats_itself_until_the_seed_is_another(base):
    model = rp.load(base, device="auto")
    first = model.generate(["One", "One"], 12)
    assert model.generate(["One", "One"], 12) == first and first[0] != first[1]
    assert model.generate("One", 12, seed=1) == first[1]


@pytest.mark.parametrize("weights", ("int8", "int4"))
def test_rounded_weights_are_those_of_the_command(base, weights, capsys):
    small = rp.load(base, device="cpu", weights=weights)
    assert command.main(f"--model {base} --max_tokens 12 --weights {weights} --prompt One".split()) == 0
    assert small.generate("One", 12) + "\n" == capsys.readouterr().out
    network, _ = load_model(base, weights=weights)
    torch.testing.assert_close(small(torch.arange(1, 9)[None])[0], network(torch.arange(1, 9)[None])[0])
    with pytest.raises(UserError, match="rounded to blocks.* load it without weights="):
        rp.add_adapter(small)


def test_a_model_is_decoded_by_a_tape_until_something_is_put_into_it(model, monkeypatch):
    ran = []
    monkeypatch.setattr(Tape, "run", lambda tape, run=Tape.run: ran.append(tape) or run(tape))
    first = model.generate("One", 6, temperature=0)
    assert len(ran) == 5 and model.generate("One", 6, temperature=0) == first and len({*ran}) == 1
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.network.blocks[0].att.key.weight.mul_(-2)
        model.network.ln_out.weight.mul_(torch.linspace(-1, 1, len(model.network.ln_out.weight)))
    changed = model.generate("One", 6, temperature=0)
    assert changed != first and len({*ran}) == 2 and copied.generate("One", 6, temperature=0) == first
    ran.clear()
    hook = model.network.head.register_forward_hook(lambda *_: None)
    assert model.generate("One", 6, temperature=0) == changed and not ran
    hook.remove()
    rp.add_adapter(model, rank=8)
    assert model.generate("One", 6, temperature=0) == changed and not ran


@pytest.mark.parametrize("weights", (None, "int8"))
def test_what_decoding_keeps_in_memory_is_not_saved(base, tmp_path, weights):
    model = rp.load(base, device="cpu", weights=weights)
    sizes = []
    for _ in range(2):
        torch.save(model.state_dict(), tmp_path / "state.pth")
        sizes += [len(pickle.dumps(model)), (tmp_path / "state.pth").stat().st_size]
        text = model.generate("One", 6, temperature=0)
    assert sizes[2] < 1.1 * sizes[0] and sizes[3] < 1.1 * sizes[1], sizes
    assert pickle.loads(pickle.dumps(model)).generate("One", 6, temperature=0) == text


def test_hidden_states_are_those_of_every_block(model):
    tokens, seen = torch.randint(1, 257, (2, 7), generator=torch.Generator().manual_seed(0)), []
    for block in model.network.blocks:
        block.register_forward_hook(lambda block, inputs, outputs: seen.append(outputs[0]))
    logits, state, hidden = model(tokens, hidden_states=True)
    assert torch.equal(hidden[0], model.network.emb(tokens)) and len(hidden) == 1 + len(seen)
    assert all(map(torch.equal, hidden[1:-1], seen)) and torch.equal(hidden[-1], model.network.ln_out(seen[-1]))
    due, after = model(tokens)
    assert torch.equal(logits, due) and torch.equal(state[1].wkv, after[1].wkv)
    rest = model(tokens[:, 3:], model(tokens[:, :3])[1], hidden_states=True)[2]
    torch.testing.assert_close(rest[-1], hidden[-1][:, 3:], rtol=1e-4, atol=1e-4)


def test_a_state_goes_on_and_starts_every_sequence(base, tmp_path, model):
    tokens = torch.randint(1, 257, (2, 7), generator=torch.Generator().manual_seed(0))
    whole, _ = model(tokens)
    first, state = model(tokens[:, :3])
    rest, _ = model(tokens[:, 3:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-4, atol=1e-4)
    network, _ = load_model(base)
    _, one = prefill(network, [tokens[0, :3].tolist()])
    save_state_file(tmp_path / "state.pth", one, network)
    begun = rp.load(base, state=tmp_path / "state.pth", device="cpu")
    torch.testing.assert_close(begun(tokens[:1, 3:])[0], rest[:1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(begun(tokens[[0, 0], 3:])[0], rest[[0, 0]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if not (method.held and method.held.from_gradient)]
)
def test_an_adapter_trained_here_is_what_the_commands_take(base, tmp_path, name):
    """It merges to the bits of merge_bone.py, in which `check` finds the adapter's own logits."""
    torch.manual_seed(0)
    model = rp.load(base, device="cpu")
    words = words_of(METHODS[name])
    sizes = {"rank": 8} | ({"mini_rank": 8} if "mini_rank" in METHODS[name].tensors.size else {})
    rp.add_adapter(model, **words, **sizes)
    losses = train(model)
    assert losses[1] < losses[0]
    rp.save_adapter(model, tmp_path / "a.safetensors")
    metadata = read_adapter(tmp_path / "a.safetensors").metadata
    assert (metadata.variant, metadata.precision, metadata.generation) == (METHODS[name].file_name, "fp32", "x060")
    assert metadata.base_fingerprint == open_base(base).fingerprint and metadata.origin.base == "base.pth"
    rp.merge(base, tmp_path / "a.safetensors", tmp_path / "m.pth")
    files = f"--base_model {base} --bone_checkpoint {tmp_path}/a.safetensors"
    assert merge_command.main(f"{files} --output {tmp_path}/n.pth".split()) == 0
    assert (tmp_path / "m.pth").read_bytes() == (tmp_path / "n.pth").read_bytes()
    if name in ("bat-in", "lora"):
        assert check.main(f"{files} --merged {tmp_path}/m.pth".split()) == 0
    again = rp.load(base, device="cpu")
    rp.add_adapter(again, load=tmp_path / "a.safetensors")
    tokens = torch.arange(1, 9)[None]
    torch.testing.assert_close(again.eval()(tokens)[0], model.eval()(tokens)[0])
    merged = rp.load(base, [tmp_path / "a.safetensors"], device="cpu")
    torch.testing.assert_close(merged(tokens)[0], model(tokens)[0], rtol=1e-4, atol=1e-4)
    half = {tmp_path / "a.safetensors": 0.5}
    rp.merge(base, half, tmp_path / "h.pth")
    loaded = (rp.load(*files, device="cpu") for files in ((base, half), (tmp_path / "h.pth",)))
    assert torch.equal(*(one(tokens)[0] for one in loaded))


@pytest.mark.parametrize("parts", [["wkv"], ["shift"], ["wkv", "shift"]])
def test_states_train_and_are_generated_from(base, tmp_path, model, parts):
    report = rp.add_adapter(model, "none", train_parts=["state"], state_parts=parts)
    assert report.replaced == () and len(train(model)) == 2
    rp.save_adapter(model, tmp_path / "s.safetensors")
    begun = rp.load(base, state=tmp_path / "s.safetensors", device="cpu")
    assert begun.generate("One", 9, temperature=0) == model.generate("One", 9, temperature=0)
    assert model.training
    tokens = torch.arange(1, 9)[None]
    torch.testing.assert_close(begun(tokens)[0], model(tokens)[0])
    again = rp.load(base, device="cpu")
    rp.add_adapter(again, load=tmp_path / "s.safetensors")
    assert again.adapter.state_parts == tuple(parts) and len(train(again)) == 2
    torch.testing.assert_close(begun(tokens)[0], model(tokens)[0])
    if "shift" in parts:
        with pytest.raises(UserError, match="have att.shift, which --state_parts wkv leaves out"):
            rp.add_adapter(begun, "none", train_parts=["state"])


@pytest.mark.parametrize(
    "method, flags", (({"rank": 8}, "--bone_r 8"), ({"method": "none", "train_parts": ["state"]}, "--train_type state"))
)
def test_training_on_rows_is_that_of_train_py(base, model, tmp_path, method, flags):
    """The same batches, losses, norms that are clipped, validations and files, to the bit."""
    settings = {"epoch_count": 3, "ctx_len": 64, "val_split": 0.3, "micro_bsz": 2, "accumulate_grad_batches": 2}
    settings |= {"warmup_steps": 2, "weight_decay": 0.1, "gradient_clip_val": 0.01}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = f"--load_model {base} --data_file {tmp_path}/rows.jsonl --data_type sft --tokenizer bytes --precision fp32"
    words += f" --proj_dir {tmp_path}/out --accelerator cpu --answer_rows 0 {flags}"
    words += "".join(f" --{name} {value}" for name, value in settings.items())
    finish(start([sys.executable, str(ROOT / "train.py"), *words.split()]))
    rp.add_adapter(model, **method)
    torch.manual_seed(0)
    history, drawn = rp.train(model, ROWS, progress=False, **settings), torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(()))
    due = metrics(tmp_path, "out")
    assert len(history) == len(due) == 6
    for found, line in zip(history, due):
        for name in {*found} - {"tokens_per_s"}:
            assert found[name] == line[name], name
        assert found["grad_norm"] > settings["gradient_clip_val"]
    assert [number for number, line in enumerate(history) if "val_loss" in line] == [1, 3, 5]
    rp.save_adapter(model, tmp_path / "a.safetensors")
    found, due = (read_adapter(path).tensors for path in (tmp_path / "a.safetensors", tmp_path / "out"))
    torch.testing.assert_close(found, due, rtol=0, atol=0)


def test_a_preference_is_trained_saved_and_gone_on_with(base, tmp_path):
    """By a fresh model from the folder's checkpoint, to the bits of a run that nothing stopped."""
    pairs = [{"prompt": f"Say {n}:", "chosen": f" {n}!", "rejected": " no"} for n in ("one", "two", "six")]
    settings = {"data_type": "pairs", "objective": "dpo", "ctx_len": 64, "epoch_steps": 4, "epoch_count": 1}
    settings |= {"lr_init": 1e-3, "progress": False}

    def steps(name, **more):
        model = rp.load(base, precision="fp32", device="cpu")
        rp.add_adapter(model, rank=8)
        history = rp.train(model, pairs, proj_dir=tmp_path / name, **settings, **more)
        return [metrics["loss"] for metrics in history], model

    losses, _ = steps("whole")
    first, _ = steps("parts", callback=lambda metrics: metrics["step"] == 1)
    rest, model = steps("parts", resume="auto")
    assert first + rest == losses and len(first) == 2
    whole, parts = (read_adapter(tmp_path / name).tensors for name in ("whole", "parts"))
    trained = {name: weight for name, weight in model.network.named_parameters() if weight.requires_grad}
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]) and torch.equal(tensor, trained[name])
    assert steps("parts", resume="auto")[0] == []  # it is complete


def test_rows_are_a_list_a_data_set_a_data_frame_or_a_file(base, tmp_path):
    rows, settings = ROWS[:2], {"epoch_count": 1, "micro_bsz": 2, "progress": False}
    pandas, datasets = (pytest.importorskip(name) for name in ("pandas", "datasets"))
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    forms = [rows, datasets.Dataset.from_list(rows), pandas.DataFrame(rows), tmp_path / "rows.jsonl"]
    losses = []
    for form in (*forms, str(forms[-1])):
        model = rp.load(base, precision="fp32", device="cpu")
        rp.add_adapter(model, rank=8)
        losses += [metrics["loss"] for metrics in rp.train(model, form, **settings)]
    assert len(losses) == 5 and len({*losses}) == 1


def test_rewards_are_learned_from(base, tmp_path):
    (tmp_path / "judge.py").write_text(
        "def length(completions, **_):\n    return [len(text) for text in completions]\n"
    )
    model = rp.load(base, precision="fp32", device="cpu")
    rp.add_adapter(model, rank=8)
    settings = {"data_type": "prompts", "objective": "grpo", "reward": f"{tmp_path / 'judge.py'}:length"}
    settings |= {"num_generations": 2, "max_completion_length": 4, "epoch_steps": 2, "epoch_count": 1, "ctx_len": 64}
    history = rp.train(model, [{"prompt": "Say one:"}], progress=False, **settings)
    assert len(history) == 2 and all("reward" in metrics for metrics in history)


@pytest.mark.parametrize("question", ["query", "prompt"])
def test_conversations_with_tools_are_learned_from(base, tmp_path, question):
    (tmp_path / "shop.py").write_text(
        "class Shop:\n"
        "    def reset(self, goods):\n        self.goods = goods\n\n"
        "    def price(self, name: str) -> int:\n        'Look a price up.'\n        return self.goods[name]\n\n"
        "    def get_reward(self) -> float:\n        return float(len(self.goods))\n"
    )
    model = rp.load(base, precision="fp32", device="cpu")
    rp.add_adapter(model, rank=8)
    settings = {"data_type": "prompts", "objective": "grpo", "environment": f"{tmp_path / 'shop.py'}:Shop"}
    settings |= {"num_generations": 2, "max_completion_length": 4, "epoch_steps": 2, "epoch_count": 1, "ctx_len": 400}
    rows = [{question: "What is tea?", "goods": {"tea": 3}}, {question: "And rice?", "goods": {"tea": 3, "rice": 2}}]
    history = rp.train(model, rows, progress=False, **settings)
    assert [metrics["reward/environment"] for metrics in history] in ([1, 2], [2, 1])


def test_training_leaves_the_process_as_it_was(model):
    """Random numbers and signal handlers stay the caller's. Each weight has memory of its own, for any optimizer."""
    rp.add_adapter(model, rank=8, train_parts=["ln"])
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def process():
        handlers = [signal.getsignal(number) for number in numbers]
        return handlers, random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = process()
    train(model)
    assert process() == before
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in trained)
    assert len({weight.untyped_storage().data_ptr() for weight in trained}) == len(trained) > 2
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model(torch.arange(1, 9)[None])[0].float().square().mean().backward()
    optimizer.step()


def test_what_was_learned_from_rows_is_answered_and_merged(base, model, tmp_path, capsys):
    rp.add_adapter(model, rank=16)
    seen = []
    settings = {"epoch_count": 60, "lr_init": 1e-2, "lr_schedule": "constant", "ctx_len": 64}
    history = rp.train(model, ROWS[:1], callback=seen.append, **settings)
    assert history == seen and history[-1]["loss"] < 0.5 and model.training
    printed = capsys.readouterr().out
    assert re.search(r"1 document\n(.*\n)*step 60/60, loss 0\.\d{4}, lr .* tokens/s, ETA 00:00", printed)
    assert model.generate("Say one:", 5, temperature=0) == " one!"
    rp.save_adapter(model, tmp_path / "a.safetensors")
    merged = rp.load(base, [tmp_path / "a.safetensors"], device="cpu")
    assert merged.generate("Say one:", 5, temperature=0) == " one!"
    model.eval()
    stopped = rp.train(model, ROWS, progress=False, callback=lambda step: step["step"] == 1, tool_form="hermes")
    assert len(stopped) == 2 and not model.training
    asked = {"messages": HI, "tools": [{"name": "count"}]}
    listed = TOOL_FORMS["hermes"].tools_text(asked["tools"])
    told = model.generate(f"System: {listed}\n\nUser: Hi\n\nAssistant:", 5, stop="\n\nUser:")
    assert model.generate(asked, 5) == told.lstrip()
    with pytest.raises(UserError, match="the loss became nan.*; load the model again, and lower lr_init"):
        rp.train(model, ROWS, progress=False, lr_init=1e9)


def test_small_steps_add_up_in_bfloat16(base):
    model = rp.load(base, precision="bf16", device="cpu")
    rp.add_adapter(model, "none", train_parts=["ln"])
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    steps = rp.train(model, ROWS[:2], lr_init=2e-4, lr_schedule="constant", epoch_count=20, progress=False)
    assert len(steps) == 40  # each a fortieth of bfloat16's distance at 1
    assert sum((weight != old).sum() for weight, old in zip(weights, before)) > sum(map(torch.numel, weights)) / 4


def test_an_adapter_on_an_adapter_is_merged_after_it(base, tmp_path, model):
    rp.add_adapter(model, rank=8)
    train(model)
    rp.save_adapter(model, tmp_path / "a.safetensors")
    second = rp.load(base, [tmp_path / "a.safetensors"], device="cpu")
    rp.add_adapter(second, "lora", rank=4)
    train(second)
    rp.save_adapter(second, tmp_path / "b.safetensors")
    rp.merge(base, tmp_path / "a.safetensors", tmp_path / "a.pth")
    rp.merge(tmp_path / "a.pth", tmp_path / "b.safetensors", tmp_path / "m.pth")
    tokens = torch.arange(1, 9)[None]
    merged = rp.load(tmp_path / "m.pth", device="cpu")
    torch.testing.assert_close(merged(tokens)[0], second(tokens)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="trained on another base"):
        rp.merge(base, tmp_path / "b.safetensors", tmp_path / "n.pth")
    assert not (tmp_path / "n.pth").exists()


@pytest.mark.parametrize("method", ["bone", "dora", "lora"])
def test_a_model_with_an_adapter_is_pickled(base, method, tmp_path):
    model = rp.load(base, device="cpu")
    rp.add_adapter(model, method, rank=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.eval()
    torch.save(model, tmp_path / "model.pt")
    tokens = torch.arange(1, 9)[None]
    for same in (torch.load(tmp_path / "model.pt", weights_only=False), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(tokens)[0], model(tokens)[0])
        assert same.generate("a", max_tokens=4) == model.generate("a", max_tokens=4)


def test_mistakes_are_told_before_work(base, tmp_path, model):
    def twice():
        rp.add_adapter(model, rank=8)
        rp.add_adapter(model, rank=8)

    half = rp.load(base, precision="fp16", device="cpu")
    adapted = rp.load(base, device="cpu")
    rp.add_adapter(adapted, rank=8)
    for mistake, words in (
        (lambda: rp.load(base, device="gpu"), "device='gpu' is not one of cpu, cuda"),
        (lambda: rp.load(base, device="cuda:1"), "device='cuda:1' is not one of cpu, cuda; model.to moves a model to"),
        (lambda: model("Two birds"), "'Two birds' is no tensor of tokens.*; model.generate takes texts"),
        (lambda: model([[1, 2]]), r"\[\[1, 2\]\] is no tensor of tokens"),
        (lambda: model.generate("a", state="s.pth"), "state='s.pth': the State of one sequence is due"),
        (lambda: model.generate("a", state=model(torch.ones(2, 3).long())[1]), "the State of one sequence is due"),
        (lambda: rp.load(base, precision="int8", device="cpu"), "precision='int8' is not one of bf16"),
        (lambda: rp.load(base, weights="int3", device="cpu"), "weights='int3' is not one of int8, int4"),
        (lambda: rp.load(base, "a.safetensors", device="cpu"), r"give \['a.safetensors'\]"),
        (lambda: model.generate("a", temprature=1), "temprature=1 is no setting of generate; did you mean temperature"),
        (lambda: model.generate("a", max_new_tokens=8), "did you mean max_tokens.*\n.*are max_tokens, n, stop"),
        (lambda: model.generate("a", colour=8), "no setting of generate\n(?!.*measured)"),
        (lambda: model.generate(prompt="a"), "generate has no prompt=; its first argument is the prompt"),
        (model.generate, "its first argument is the prompt"),
        (lambda: model.generate(5), "prompts: 5 is no prompt"),
        (lambda: model.generate("a", top_p=2), "it is a probability from 0 to 1"),
        (lambda: model.generate("a", temperature="0"), "temperature '0': a finite number is due"),
        (lambda: model.generate("a", top_k=10**400), "a finite number is due"),
        (lambda: model.generate("a", max_tokens=-1), "max_tokens=-1: a whole number from 0 on is due"),
        (lambda: model.generate(["a", 3]), "prompts: 3 is no prompt; a text, token ids from 0 to 256, or messages"),
        (lambda: model.generate([1, 257]), r"prompts: \[1, 257\] is no prompt"),
        (lambda: model.generate([HI[0], "a"]), "is no prompt"),
        (lambda: model.generate([{"role": "friend", "content": "Hi"}]), "role 'friend'; known are user"),
        (lambda: model.generate("a", n=0), "n=0: a whole number from 1 on is due"),
        (lambda: model.generate("a", batch=0), "batch=0: a whole number from 1 on is due"),
        (lambda: model.generate("a", top_logprobs=-1), "top_logprobs -1: it is a number of tokens"),
        (lambda: model.generate("a", logit_bias={300: 1}), r"logit_bias={300: 1}: {token id: number} is due, .* 257"),
        (lambda: model.generate("a", logit_bias=3), "logit_bias=3: {token id: number} is due"),
        (lambda: model.generate(HI, think="of"), "think='of' is not one of"),
        (lambda: model.generate("a", think="on"), "think='on' opens the answers to messages"),
        (
            lambda: model.generate([*HI, {"role": "assistant", "content": "Y"}], think="on"),
            "has begun the answer already",
        ),
        (lambda: model.generate("a", stop=""), "an empty text would stop before the first token"),
        (lambda: model(torch.zeros(3, dtype=torch.long)), r"tokens \(3,\) torch.int64: \(B, T\) whole numbers"),
        (lambda: rp.tokenizer("wrld"), "give world, bytes"),
        (lambda: rp.train(model, ROWS), "no adapter to train; rp.add_adapter puts one in"),
        (lambda: rp.train(adapted, ROWS, lr=1), "lr=1 is no setting .* such as lr_init, lr_final$"),
        (lambda: rp.train(adapted, ROWS, epochs=1), "epochs=1 is no setting .* such as epoch_count$"),
        (lambda: rp.train(adapted, ROWS, max_steps=1), "max_steps=1 is no setting .* epoch_steps, epoch_count$"),
        (lambda: rp.train(adapted, ROWS, lr_init="fast"), "--lr_init"),
        (lambda: rp.train(adapted, [*ROWS, "Hi"]), "rows: 'Hi' is no row; rows are a list of dicts"),
        (lambda: rp.train(adapted, [ROWS[0], {"query": "Hi"}]), "row 2: .*known are text; messages.* TEXT$"),
        (lambda: rp.train(adapted, "rows.jsonl"), "rows.jsonl"),
        (lambda: rp.train(adapted, []), "rows: no document to write: there is no row"),
        (lambda: rp.save_adapter(model, "a.safetensors"), "no adapter to save; rp.add_adapter puts one in"),
        (lambda: rp.add_adapter(half), "in torch.float16, in which no adapter trains; load it with precision='fp32'"),
        (lambda: rp.add_adapter(model, "bome"), "method='bome' is not one of bone, lora"),
        (lambda: rp.add_adapter(model, r=8), "r=8 is no setting of an adapter; known are .*rank"),
        (lambda: rp.add_adapter(model, rank="8"), "rank='8': a whole number is due"),
        (lambda: rp.add_adapter(model, targets="att"), "targets='att': a list of names is due"),
        (lambda: rp.add_adapter(model, "none"), "name train_parts, or train a whole model"),
        (lambda: rp.add_adapter(model, "lora-ga", rank=4), "train it with train.py --peft lora-ga"),
        (lambda: rp.add_adapter(model, rank=7), "--bone_r 7 .*; try --bone_r 8"),
        (lambda: rp.add_adapter(model, load="x", rank=7), "load='x' tells its method and settings itself"),
        (twice, "has an adapter already"),
        (lambda: rp.save_adapter(model, tmp_path / "a.pth"), "a name that ends in .safetensors is due"),
        (lambda: rp.merge(base, base, tmp_path / "m.st"), "a name that ends in .pth is due"),
        (lambda: rp.merge(base, base, base), "must not be overwritten"),
        *(
            (lambda scale=scale: rp.load(base, {base: scale}), f"base.pth has the scale {scale}; a number from -100 to")
            for scale in (0, 101, float("nan"))
        ),
    ):
        with pytest.raises(UserError, match=words):
            mistake()
