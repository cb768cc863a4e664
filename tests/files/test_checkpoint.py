"""Base checkpoints, adapter files and writing: what is read is right, what is wrong is refused in words."""

import errno
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rwkv_peft.adapters.load import load_tensors
from rwkv_peft.adapters.methods import METHODS, is_saved
from rwkv_peft.config import AdapterConfig
from rwkv_peft.errors import UserError, exit_on_user_error
from rwkv_peft.files import pth
from rwkv_peft.files.adapter_file import METADATA_KEY, AdapterMetadata, save_adapter
from rwkv_peft.files.adapters import read_adapter
from rwkv_peft.files.atomic import atomic_write, check_output, place
from rwkv_peft.files.base import base_of, open_base, save_model
from rwkv_peft.files.fingerprint import fingerprint
from rwkv_peft.files.pth import stream_tensors
from rwkv_peft.files.pth_writer import TensorSpec, write_pth

LAYER = "blocks.0.att.key"


@pytest.fixture
def base(tmp_path, tiny_state):
    """Path of a tiny base and its state dict."""
    state = tiny_state()
    torch.save(state, tmp_path / "base.pth")
    return tmp_path / "base.pth", state


class Code:
    """Pickles as a call of os.mkdir: loading it unsafely would leave a folder behind."""

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


def test_dimensions_come_from_the_shapes(tiny_state):
    config = base_of(
        tiny_state(n_layer=3, n_embd=48, dim_att=32, dim_ffn=72, head_size=8, vocab_size=99, maa_rank=5, decay_rank=7)
    ).config
    assert (config.n_layer, config.n_embd, config.dim_att, config.dim_ffn) == (3, 48, 32, 72)
    assert (config.head_size, config.vocab_size, config.maa_rank, config.decay_rank) == (8, 99, 5, 7)
    assert config.n_head == 4


def test_a_pretrained_model_loads(shared_data):
    config = open_base(shared_data / "rwkv6_tiny_1m" / "rwkv6-tiny-1m-bf16.pth").config
    assert (config.n_layer, config.n_embd, config.head_size, config.vocab_size) == (12, 64, 8, 256)


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
        (with_entry(f"{LAYER}.weight", torch.zeros(64, 64, dtype=torch.int8)), "int8.*not quantized"),
        (with_entry(f"{LAYER}.bone", torch.zeros(4, 16, 16)), "never merged"),
        (with_entry(f"{LAYER}.lora_A", torch.zeros(4, 16)), "never merged"),
        (with_entry("epoch", 3), "entry 'epoch' is a int"),
        (with_entry("blocks.99999999999.x", torch.zeros(2)), "tells of layer 99999999999, and there are"),
        (with_entry("blocks.0.ffn.key.weight", torch.zeros(0, 64)), "none of its widths may be 0.* 0 feed-forward"),
        (with_entry("\ud800", torch.zeros(2)), r"the name '.ud800' is no Unicode"),
        (with_entry("ln_out.bias", torch.zeros(1).expand(1 << 40)), "is a view that repeats its values"),
        (with_entry("ln_out.bias", torch._neg_view(torch.ones(64))), "is a negated view"),
        (with_entry("ln_out.bias", torch.ones(64, dtype=torch.uint16)), "is uint16"),
        (with_entry("blocks.0.att.time_state", torch.zeros(4, 16, 16)), "1 missing tensors .blocks.1.att.time_state"),
        (with_entry("other.att.time_state", torch.zeros(4, 16, 16)), "1 unexpected tensors .other.att.time_state"),
        (
            lambda state: state | {f"blocks.{i}.att.time_state": torch.ones(4, 16) for i in range(2)},
            "has shape .4, 16.,",
        ),
        (lambda state: state | {f"blocks.{i}.att.time_state": torch.zeros(4, 16, 16) for i in range(2)}, None),
        (renamed("time_maa", "time_mix"), "web-rwkv"),
        (renamed("", ""), None),
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
        ("m.gguf", "the .pth that it was made of"),
        ("hf", "a Hugging Face folder.*convert"),
        (
            "run",
            "run is the folder of a run, which holds an adapter and no base model; give it as --adapter of generate",
        ),
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
        (b"", "empty"),
        (b"hello world, this is no checkpoint", "neither a zip archive nor a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x80\x02garbage", "damaged|cannot be read"),
    ],
)
def test_files_of_other_content_are_refused(tmp_path, content, message):
    (tmp_path / "base.pth").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_base(tmp_path / "base.pth")


@pytest.mark.parametrize("keep", [0.2, 0.9, 0.999])
def test_a_truncated_file_is_refused(base, keep):
    path, _ = base
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match="truncated"):
        open_base(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weight: weight.to(torch.float8_e4m3fn), "is float8_e4m3fn"),
        (lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), "is qint8"),
        (lambda weight: weight.to_sparse(), "is sparse"),
        (lambda weight: weight.to("meta"), "is without its data"),
        (lambda weight: weight.to(torch.int8), "is int8"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's, on what it will deprecate
def test_tensors_that_are_no_weights_are_refused(base, change, message):
    path, state = base
    torch.save(state | {f"{LAYER}.weight": change(state[f"{LAYER}.weight"])}, path)
    with pytest.raises(UserError, match=f"{LAYER}.weight {message}"):
        open_base(path)


def test_an_adapter_of_8_bit_floats_is_refused(tmp_path):
    block = torch.ones(4, 8, 8).to(torch.float8_e5m2)
    save_file({f"{LAYER}.bone": block}, tmp_path / "adapter.safetensors", {METADATA_KEY: "{}"})
    torch.save({f"{LAYER}.bone": block}, tmp_path / "adapter.pth")
    for name in ("adapter.safetensors", "adapter.pth"):
        with pytest.raises(UserError, match=f"{name}: {LAYER}.bone is float8_e5m2"):
            read_adapter(tmp_path / name, mode="bat-in")


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
    monkeypatch.setattr(pth, "MAPPED", 1 << 26)
    save_model(tmp_path / "m.pth", {f"t{i}": torch.zeros(1 << 22) for i in range(16)})  # 256 MB

    def resident():
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssFile:")[1].split()[0]) << 10

    before, largest = resident(), 0
    for _, tensor in stream_tensors(tmp_path / "m.pth"):
        assert not tensor.any()
        largest = max(largest, resident())
    assert 1 << 24 <= largest - before < 1 << 27


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_never_run(tmp_path, zipped):
    trap = tmp_path / "executed"
    torch.save({"emb.weight": Code(trap)}, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Code(trap)))
    for name in ("evil.pth", "bare.pth"):
        with pytest.raises(UserError, match="nothing of it was run|cannot be read|damaged"):
            open_base(tmp_path / name)
    assert not trap.exists()


def test_fingerprint_knows_values_and_not_dtype_or_order(tiny_state):
    state = tiny_state(dtype=torch.bfloat16)
    own = fingerprint(state)
    assert own == fingerprint({key: tensor.float() for key, tensor in reversed(state.items())})
    changed = state | {"head.weight": state["head.weight"] * 1.5}
    assert own != fingerprint(changed)
    assert own != fingerprint(without("head.weight")(state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_streamed_pth_is_what_torch_save_would_give(tmp_path, dtype):
    state = {
        "b": torch.arange(35).view(5, 7).to(dtype),
        "a": torch.arange(3).to(dtype)[None],
        "t": torch.ones(6, 4, dtype=dtype).T,
        "scalar": torch.tensor(2).to(dtype),
        "none": torch.empty(0, 3, dtype=dtype),
    }
    save_model(tmp_path / "m.pth", state)
    for mapped in (True, False):
        loaded = torch.load(tmp_path / "m.pth", weights_only=True, mmap=mapped)
        assert list(loaded) == list(state)
        for key, tensor in state.items():
            assert loaded[key].dtype == dtype and torch.equal(loaded[key], tensor)
    with zipfile.ZipFile(tmp_path / "m.pth") as archive:
        assert archive.testzip() is None  # every checksum holds
    first = (tmp_path / "m.pth").read_bytes()
    save_model(tmp_path / "m.pth", state)
    assert first == (tmp_path / "m.pth").read_bytes()


def test_streaming_refuses_a_tensor_that_was_not_announced(tmp_path):
    specs = {"a": TensorSpec((2,), torch.float32)}
    for tensors in (
        [("a", torch.zeros(3))],
        [("b", torch.zeros(2))],
        [],
        [("a", torch.zeros(2)), ("b", torch.zeros(2))],
    ):
        with pytest.raises(ValueError):
            write_pth(tmp_path / "m.pth", specs, tensors)


def test_atomic_write_replaces_or_leaves_untouched(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
    assert path.read_text() == "one"
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("interrupted")
    assert path.read_text() == "one" and os.listdir(path.parent) == ["file"]
    with pytest.raises(UserError, match="is a folder"), atomic_write(tmp_path):
        pass


WRITER = """
import os, signal, sys
from rwkv_peft.files.atomic import atomic_write
with atomic_write(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writers_file_is_removed_by_the_next_and_a_living_ones_is_not(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", WRITER, str(tmp_path / "file")], env=environment)
    (killed,) = os.listdir(tmp_path)
    assert killed.startswith(f".file.{place()}-") and killed.endswith(".tmp")
    other = f".file.00000000-{killed.split('-')[1]}-00000000.tmp"  # of another machine, where the number may live
    (tmp_path / other).touch()
    with atomic_write(tmp_path / "living") as living, atomic_write(tmp_path / "new"):
        assert living.exists() and killed not in os.listdir(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([other, "living", "new"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        OSError("128000 requested and 68544 written"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_a_full_disk_is_told_in_words(tmp_path, error):
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match="disk"), atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise error
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(errno.EROFS, "Read-only file system"), "no permission to write there .read-only"),
        (OSError(errno.EFBIG, "File too large"), "file too large"),
        (OSError(errno.EIO, "Input/output error", "/elsewhere/input.pth"), "input/output error ./elsewhere/input.pth."),
        (RuntimeError("I/O error: File too large (os error 27)"), "file too large"),
        (OSError("a message without a number"), "a message without a number"),
    ],
)
def test_every_failure_to_write_is_told_in_words(tmp_path, error, reason):
    with pytest.raises(UserError, match=f"cannot write .*file: {reason}"), atomic_write(tmp_path / "file"):
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name, reason",
    [
        ("plain/x.pth", "a file stands where"),
        ("plain/deeper/x.pth", "a file stands where"),
        ("x" * 300, "file name too long"),
        ("/proc/x.pth", "no such file|no permission"),
        ("/dev/null", "is a device"),
        (".", "is a folder"),
    ],
)
@pytest.mark.parametrize("writing", [True, False])
def test_names_that_cannot_be_written_are_refused(tmp_path, name, reason, writing):
    (tmp_path / "plain").write_text("a plain file")
    with pytest.raises(UserError, match=reason):
        if writing:
            with atomic_write(tmp_path / name):
                pass
        else:
            check_output("--output", tmp_path / name, [])
    assert os.listdir(tmp_path) == ["plain"]


def test_an_output_is_no_input_by_any_name_and_its_check_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "input").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "input")
    before = sorted(tmp_path.rglob("*"))
    for source in (tmp_path / "folder" / "input", tmp_path / "folder", tmp_path / "link"):
        with pytest.raises(UserError, match="--output .* is the file given as --input"):
            check_output("--output", tmp_path / "link", [("--input", source), ("--none", None)])
    check_output("--output", tmp_path / "new" / "deeper" / "file", [("--input", tmp_path / "folder")])
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupt_ends_a_command_with_one_word(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(interrupted)
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_what_is_no_unicode_is_printed_escaped(monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams):
        monkeypatch.setattr(sys, name, stream)

    def refusing(argv):
        print("\ud800")
        raise UserError("\udfff")

    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(refusing)
    for stream in streams:
        stream.flush()
    assert ended.value.code == 2
    assert [stream.buffer.getvalue() for stream in streams] == [b"\\ud800\n", b"error: \\udfff\n"]


def test_a_bare_pickle_that_names_more_than_its_file_holds_is_refused(base):
    path, state = base
    torch.save({"emb.weight": state["emb.weight"]}, path, _use_new_zipfile_serialization=False)
    size = state["emb.weight"].numel()
    content = path.read_bytes()
    path.write_bytes(content.replace(b"M" + size.to_bytes(2, "little"), b"J\xff\xff\xff\x7f"))
    assert path.read_bytes() != content
    with pytest.raises(UserError, match="names a size of 2147483647"):
        open_base(path)


def test_adapter_files_carry_what_they_are(tmp_path):
    tensors = {f"{LAYER}.bone": torch.randn(4, 16, 16), "blocks.0.ln1.weight": torch.randn(64).bfloat16()}
    metadata = AdapterMetadata.from_config(AdapterConfig(mode="bat-out", rank=16, train_parts=("ln",)), "abc")
    save_adapter(tmp_path / "a.safetensors", tensors, metadata)
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert adapter.metadata == metadata and metadata.variant == "bat-out" and metadata.base_fingerprint == "abc"
    assert set(adapter.tensors) == set(tensors) and all(
        torch.equal(adapter.tensors[key], tensors[key]) for key in tensors
    )
    assert set(adapter.modules()) == {LAYER} and set(adapter.whole()) == {"blocks.0.ln1.weight"}
    with pytest.raises(UserError, match="is a bat-out adapter, not bat-in"):
        read_adapter(tmp_path / "a.safetensors", mode="bat-in")


def test_equal_adapters_are_equal_files_in_any_order(tmp_path):
    tensors = {f"{LAYER}.bone": torch.randn(4, 16, 16), "blocks.0.ln1.weight": torch.randn(64).bfloat16()}
    metadata = AdapterMetadata("bat-in", rank=16, targets=("att.key",))
    for name, order in (("first", tensors), ("again", tensors), ("other", reversed(tensors.items()))):
        save_adapter(tmp_path / name, dict(order), metadata)
    first, again, other = ((tmp_path / name).read_bytes() for name in ("first", "again", "other"))
    assert first == again == other
    assert (int.from_bytes(first[:8], "little") + 8) % 8 == 0  # the data is aligned


@pytest.mark.parametrize(
    "variant, flags, words",
    [
        ("lora", {"alpha": 8.0}, None),
        ("lora", {"alpha": 128.0}, "--lora_alpha 128 contradicts .* trained with 8 "),
        ("lora", {"init": "init_pissa.pth"}, "--lora_init init_pissa.pth is for RWKV-PEFT's PiSSA files"),
        ("bone", {"alpha": 8.0}, "--lora_alpha 8 is LoRA's, and .* is a bone adapter"),
    ],
)
def test_lora_flags_must_agree_with_a_file_that_says_what_it_is(tmp_path, variant, flags, words):
    names = ("bone",) if variant == "bone" else ("lora_A", "lora_B")
    save_adapter(
        tmp_path / "a.safetensors",
        {f"blocks.0.att.key.{name}": torch.ones(4, 4) for name in names},
        AdapterMetadata(variant, rank=4, scale=2.0),
    )
    if words is None:
        assert read_adapter(tmp_path / "a.safetensors", **flags).metadata.scale == 2.0
    else:
        with pytest.raises(UserError, match=words):
            read_adapter(tmp_path / "a.safetensors", **flags)


def test_adapter_files_that_are_wrong_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="NaN"):
        save_adapter(path, {f"{LAYER}.bone": torch.full((2, 2), float("nan"))}, AdapterMetadata("bone", rank=2))
    assert not path.exists()
    path.write_bytes(b"not a safetensors file at all")
    with pytest.raises(UserError, match="not a readable safetensors"):
        read_adapter(path)
    save_adapter(path, {f"{LAYER}.bone": torch.ones(2, 2)}, AdapterMetadata("bone", rank=2, format_version=99))
    with pytest.raises(UserError, match="update this package"):
        read_adapter(path)
    from safetensors.torch import save_file

    save_file({f"{LAYER}.bone": torch.ones(2, 2)}, path)
    with pytest.raises(UserError, match="does not say which adapter"):
        read_adapter(path)
    with pytest.raises(UserError, match="does not exist"):
        read_adapter(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variant": None}, "variant = None"),
        ({"variant": "vera"}, "variant = 'vera', and one of bone,"),
        ({"variant": "none"}, "names no method .*tensors of an adapter on 1 layers"),
        ({"quant": "q4"}, "quant = 'q4'"),
        ({"rank": "x"}, "rank = 'x'"),
        ({"rank": True}, "rank = True"),
        ({"scale": float("nan")}, "scale = nan"),
        ({"targets": "att.key"}, "targets = 'att.key'"),
        ({"base_fingerprint": 3}, "base_fingerprint = 3"),
        ({"generation": "x050"}, "generation = 'x050', and one of x060, x070"),
    ],
)
def test_adapter_descriptions_that_are_broken_are_refused(tmp_path, changes, message):
    from safetensors.torch import save_file

    values = {"variant": "bone", "rank": 2, "format_version": 1} | changes
    header = {METADATA_KEY: json.dumps({key: value for key, value in values.items() if value is not None})}
    save_file({f"{LAYER}.bone": torch.ones(2, 2)}, tmp_path / "a.safetensors", header)
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "a.safetensors")


def test_every_adapter_has_a_variant_in_files():
    assert {name for name in (*METHODS, "none") if is_saved(name)} == {*METHODS, "none"} - {"lora-plus", "rslora"}


def adapted_model():
    """A module with one adapter parameter and one whole tensor under an RWKV model's names."""
    model = nn.Module()
    model.key = nn.Linear(4, 4, bias=False)
    model.key.bone = nn.Parameter(torch.zeros(2, 4))
    model.ln = nn.LayerNorm(4)
    return model


def test_loading_an_adapter_accounts_for_every_key():
    model, tensors = adapted_model(), {"key.bone": torch.randn(2, 4), "ln.weight": torch.randn(4)}
    load_tensors(model, tensors)
    assert torch.equal(model.key.bone, tensors["key.bone"]) and torch.equal(model.ln.weight, tensors["ln.weight"])


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "matches nothing"),
        ({"model.key.bone": torch.ones(2, 4)}, "matches nothing"),
        ({"ln.weight": torch.ones(4)}, "matches nothing"),
        ({"key.bone": torch.ones(2, 4), "value.bone": torch.ones(2, 4)}, "without a place"),
        ({"key.bone": torch.ones(4, 4)}, "has shape"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_changes(tensors, message):
    model = adapted_model()
    with pytest.raises(UserError, match=message):
        load_tensors(model, tensors)
    assert not model.key.bone.any() and torch.equal(model.ln.weight, torch.ones(4))
