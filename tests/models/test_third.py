"""A generation that one file adds: trained, merged and asked by the commands that a user types."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.third import Third, ThirdConfig, ThirdFamily
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.token_file_writer import TokenFileWriter
from training.runs import finish, metrics, start

SCRIPT = Path(__file__).with_name("third.py")
TRAIN = "--ctx_len 24 --lr_init 1e-2 --epoch_steps 4 --epoch_count 1 --bone_r 8 --precision fp32 --accelerator cpu"
SEGMENTS = ("--train_type", "infctx", "--chunk_ctx", "7", "--train_parts", "state", "time")


def a_model():
    torch.manual_seed(0)
    family = ThirdFamily()
    model = family.build(family.new_dimensions(n_layer=2, n_embd=32, vocab_size=257))
    family.init_weights(model)
    return model


def run(*words):
    """Run a command that knows the generation -> what it printed."""
    return finish(start([sys.executable, str(SCRIPT), *map(str, words)]))[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, documents, and a run in segments of an adapter with states and its own parameters."""
    folder = tmp_path_factory.mktemp("third")
    torch.save(a_model().state_dict(), folder / "base.pth")
    with TokenFileWriter(folder / "data", vocab_size=80) as writer:
        for begin in range(20):
            writer.add([1 + (begin + 7 * i) % 79 for i in range(30 + begin)] + [0])
    paths = ("--load_model", folder / "base.pth", "--data_file", folder / "data", "--proj_dir", folder / "run")
    (folder / "said").write_text(run("train", *paths, *TRAIN.split(), *SEGMENTS))
    return folder


def test_blocks_see_tokens():
    model, tokens = a_model(), torch.randint(80, (1, 6))
    with torch.no_grad():
        before = model(tokens)[0]
        model.blocks[1].ffn.deep.weight[tokens[0, 3]] += 1
        changed = (model(tokens)[0] != before).any(-1)[0]
    assert changed.tolist() == [bool(token == tokens[0, 3]) for token in tokens[0]]


def test_it_trains_in_segments_with_states_and_parts(files):
    said, trained = (files / "said").read_text(), load_file(files / "run" / "adapter.safetensors")
    assert "RWKV-third" in said
    losses = [line["loss"] for line in metrics(files, "run")]
    assert len(losses) == 4 and losses[-1] < losses[0]
    kinds = {key.split(".", 2)[2] for key in trained}
    assert kinds == {f"{target}.bone" for target in ThirdFamily.targets} | {"att.time_state", "att.amount", "att.decay"}
    assert all(tensor.any() for tensor in trained.values())


def test_what_is_merged_answers_as_base_and_adapter_do(files):
    adapter, merged, state = files / "run", files / "merged.pth", files / "state.pth"
    paths = ("--base_model", files / "base.pth", "--bone_checkpoint", adapter)
    run("merge", *paths, "--output", merged, "--state_output", state)
    asked = ("--tokenizer", "bytes", "--prompt", "\x05\x0c", "--max_tokens", "12", "--temperature", "0")
    ways = (("--model", files / "base.pth", "--adapter", adapter), ("--model", merged, "--state", state))
    answers = []
    for number, way in enumerate(ways):
        run("generate", *way, *asked, "--output", files / f"{number}.jsonl", "--save_state", files / f"{number}.pth")
        answers.append(json.loads((files / f"{number}.jsonl").read_text()))
    assert answers[0] == answers[1]
    mine, theirs = (torch.load(files / f"{number}.pth", weights_only=True) for number in range(2))
    assert mine.keys() == theirs.keys() and "blocks.1.att.last" in mine
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[key])


def test_its_runs_are_planned(files):
    said = run("plan", "--load_model", files / "base.pth", "--ctx_len", "24", "--bone_r", "8", "--precision", "fp32")
    assert "fits" in said


def test_formats_without_a_form_for_it_say_so(files):
    process = start([sys.executable, str(SCRIPT), "convert", str(files / "base.pth"), str(files / "model.st")])
    _, error = finish(process, code=2)
    assert "RWKV-third has no form as web-rwkv's .st" in error and not (files / "model.st").exists()
    family = ThirdFamily()
    for form, told in ((family.gguf_settings, "GGUF"), (family.hf_settings, "a Hugging Face folder")):
        with pytest.raises(UserError, match=f"RWKV-third has no form as {told} here; take a .pth"):
            form(ThirdConfig(2, 32, 257, 32, 64, 16))


def test_its_dimensions_are_those_of_its_file():
    config = ThirdConfig(2, 32, 257, 32, 64, 16)
    assert ThirdFamily().check(a_model().state_dict()) == config and isinstance(Third(config), Third)
