"""Files of every kind that a user may give, each with the command or reader that it is for, and how it may break."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz import mutations as m
from fuzz import pickles
from fuzz.whole import CHECKPOINT, COMPARED, RUN
from rwkv_peft.checkpoints.adapter_file import METADATA_KEY
from rwkv_peft.checkpoints.base import open_base
from rwkv_peft.config import TrainConfig
from rwkv_peft.data import preprocess
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.data.recorded import read_record, remarks
from rwkv_peft.data.report import describe
from rwkv_peft.data.rows import held_out_split
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.inference.chat import show
from rwkv_peft.inference.loading import load_model, read_state_file
from rwkv_peft.inference.prompts import encode, read_prompt_file
from rwkv_peft.inference.text import Continuation
from rwkv_peft.objectives.distill import Distill
from rwkv_peft.plots import plot_loss, read_metrics, series
from rwkv_peft.release import convert
from rwkv_peft.release import merge as merge_command
from rwkv_peft.tools.compare.report import rows_of, table
from rwkv_peft.tools.compare.runs import read_outcome
from rwkv_peft.tools.compare.sweep import Size
from rwkv_peft.training.flags.adapter import json_flags, parse_json_flag
from rwkv_peft.training.flags.parser import parser_of_train
from rwkv_peft.training.flags.settings_file import expanded
from rwkv_peft.training.inputs import make_plan
from rwkv_peft.training.rates import with_first_rates
from rwkv_peft.training.saving.checkpoints import list_checkpoints
from rwkv_peft.training.saving.resume import Lowest, forget_rest, history, read_run_state, validated_from
from rwkv_peft.training.step.plan import Plan
from rwkv_peft.training.step.teacher import ENTRY, StoredTeacher, open_stored


@dataclass(frozen=True)
class Specimen:
    """file: the one to break, among those that whole.write_all wrote; use(folder): passes it to its command or reader;
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


def outcome_read(folder):
    """Read an outcome as the table of a comparison does."""
    outcome = read_outcome(folder / COMPARED)
    rows = rows_of(["bone"], [outcome.cell.seed], {"bone": Size(8, 0, 100)}, {outcome.cell: outcome})
    return table(rows)


def curve_drawn(folder):
    plot_loss(folder / "metrics.jsonl", folder / "out" / "loss.png")


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


def stored_read(folder):
    found = StoredTeacher(str(folder / "said.safetensors"))
    for key, place in found.places.items():
        assert len(key) == 16 and len(found.words[place]) == len(found.logprobs[place]) == place.stop - place.start > 0
    return str(found), open_stored(Distill(stored=found.path), 257)


def settings_read(folder):
    return expanded(["--config", str(folder / "run.yaml")], parser_of_train())


def flag_read(folder):
    flag, _, keys = next(entry for entry in json_flags("bone") if entry[0] == "bone_config")
    return parse_json_flag(flag, (folder / "flag.json").read_bytes().decode(errors="surrogateescape"), keys)


IN_PTH = (*map(pickles.in_pickle, pickles.PICKLE), pickles.without_a_record, *[pickles.other_tensor] * 4)
IN_SAFETENSORS = (*map(m.in_safetensors_header, (*m.JSON, m.other_value)), m.other_dtype)
IN_METADATA = tuple(m.in_metadata(METADATA_KEY, mutation) for mutation in (*m.JSON, m.other_value))
IN_SAID = tuple(m.in_metadata(ENTRY, mutation) for mutation in (*m.JSON, m.other_value))
IN_LINES = tuple(m.in_one_line(mutation) for mutation in (*m.JSON, m.other_value, m.flipped))
SPECIMENS = (
    Specimen("model.pth", model_read("model.pth"), IN_PTH, 150),
    Specimen("saved.pth", converted("saved.pth", "model.st"), IN_PTH, 100),
    Specimen("model.st", converted("model.st", "model.pth"), IN_SAFETENSORS),
    Specimen("hf/model.safetensors", converted("hf", "model.pth"), IN_SAFETENSORS),
    Specimen("adapter.safetensors", converted("adapter.safetensors", "a.pth"), IN_SAFETENSORS + IN_METADATA, 100),
    Specimen("adapter.safetensors", merged("model.pth", "adapter.safetensors"), IN_SAFETENSORS + IN_METADATA, 100),
    Specimen("bone.pth", converted("bone.pth", "a.safetensors", "--bone_mode", "bat-in"), IN_PTH, 120),
    Specimen("bone.pth", merged("model.pth", "bone.pth", "--bone_mode", "bat-in"), IN_PTH),
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
    Specimen("rows.jsonl", rows_read("rows.jsonl", "--skip_bad_rows"), IN_LINES, 40),
    Specimen("rows.jsonl.gz", rows_read("rows.jsonl.gz"), count=100),
    Specimen("rows.json", rows_read("rows.json"), m.JSON),
    Specimen("rows.csv", rows_read("rows.csv"), count=20),
    Specimen("rows.csv", rows_read("rows.csv", "--skip_bad_rows"), count=20),
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
    Specimen(f"{COMPARED}/result.json", outcome_read, m.JSON, 30),
    Specimen(f"{COMPARED}/metrics.jsonl", outcome_read, IN_LINES, 30),
    Specimen("metrics.jsonl", curve_drawn, IN_LINES[:2], 15),
    Specimen("metrics.jsonl", history_read, IN_LINES),
    Specimen("config.json", vocabulary_read, m.JSON, 30),
    Specimen("flag.json", flag_read, m.JSON),
    Specimen(f"{CHECKPOINT}/state.json", checkpoint_read, m.JSON, 30),
    Specimen("said.safetensors", stored_read, IN_SAFETENSORS + IN_SAID, 60),
    Specimen("run.yaml", settings_read, (m.odd_yaml,) * 20, 60),
    Specimen("splits/dataset_dict.json", lambda folder: held_out_split(folder / "splits"), m.JSON, 40),
)
