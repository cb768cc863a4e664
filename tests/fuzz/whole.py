"""Whole files of every kind that a user may give."""

import datetime
import gzip
import json
import struct
from dataclasses import asdict
from pathlib import Path

import torch

from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.adapter_folders import FORM
from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.checkpoints.tensors import TensorSpec, write_safetensors
from rwkv_peft.config import AdapterConfig, TrainConfig, to_json
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.models.state import time_state_key
from rwkv_peft.objectives.divergence import Stored
from rwkv_peft.release import convert
from rwkv_peft.training.saving.checkpoints import write_state
from rwkv_peft.training.step.teacher import Source, write_stored

LAYER = "blocks.0.att.key"
ROW = {
    "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
    "weights": [1, 0.5, None],
}
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in [ROW, {"text": "one two"}] * 4)
COMPARED = "bone-0.001-7"  # a run of a comparison
RUN = {"adapter": json.loads(to_json(AdapterConfig())), "base": "abc", "data": {"samples": 3, "counted": "d"}}
RUN |= {"objective": "next_token", "teacher": "", "optim": "adamw"}
RUN |= {"strategy": "deepspeed_stage_1", "world_size": 1, "precision": "bf16"}
CHECKPOINT = "checkpoints/step-00000003"


def write_all(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Write every file of SPECIMENS over the state dict of a tiny model of one layer."""
    torch.manual_seed(0)
    save_model(folder / "model.pth", state)
    half = {key: tensor.bfloat16() for key, tensor in state.items()}
    torch.save(half, folder / "saved.pth")
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
    (folder / "miss").mkdir()
    save_model(folder / "miss" / "adapter.pth", {f"{LAYER}.weight.D": torch.randn(channels, 4)})
    (folder / "miss" / "adapter.json").write_text(json.dumps(dict(FORM) | {"rank": 4, "scale": 0.5}))
    heads, size = state["blocks.0.att.time_faaaa"].shape
    save_model(folder / "state.pth", {time_state_key(0): torch.randn(heads, size, size)})
    convert.main([str(folder / "state.pth"), str(folder / "state.st")])
    with ShardWriter(folder / "data") as writer:
        for length in (3, 1, 7):
            writer.add(range(length), [1] + [0] * (length - 1))
    (folder / "data.weights").write_bytes(struct.pack("<3f", 1.0, 0.5, 2.0))
    (folder / "rows.jsonl").write_bytes(LINES)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(LINES * 20, mtime=0))
    (folder / "rows.json").write_text(json.dumps([ROW] * 3))
    (folder / "rows.csv").write_text('query,response,note\n"one ""a""\n2",b,ü\n' + "a,b,\n" * 5)
    (folder / "rows.txt").write_text("Words.\n\nMore words: ü, 字.\n" * 5)
    (folder / "template.txt").write_text("Q: {text} A:[[ {text}]]")
    (folder / "world.txt").write_text("1 'a' 1\n2 'ab' 2\n3 b'\\xff' 1\n4 ' ' 1\n")
    (folder / "tokenizer.json").write_text(json.dumps(json_tokenizer()))
    unigram = {"type": "Unigram", "vocab": [["a", -1.0], ["ab", -2.0], [" ", -2.0]], "unk_id": 0}
    (folder / "unigram.json").write_text(json.dumps(json_tokenizer() | {"pre_tokenizer": None, "model": unigram}))
    (folder / "prompts.jsonl").write_text('{"prompt": "ab", "id": [1, {"x": 2}]}\n{"prompt": "b"}\n')
    done = {"loss": 2.5, "val_loss": 2, "retain_loss": 3.5, "lr": 0.1, "tokens": 32, "tokens_per_s": 64.0}
    lines = "".join(json.dumps({"step": i, "samples": i + 1} | done) + "\n" for i in range(5))
    (folder / "metrics.jsonl").write_text(lines)
    compared = {"method": "bone", "rate": -6, "seed": 7, "diverged": False, "peak_mb": 500.0}
    (folder / COMPARED).mkdir()
    (folder / COMPARED / "result.json").write_text(json.dumps(compared))
    (folder / COMPARED / "metrics.jsonl").write_text(lines)
    (folder / CHECKPOINT).mkdir(parents=True)
    (folder / CHECKPOINT / "optimizer").mkdir()
    run = RUN | {"step": 3, "samples_seen": 3, "trained": ["a"], "groups": [["a"]], "validated_from": 0}
    run |= {"files": {"optimizer/a": {"bytes": 1, "crc32": "0"}}, "validation": "v"}
    run["config"] = {"train": asdict(TrainConfig(lr_init=0.1, lr_final=0.1))}
    (folder / CHECKPOINT / "optimizer" / "a").write_text("a")
    write_state(folder / CHECKPOINT / "state.json", run)
    said = {bytes([size]) * 16: Stored(torch.ones(size, 4).int(), -torch.ones(size, 5)) for size in (2, 3)}
    write_stored(folder / "said.safetensors", said, Source("t.pth", "abc", "", 257, 1.0, 0.1))
    (folder / "run.yaml").write_text("bone_r: 8\nlr_init: 5e-6\ntrain_parts: [time, ln]\nlora_config: {lora_r: 4}\n")
    vocabulary = {"name": "bytes", "hash": "abc", "size": 257}
    (folder / "config.json").write_text(json.dumps({"train": {"lr_init": 1}, "vocabulary": vocabulary}))
    (folder / "flag.json").write_text('{"bone_mode": "bat", "bone_load": "", "bone_r": 64}')
    try:
        from pyarrow import Table, ipc, parquet
    except ImportError:
        return
    parquet.write_table(Table.from_pylist([{"text": "one"}, {"text": "two"}]), folder / "rows.parquet")
    rows = Table.from_pylist([ROW | {"at": datetime.datetime(2026, 1, 1)}] * 3)
    parquet.write_table(rows, folder / "chats.parquet")
    (folder / "saved").mkdir()
    with ipc.new_stream(str(folder / "saved" / "data.arrow"), rows.schema) as stream:
        stream.write_table(rows)
    state = {"_data_files": [{"filename": "data.arrow"}], "_format_columns": None, "_split": "train"}
    (folder / "saved" / "state.json").write_text(json.dumps(state))
    (folder / "splits").mkdir()
    (folder / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


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
