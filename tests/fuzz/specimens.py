"""Whole files of every kind that a user gives, and the command or reader that each is given to."""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fuzz import mutations as m
from rwkv_peft.config import AdapterConfig, to_json
from rwkv_peft.data import preprocess
from rwkv_peft.data.binidx import BinidxDataset, BinidxWriter
from rwkv_peft.data.report import describe
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.files.adapter_file import METADATA_KEY, AdapterMetadata, save_adapter
from rwkv_peft.files.base import open_base, save_model
from rwkv_peft.files.pth_writer import TensorSpec
from rwkv_peft.files.safetensors_file import write_safetensors
from rwkv_peft.generate.command import Continuation, show
from rwkv_peft.generate.loading import load_model, read_state_file
from rwkv_peft.generate.prompts import encode, read_prompt_file
from rwkv_peft.models.state import layer_keys
from rwkv_peft.plots import plot_loss, read_metrics, series
from rwkv_peft.release import convert, merge_command
from rwkv_peft.training.adapter_flags import JSON_FLAGS, parse_json_flag
from rwkv_peft.training.checkpoints import list_checkpoints
from rwkv_peft.training.saver import read_run_state

LAYER = "blocks.0.att.key"
ROW = {
    "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
    "weights": [1, 0.5, None],
}
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in [ROW, {"text": "one two"}] * 4)
RUN = {"adapter": json.loads(to_json(AdapterConfig())), "base": "abc", "data": {"samples": 3, "counted": "d"}}
RUN |= {"strategy": "deepspeed_stage_1", "world_size": 1, "precision": "bf16"}


@dataclass(frozen=True)
class Specimen:
    """file is the one that is broken, of those that write_all wrote; use(folder) gives it to whom it is for; mutations
    are those that its format allows, besides what may happen to any bytes."""

    file: str
    use: Callable[[Path], object]
    mutations: tuple[m.Mutation, ...] = ()
    count: int = 60  # mutants that are tried


def write_all(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Write every file of SPECIMENS, whole, over the state dict of a tiny model of one layer."""
    torch.manual_seed(0)
    save_model(folder / "model.pth", state)
    half = {key: tensor.bfloat16() for key, tensor in state.items()}
    torch.save(half, folder / "saved.pth")
    torch.save(half, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    convert.main([str(folder / "model.pth"), str(folder / "model.st")])
    convert.main([str(folder / "model.pth"), str(folder / "hf")])
    channels = state["emb.weight"].shape[1]
    bone = {f"{LAYER}.bone": torch.randn(channels // 4, 4, 4), "blocks.0.ln1.weight": torch.randn(channels)}
    save_adapter(folder / "adapter.safetensors", bone, AdapterMetadata("bat-in", rank=4))
    torch.save(bone, folder / "bone.pth")
    lora = {f"{LAYER}.lora_A": torch.randn(4, channels), f"{LAYER}.lora_B": torch.randn(channels, 4)}
    torch.save(lora, folder / "lora.pth")
    for kind, tensors, settings in (
        ("bone", {"bone_block": torch.randn(4, channels)}, {"init_weights": True}),
        ("lora", {"lora_A.weight": lora[f"{LAYER}.lora_A"], "lora_B.weight": lora[f"{LAYER}.lora_B"]}, {}),
    ):
        named = {f"base_model.model.{LAYER}.{name}": tensor for name, tensor in tensors.items()}
        settings |= {"peft_type": kind.upper(), "r": 4, "lora_alpha": 8, "target_modules": ["key"]}
        (folder / kind).mkdir()
        (folder / kind / "adapter_config.json").write_text(json.dumps(settings))
        specs = {key: TensorSpec.of(tensor) for key, tensor in named.items()}
        write_safetensors(folder / kind / "adapter_model.safetensors", specs, named.items())
    heads, size = state["blocks.0.att.time_faaaa"].shape
    save_model(folder / "state.pth", {layer_keys(0).wkv: torch.randn(heads, size, size)})
    convert.main([str(folder / "state.pth"), str(folder / "state.st")])
    with BinidxWriter(folder / "data", mask=True) as writer:
        for length in (3, 1, 7):
            writer.add(range(length), [1] + [0] * (length - 1))
    (folder / "rows.jsonl").write_bytes(LINES)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(LINES * 20, mtime=0))
    (folder / "rows.json").write_text(json.dumps([ROW] * 3))
    (folder / "rows.csv").write_text('query,response,note\n"one ""a""\n2",b,ü\n' + "a,b,\n" * 5)
    (folder / "rows.txt").write_text("Words.\n\nMore words: ü, 字.\n" * 5)
    (folder / "template.txt").write_text("Q: {text} A:[[ {text}]]")
    (folder / "world.txt").write_text("1 'a' 1\n2 'ab' 2\n3 b'\\xff' 1\n4 ' ' 1\n")
    (folder / "tokenizer.json").write_text(json.dumps(json_tokenizer()))
    (folder / "prompts.jsonl").write_text('{"prompt": "ab", "id": [1, {"x": 2}]}\n{"prompt": "b"}\n')
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": 2.5, "lr": 0.1}}\n' for i in range(5)))
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    run = RUN | {"step": 3, "samples_seen": 3, "trained": ["a"], "files": {}}
    (folder / "checkpoints" / "step-00000003" / "state.json").write_text(json.dumps(run))
    (folder / "flag.json").write_text('{"bone_mode": "bat", "bone_load": "", "bone_r": 64}')
    try:
        from pyarrow import Table, parquet
    except ImportError:
        return
    parquet.write_table(Table.from_pylist([{"text": "one"}, {"text": "two"}]), folder / "rows.parquet")


def json_tokenizer() -> dict[str, object]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "ab": 1, "[UNK]": 2}, "unk_token": "[UNK]"},
    }


def model_read(name):
    def use(folder):
        base = open_base(folder / name)
        return base.fingerprint, base.linear_shapes, base.family.load(base.tensors, base.config)

    return use


def converted(name, target, *flags):
    return lambda folder: convert.main([str(folder / name), str(folder / "out" / target), *flags])


def merged(base, adapter, *flags):
    words = ["--base_model", base, "--bone_checkpoint", adapter]

    def use(folder):
        paths = [word if word.startswith("--") else str(folder / word) for word in words]
        return merge_command.main([*paths, *flags, "--output", str(folder / "out" / "merged.pth")])

    return use


def folder_renamed(folder):
    pytest.importorskip("peft")
    from rwkv_peft.hf import folders

    return folders.main([str(folder / "bone"), str(folder / "out" / "miss")])


def states_read(name):
    def use(folder):
        read_state_file(folder / name, load_model(folder / "model.pth")[0])
        converted(name, "state.st")(folder)

    return use


def tokens_read(folder):
    dataset = BinidxDataset(folder / "data")
    dataset.check_vocab(300)
    return describe(dataset), [dataset[index] for index in range(len(dataset))]


def rows_read(name, *flags):
    words = ["--tokenizer", "bytes", "--workers", "1", "--overwrite", *flags]
    return lambda folder: preprocess.main([str(folder / name), "--output", str(folder / "out" / "rows"), *words])


def template_read(folder):
    return rows_read("rows.jsonl", "--template", str(folder / "template.txt"), "--skip_bad_rows")(folder)


def tokenizer_read(name):
    def use(folder):
        tokenizer = load_tokenizer(str(folder / name))
        return tokenizer.decode(tokenizer.encode("ab a")), tokenizer.vocab_size, tokenizer.end_id

    return use


def prompts_read(folder):
    tokenizer = load_tokenizer("bytes")
    for number, row in enumerate(read_prompt_file(folder / "prompts.jsonl")):
        encode(tokenizer, row["prompt"], number)
        show(Continuation(row, tokenizer, []).line())


def metrics_read(folder):
    records = read_metrics(folder / "metrics.jsonl")
    return series(records, "loss"), series(records, "val_loss")


def curve_drawn(folder):
    plot_loss(folder / "metrics.jsonl", folder / "out" / "loss.png")


def checkpoint_read(folder):
    return read_run_state(list_checkpoints(folder)[0], RUN)


def flag_read(folder):
    flag, _, keys, _ = next(entry for entry in JSON_FLAGS if entry[0] == "bone_config")
    return parse_json_flag(flag, (folder / "flag.json").read_bytes().decode(errors="surrogateescape"), keys)


IN_PTH = (*map(m.in_pickle, m.PICKLE), m.without_a_record, *[m.other_tensor] * 4)
IN_SAFETENSORS = (*map(m.in_safetensors_header, (*m.JSON, m.other_value)), m.other_dtype)
IN_METADATA = tuple(m.in_metadata(METADATA_KEY, mutation) for mutation in (*m.JSON, m.other_value))
IN_LINES = tuple(m.in_one_line(mutation) for mutation in (*m.JSON, m.other_value, m.flipped))
SPECIMENS = (
    Specimen("model.pth", model_read("model.pth"), IN_PTH, 150),
    Specimen("saved.pth", converted("saved.pth", "model.st"), IN_PTH, 100),
    Specimen("legacy.pth", model_read("legacy.pth"), (*m.PICKLE[-3:], m.other_tensor), 100),
    Specimen("model.st", converted("model.st", "model.pth"), IN_SAFETENSORS),
    Specimen("hf/model.safetensors", converted("hf", "model.pth"), IN_SAFETENSORS),
    Specimen("adapter.safetensors", converted("adapter.safetensors", "a.pth"), IN_SAFETENSORS + IN_METADATA, 120),
    Specimen("adapter.safetensors", merged("model.pth", "adapter.safetensors"), IN_SAFETENSORS + IN_METADATA, 120),
    Specimen("bone.pth", converted("bone.pth", "a.safetensors", "--bone_mode", "bat-in"), IN_PTH, 120),
    Specimen("bone.pth", merged("model.pth", "bone.pth", "--bone_mode", "bat-in"), IN_PTH),
    Specimen("lora.pth", converted("lora.pth", "a.safetensors", "--lora_alpha", "8"), IN_PTH),
    Specimen("bone/adapter_config.json", converted("bone", "a.safetensors"), m.JSON),
    Specimen("bone/adapter_model.safetensors", converted("bone", "a.safetensors"), IN_SAFETENSORS),
    Specimen("bone/adapter_config.json", folder_renamed, m.JSON),
    Specimen("bone/adapter_model.safetensors", folder_renamed, IN_SAFETENSORS),
    Specimen("lora/adapter_config.json", converted("lora", "a.safetensors"), m.JSON),
    Specimen("state.pth", states_read("state.pth"), IN_PTH),
    Specimen("state.st", converted("state.st", "state.pth"), IN_SAFETENSORS),
    Specimen("data.idx", tokens_read, count=120),
    Specimen("data.bin", tokens_read),
    Specimen("data.mask", tokens_read, count=20),
    Specimen("rows.jsonl", rows_read("rows.jsonl"), IN_LINES, 100),
    Specimen("rows.jsonl", rows_read("rows.jsonl", "--skip_bad_rows"), IN_LINES, 40),
    Specimen("rows.jsonl.gz", rows_read("rows.jsonl.gz"), count=100),
    Specimen("rows.json", rows_read("rows.json"), m.JSON),
    Specimen("rows.csv", rows_read("rows.csv"), count=40),
    Specimen("rows.csv", rows_read("rows.csv", "--skip_bad_rows"), count=40),
    Specimen("rows.txt", rows_read("rows.txt"), count=30),
    Specimen("rows.parquet", rows_read("rows.parquet")),
    Specimen("template.txt", template_read, count=30),
    Specimen("world.txt", tokenizer_read("world.txt")),
    Specimen("tokenizer.json", tokenizer_read("tokenizer.json"), m.JSON * 3, 80),
    Specimen("prompts.jsonl", prompts_read, IN_LINES),
    Specimen("metrics.jsonl", metrics_read, IN_LINES),
    Specimen("metrics.jsonl", curve_drawn, IN_LINES[:2], 15),
    Specimen("checkpoints/step-00000003/state.json", checkpoint_read, m.JSON),
    Specimen("flag.json", flag_read, m.JSON),
)
