"""Files of every kind that a user may give, each with the command or reader that it is for, and how it may break."""

import datetime
import gzip
import json
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fuzz import mutations as m
from rwkv_peft.checkpoints.adapter_file import METADATA_KEY, AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.adapter_folders import FORM
from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.checkpoints.tensors import TensorSpec, write_safetensors
from rwkv_peft.config import AdapterConfig, TrainConfig, to_json
from rwkv_peft.data import preprocess
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.data.recorded import read_record, remarks
from rwkv_peft.data.report import describe
from rwkv_peft.data.rows import held_out_split
from rwkv_peft.data.token_file_writer import TokenFileWriter
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.inference.chat import show
from rwkv_peft.inference.loading import load_model, read_state_file
from rwkv_peft.inference.prompts import encode, read_prompt_file
from rwkv_peft.inference.text import Continuation
from rwkv_peft.plots import read_metrics, series
from rwkv_peft.release import convert, merge_command
from rwkv_peft.training.flags.adapter import json_flags, parse_json_flag
from rwkv_peft.training.flags.parser import parser_of_train
from rwkv_peft.training.flags.settings_file import expanded
from rwkv_peft.training.inputs import make_plan
from rwkv_peft.training.rates import with_first_rates
from rwkv_peft.training.saving.checkpoints import list_checkpoints, write_state
from rwkv_peft.training.saving.resume import Lowest, forget_rest, history, read_run_state, validated_from
from rwkv_peft.training.step.plan import Plan

LAYER = "blocks.0.att.key"
ROW = {
    "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
    "weights": [1, 0.5, None],
}
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in [ROW, {"text": "one two"}] * 4)
RUN = {"adapter": json.loads(to_json(AdapterConfig())), "base": "abc", "data": {"samples": 3, "counted": "d"}}
RUN |= {"objective": "next_token", "teacher": "", "optim": "adamw"}
RUN |= {"strategy": "deepspeed_stage_1", "world_size": 1, "precision": "bf16"}
CHECKPOINT = "checkpoints/step-00000003"


@dataclass(frozen=True)
class Specimen:
    """file: the one to break, among those that write_all wrote; use(folder): passes it to its command or reader;
    mutations: those of its format, besides those of any bytes."""

    file: str
    use: Callable[[Path], object]
    mutations: tuple[m.Mutation, ...] = ()
    count: int = 60  # mutants that are tried


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
    words = ["--tokenizer", "bytes", "--overwrite", *flags]
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


def checkpoint_read(folder):
    """Read a checkpoint as a resumed run does."""
    now = RUN | {"validated_from": 0}
    state = read_run_state(list_checkpoints(folder)[0], now)
    train = with_first_rates(TrainConfig(lr_init=0.1, lr_final=0.1, lr_chosen=("lr_init", "lr_final")), state)
    plan = make_plan(train, range(9), 2, state)
    trained = sorted({*map(str, state["trained"])} ^ {"a"})
    return validated_from(plan, state, "v"), trained, f"{plan.first_step:,}"


def history_read(folder):
    plan = Plan(step_samples=1, epoch_steps=9, total_steps=9, first_step=3, first_sample=3)
    Lowest(history(folder / "metrics.jsonl", plan))
    forget_rest(folder / "metrics.jsonl", plan)


def vocabulary_read(folder):
    return remarks(read_record(folder / "config.json"), read_record(folder / "config.json"), 80)


def settings_read(folder):
    return expanded(["--config", str(folder / "run.yaml")], parser_of_train())


def flag_read(folder):
    flag, _, keys = next(entry for entry in json_flags("bone") if entry[0] == "bone_config")
    return parse_json_flag(flag, (folder / "flag.json").read_bytes().decode(errors="surrogateescape"), keys)


# --- whole files


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
    save_model(folder / "state.pth", {"blocks.0.att.time_state": torch.randn(heads, size, size)})
    convert.main([str(folder / "state.pth"), str(folder / "state.st")])
    with TokenFileWriter(folder / "data") as writer:
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
    (folder / CHECKPOINT).mkdir(parents=True)
    (folder / CHECKPOINT / "optimizer").mkdir()
    run = RUN | {"step": 3, "samples_seen": 3, "trained": ["a"], "groups": [["a"]], "validated_from": 0}
    run |= {"files": {"optimizer/a": {"bytes": 1, "crc32": "0"}}, "validation": "v"}
    run["config"] = {"train": asdict(TrainConfig(lr_init=0.1, lr_final=0.1))}
    (folder / CHECKPOINT / "optimizer" / "a").write_text("a")
    write_state(folder / CHECKPOINT / "state.json", run)
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


# --- what is tried

IN_PTH = (*map(m.in_pickle, m.PICKLE), m.without_a_record, *[m.other_tensor] * 4)
IN_SAFETENSORS = (*map(m.in_safetensors_header, (*m.JSON, m.other_value)), m.other_dtype)
IN_METADATA = tuple(m.in_metadata(METADATA_KEY, mutation) for mutation in (*m.JSON, m.other_value))
IN_LINES = tuple(m.in_one_line(mutation) for mutation in (*m.JSON, m.other_value, m.flipped))
SPECIMENS = (
    Specimen("model.pth", model_read("model.pth"), IN_PTH, 150),
    Specimen("saved.pth", converted("saved.pth", "model.st"), IN_PTH, 100),
    Specimen("model.st", converted("model.st", "model.pth"), IN_SAFETENSORS),
    Specimen("hf/model.safetensors", converted("hf", "model.pth"), IN_SAFETENSORS),
    Specimen("adapter.safetensors", converted("adapter.safetensors", "a.pth"), IN_SAFETENSORS + IN_METADATA, 100),
    Specimen("adapter.safetensors", merged("model.pth", "adapter.safetensors"), IN_SAFETENSORS + IN_METADATA, 100),
    Specimen("bone.pth", converted("bone.pth", "a.safetensors", "--bone_mode", "bat-in"), IN_PTH, 120),
    Specimen("lora.pth", converted("lora.pth", "a.safetensors", "--lora_alpha", "8"), IN_PTH),
    Specimen("bone/adapter_config.json", converted("bone", "a.safetensors"), m.JSON),
    Specimen("bone/adapter_model.safetensors", converted("bone", "a.safetensors"), IN_SAFETENSORS),
    Specimen("lora/adapter_config.json", converted("lora", "a.safetensors"), m.JSON),
    Specimen("miss/adapter.json", converted("miss", "a.safetensors"), m.JSON, 20),
    Specimen("state.pth", states_read("state.pth"), IN_PTH),
    Specimen("state.st", converted("state.st", "state.pth"), IN_SAFETENSORS),
    Specimen("data.idx", tokens_read, count=120),
    Specimen("data.bin", tokens_read),
    Specimen("data.mask", tokens_read, count=20),
    Specimen("data.weights", tokens_read, count=20),
    Specimen("rows.jsonl", rows_read("rows.jsonl"), IN_LINES, 80),
    Specimen("rows.jsonl.gz", rows_read("rows.jsonl.gz"), count=100),
    Specimen("rows.json", rows_read("rows.json"), m.JSON),
    Specimen("rows.csv", rows_read("rows.csv"), count=20),
    Specimen("rows.txt", rows_read("rows.txt"), count=30),
    Specimen("rows.parquet", rows_read("rows.parquet")),
    Specimen("chats.parquet", rows_read("chats.parquet", "--skip_bad_rows"), count=20),
    Specimen("saved/state.json", rows_read("saved"), m.JSON, 20),
    Specimen("saved/data.arrow", rows_read("saved"), count=30),
    Specimen("template.txt", template_read, count=30),
    Specimen("world.txt", tokenizer_read("world.txt"), (m.in_one_line(m.odd_literal),) * 2),
    Specimen("unigram.json", tokenizer_read("unigram.json"), m.JSON * 3, 30),
    Specimen("tokenizer.json", tokenizer_read("tokenizer.json"), m.JSON * 3, 80),
    Specimen("prompts.jsonl", prompts_read, IN_LINES),
    Specimen("metrics.jsonl", metrics_read, IN_LINES),
    Specimen("metrics.jsonl", history_read, IN_LINES),
    Specimen("config.json", vocabulary_read, m.JSON, 30),
    Specimen("flag.json", flag_read, m.JSON),
    Specimen(f"{CHECKPOINT}/state.json", checkpoint_read, m.JSON, 30),
    Specimen("run.yaml", settings_read, (m.odd_yaml,) * 20, 60),
    Specimen("splits/dataset_dict.json", lambda folder: held_out_split(folder / "splits"), m.JSON, 40),
)
