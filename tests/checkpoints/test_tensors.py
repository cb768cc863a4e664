"""Base checkpoints and files of tensors: right ones are read exactly, wrong ones are refused with a message."""

import io
import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rwkv_peft.checkpoints import tensors as tensors_file
from rwkv_peft.checkpoints.base import fingerprint, open_base, save_model
from rwkv_peft.checkpoints.readable import reading
from rwkv_peft.checkpoints.tensors import read_tensors, save_pth, stream_tensors
from rwkv_peft.cli.errors import UserError

LAYER = "blocks.0.att.key"


@pytest.fixture
def base(tmp_path, tiny_state):
    """Path of a tiny base and its state dict."""
    state = tiny_state()
    torch.save(state, tmp_path / "base.pth")
    return tmp_path / "base.pth", state


class Code:
    """Pickles as a call of os.mkdir: unsafe loading would leave a folder behind."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_load_base_gives_what_was_saved(tmp_path, tiny_state, dtype):
    state = tiny_state(dtype=dtype)
    torch.save(state, tmp_path / "base.pth")
    loaded = open_base(tmp_path / "base.pth").tensors
    assert list(loaded) == list(state)
    for key, tensor in state.items():
        assert loaded[key].dtype == dtype and torch.equal(loaded[key], tensor)


def test_parameters_are_read_as_plain_tensors(base):
    path, state = base
    torch.save({key: torch.nn.Parameter(tensor) for key, tensor in state.items()}, path)
    for key, tensor in [*read_tensors(path).items(), *stream_tensors(path)]:
        assert type(tensor) is torch.Tensor and not tensor.requires_grad and torch.equal(tensor, state[key])


def without(*keys):
    return lambda state: {key: tensor for key, tensor in state.items() if key not in keys}


def with_entry(key, value):
    return lambda state: state | {key: value}


def renamed(old, new):
    return lambda state: {key.replace(old, new): tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    "change, message",
    [
        (without("blocks.1.ffn.key.weight"), "1 missing tensors .blocks.1.ffn.key.weight"),
        (with_entry("blocks.0.att.extra", torch.zeros(2)), "1 unexpected tensors .blocks.0.att.extra"),
        (with_entry(f"{LAYER}.weight", torch.zeros(64, 60)), "blocks.0.att.key.weight has shape .64, 60."),
        (with_entry("blocks.0.att.time_faaaa", torch.zeros(64)), "time_faaaa .heads, head size."),
        (with_entry(f"{LAYER}.bone", torch.zeros(4, 16, 16)), "never merged"),
        (with_entry("epoch", 3), "entry 'epoch' is of type int"),
        (with_entry("blocks.99999999999.x", torch.zeros(2)), "has layer 99999999999, and there are"),
        (with_entry("blocks.0.ffn.key.weight", torch.zeros(0, 64)), "none of its widths may be 0.* 0 feed-forward"),
        (with_entry("\ud800", torch.zeros(2)), "is damaged: .*surrogates not allowed"),
        (
            with_entry("ln_out.bias", torch.zeros(1).expand(1 << 40)),
            "is float32; weights must be dense tensors .* with all their data",
        ),
        (with_entry("ln_out.bias", torch._neg_view(torch.ones(64))), "is float32; weights"),
        (with_entry("ln_out.bias", torch.ones(64, dtype=torch.uint16)), "is uint16"),
        (with_entry("blocks.0.att.time_state", torch.zeros(4, 16, 16)), "1 missing tensors .blocks.1.att.time_state"),
        (with_entry("other.att.time_state", torch.zeros(4, 16, 16)), "1 unexpected tensors .other.att.time_state"),
        (
            lambda state: state | {f"blocks.{i}.att.time_state": torch.ones(4, 16) for i in range(2)},
            "has shape .4, 16.,",
        ),
        (lambda state: state | {f"blocks.{i}.att.time_state": torch.zeros(4, 16, 16) for i in range(2)}, None),
        (renamed("time_maa", "time_mix"), "web-rwkv"),
        (without("emb.weight"), "not an RWKV model"),
        (lambda state: {f"model.{key}": tensor for key, tensor in state.items()}, "start with 'model.'"),
        (lambda state: {"rwkv.embeddings.weight": state["emb.weight"]}, "Hugging Face"),
        (lambda state: {"state_dict": state}, "flat dict"),
        (lambda state: list(state.values()), "holds a list"),
        (lambda state: {}, "empty dict"),
        (lambda state: {"emb.weight": torch.zeros(4, 4), "blocks.0.att.x_r": torch.zeros(4)}, "RWKV-7"),
        (lambda state: {"emb.weight": torch.zeros(4, 4), "blocks.0.att.gate.weight": torch.zeros(4)}, "RWKV-5"),
        (lambda state: {"emb.weight": torch.zeros(4, 4), "blocks.0.att.time_first": torch.zeros(4)}, "RWKV-4"),
        (lambda state: {f"{LAYER}.bone": torch.zeros(4, 4, 4)}, "an adapter, not a base model"),
    ],
)
def test_load_base_refuses_what_is_not_a_base(tmp_path, tiny_state, change, message):
    torch.save(change(tiny_state()), tmp_path / "base.pth")
    if message is None:
        open_base(tmp_path / "base.pth")
        return
    with pytest.raises(UserError, match=message):
        open_base(tmp_path / "base.pth")


@pytest.mark.parametrize(
    "name, message",
    [
        ("m.st", "convert .*m.st model.pth"),
        ("m.safetensors", "convert"),
        ("m.gguf", "the .pth that it was made from"),
        ("hf", "hf/model.safetensors is not a readable safetensors file"),
        ("run", "run is the folder of a run, which holds an adapter and no base model; give it as --adapter"),
        ("whole", "whole is the folder of a run; give the model that it trained, .*whole/rwkv.pth"),
    ],
)
def test_other_formats_name_the_converter(tmp_path, name, message):
    for folder, product in (("hf", "model.safetensors"), ("run", "adapter.safetensors"), ("whole", "rwkv.pth")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        (tmp_path / folder / product).touch()
    save_file({"emb.weight": torch.ones(2, 2)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=message):
        open_base(tmp_path / name)


@pytest.mark.parametrize(
    "content, message",
    [
        (lambda whole: b"", "empty"),
        (lambda whole: b"hello world, this is no checkpoint", "it is no zip archive"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (lambda whole: b"\x80\x02garbage", "is a bare pickle"),
        (lambda whole: whole[: len(whole) // 5], "truncated"),
        (lambda whole: whole[:-100], "truncated"),
    ],
)
def test_files_of_other_content_are_refused(base, content, message):
    path, _ = base
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        open_base(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weight: weight.to(torch.float8_e4m3fn), "is float8_e4m3fn"),
        (lambda weight: weight.to_sparse(), "is float32 and not dense"),
        (lambda weight: weight.to("meta"), "is float32 and not dense"),
        (lambda weight: weight.to(torch.int8), "is int8"),
        (lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), "is qint8 and not dense"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's, on what it will deprecate
def test_tensors_that_are_no_weights_are_refused(base, change, message):
    path, state = base
    torch.save(state | {f"{LAYER}.weight": change(state[f"{LAYER}.weight"])}, path)
    with pytest.raises(UserError, match=f"{LAYER}.weight {message}"):
        open_base(path)


def test_missing_files_folders_and_other_zips_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_base(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is a folder"):
        open_base(tmp_path)
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "no model here")
    with pytest.raises(UserError, match="cannot be read as a PyTorch checkpoint"):
        open_base(tmp_path / "other.pth")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory as Linux tells it")
def test_streaming_keeps_little_of_a_file_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors_file, "MAPPED", 1 << 26)
    save_model(tmp_path / "m.pth", {f"t{i}": torch.zeros(1 << 22) for i in range(16)})  # 256 MB

    def resident():
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssFile:")[1].split()[0]) << 10

    before, largest = resident(), 0
    for _, tensor in stream_tensors(tmp_path / "m.pth"):
        assert not tensor.any()
        largest = max(largest, resident())
    assert 1 << 24 <= largest - before < 1 << 27


def test_code_in_a_pickle_is_never_run(tmp_path):
    trap = tmp_path / "executed"
    torch.save({"emb.weight": Code(trap)}, tmp_path / "evil.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Code(trap)))
    for name in ("evil.pth", "bare.pth"):
        with pytest.raises(UserError, match="nothing of it was run|is a bare pickle"):
            open_base(tmp_path / name)
    assert not trap.exists()


def test_fingerprint_knows_values_and_not_dtype_or_order(tiny_state):
    state = tiny_state(dtype=torch.bfloat16)
    own = fingerprint(state)
    assert own == fingerprint({key: tensor.float() for key, tensor in reversed(state.items())})
    changed = state | {"head.weight": state["head.weight"] * 1.5}
    assert own != fingerprint(changed)
    assert own != fingerprint(without("head.weight")(state))


def rewritten(path, change):
    """Rewrite the archive at `path`, each record as change(name, content) returns it."""
    target = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, change(name, archive.read(name)))
    path.write_bytes(target.getvalue())


@pytest.mark.parametrize("save", [save_pth, lambda path, tensors: torch.save(tensors, path)], ids=["ours", "torch"])
def test_views_of_one_storage_and_empty_tensors_are_read(tmp_path, save):
    whole = torch.arange(12.0)
    tensors = {"whole": whole, "part": whole[3:7], "rows": whole.view(3, 4)[1:], "none": torch.ones(0), "copy": whole}
    save(tmp_path / "a.pth", tensors)
    for key, tensor in read_tensors(tmp_path / "a.pth").items():
        assert torch.equal(tensor, tensors[key]), key


@pytest.mark.parametrize("left", [0, 4, 127])
def test_a_record_shorter_than_its_tensor_is_not_completed_by_its_neighbour(tmp_path, left):
    path = tmp_path / "a.pth"
    save_pth(path, {"a": torch.ones(32), "b": torch.full((32,), 2.0), "empty": torch.ones(0)})
    rewritten(path, lambda name, content: content[:left] if name.endswith("data/0") else content)
    with pytest.raises(UserError, match="a tensor takes 128 bytes, and no record of that length is left"):
        read_tensors(path)


def test_a_packed_archive_is_refused(base):
    path, _ = base
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("base/data/more", bytes(1000))
    with pytest.raises(UserError, match="is packed .base/data/more., and a .pth is not"):
        read_tensors(path)


def test_the_guard_names_the_file_and_the_reason_and_lets_messages_and_signals_pass():
    for error in (
        RuntimeError("broken\nby torch"),
        KeyError("x"),
        RecursionError("deep"),
        MemoryError(),
        OSError(5, "io"),
    ):
        with (
            pytest.raises(UserError, match="^a.pth is damaged: .+; copy it again$"),
            reading("a.pth", "is damaged", "copy it again"),
        ):
            raise error
    for passing in (UserError("as it is"), KeyboardInterrupt()):
        with pytest.raises(type(passing), match="^(as it is)?$"), reading("a.pth"):
            raise passing
