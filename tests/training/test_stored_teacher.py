"""--store_teacher and --teacher_logprobs by the commands that a user types: a run learns from the file as it would from
the teacher, and refuses one of other rows, tokens or settings."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from families import DISTINCT
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.batches import EvalBatches
from rwkv_peft.data.recorded import Vocabulary
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.data.sources import build_samples
from rwkv_peft.objectives.distill import Distill
from rwkv_peft.training.flags.request import parse_flags, parse_run
from rwkv_peft.training.inputs import find_inputs
from rwkv_peft.training.step.steps import Whole
from rwkv_peft.training.step.teacher import ENTRY, StoredTeacher, documents_of, make_teacher, open_stored
from rwkv_peft.training.storing import store
from training.runs import finish, metrics, start
from training.test_distill import write_model

FLAGS = ("--objective", "distill", "--random_seed", "1", "--precision", "fp32", "--val_split", "0.2")
PADDED, PACKED = ("--dataload", "pad", "--micro_bsz", "2"), ("--dataload", "pack", "--micro_bsz", "1")


@pytest.fixture(scope="module")
def teacher(files):
    return str(write_model(files / "teacher.pth", DISTINCT[1]))


@pytest.fixture(scope="module")
def stored(files, command, teacher):
    """A file of all that the teacher says: all tokens but one, and that as the class of all others."""
    path = str(files / "said.safetensors")
    more = ("--teacher_model", teacher, "--store_teacher", path, "--teacher_top_k", "99")
    out, _ = finish(start(command("unwritten", *FLAGS, *PADDED, *more)))
    assert f"wrote {path}: 79 tokens at each of 960 places of 40 documents" in out and "of the probability" in out
    assert not (files / "unwritten").exists()
    return path


def test_a_run_learns_the_same_from_what_is_stored(files, command, teacher, stored):
    """Also if rows are packed, which were padded when their teacher read them. It goes on with the same file alone."""
    for name, *word in (("taught", "--teacher_model", teacher), ("told", "--teacher_logprobs", stored)):
        out, _ = finish(start(command(name, *FLAGS, *PACKED, *word)))
    assert f"teacher   79 tokens at each place, stored in {stored}, as teacher.pth says them; " in out
    for told, taught in zip(metrics(files, "told"), metrics(files, "taught"), strict=True):
        for number in ("loss", "kl", "nll", *(("val_kl",) if "val_kl" in taught else ())):
            assert told[number] == pytest.approx(taught[number], rel=1e-4), (told["step"], number)
    other = str(files / "other.safetensors")
    with safe_open(stored, "pt") as file:
        source = json.loads(file.metadata()[ENTRY])
    save_file(load_file(stored), other, {ENTRY: json.dumps(source | {"fingerprint": "another"})})
    flags = (*FLAGS, *PACKED, "--resume", "--epoch_count", "3", "--teacher_logprobs")
    assert find_inputs(parse_run(command("told", *flags, stored)[2:])).plan.first_step == 8
    with pytest.raises(UserError, match="has teacher .*give the first run's flags"):
        find_inputs(parse_run(command("told", *flags, other)[2:]))


def test_files_of_other_rows_are_refused(files, command, stored, tmp_path):
    def refused(*more, words):
        with pytest.raises(UserError, match=words):
            find_inputs(parse_run(command("unread", *FLAGS, "--teacher_logprobs", stored, *more)[2:]))

    refused(*PADDED, "--ctx_len", "23", words="says nothing of sample 1 of 32 of .*data.bin: its tokens, or those that")
    refused("--dataload", "get", words="says nothing of sample 1 of ")
    with ShardWriter(tmp_path / "data", vocab_size=80) as writer:
        writer.add([5, 4, 3, 2, 1] * 3)
        writer.add([1, 2, 3, 4, 5] * 3)
    refused(
        *PADDED, "--val_split", "0", "--data_file", str(tmp_path / "data"), words="sample 1 of 2 of .*data.bin: its"
    )
    refused(
        *PADDED, "--distill_temperature", "2", words="--distill_temperature 2: .* holds probabilities at 1, because"
    )
    with pytest.raises(UserError, match="is of a vocabulary of 80 tokens, and the student's has 81; a teacher speaks"):
        open_stored(Distill(stored=stored), 81)
    assert not (files / "unread").exists()


def test_files_of_another_tokenizer_and_damaged_ones_are_refused(stored, tmp_path):
    tensors, (path, other) = load_file(stored), (str(tmp_path / f"{name}.safetensors") for name in "ab")
    with safe_open(stored, "pt") as file:
        source = json.loads(file.metadata()[ENTRY])
    save_file(tensors, path, {ENTRY: json.dumps(source | {"tokenizer": "00"})})
    with pytest.raises(UserError, match=r"in another tokenizer's tokens than bytes \(80 tokens, 01\); write it"):
        StoredTeacher(path).require_rows(Vocabulary("bytes", "01", 80), [])
    for damage in (
        {"words": tensors["words"] + 1},
        {"logprobs": tensors["logprobs"][:, 1:].contiguous()},
        {"logprobs": tensors["logprobs"] / 0},
        {"bounds": tensors["bounds"] + 1},
        {"bounds": tensors["bounds"].flip(0)},
        {"keys": tensors["keys"][0]},
    ):
        save_file(tensors | damage, other, {ENTRY: json.dumps(source)})
        with pytest.raises(UserError, match="b.safetensors is no whole file of .* copy it, or write it anew with"):
            StoredTeacher(other)
    for entries in ({}, {ENTRY: "{}"}, {ENTRY: "]"}, {ENTRY: "[" * 9999}, {ENTRY: json.dumps(source | {"left": []})}):
        save_file(tensors, other, entries)
        with pytest.raises(UserError, match="b.safetensors is no whole file of --store_teacher "):
            StoredTeacher(other)
    shutil.copy(stored, other)
    os.truncate(other, 1000)
    with pytest.raises(UserError, match="b.safetensors is no whole file of --store_teacher "):
        StoredTeacher(other)


def test_a_document_has_one_key_however_it_is_read(files):
    """But another one if other tokens of it count."""
    flags = ["--load_model", str(files / "base.pth"), "--data_file", str(files / "data"), "--bone_r", "16"]
    keys = []
    for layout in (PADDED, PACKED):
        data = parse_flags([*flags, "--ctx_len", "24", *layout]).data
        samples = build_samples(data, 80)
        rows = [samples[n] for n in range(len(samples))]
        keys.append(
            {key for first in range(0, len(rows), 3) for key, _ in documents_of(samples.collate(rows[first:][:3]))}
        )
    assert keys[0] == keys[1] and len(keys[0]) == 40
    batch = samples.collate(rows[:1])
    (whole, place), *_ = documents_of(batch)
    fewer = batch | {"counted": batch["counted"][1:]}
    (less, other), *_ = documents_of(fewer)
    assert less != whole and (place.stop, other.stop) == (24, 23)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--teacher_logprobs", "a", "--teacher_model", "b"), "teacher_logprobs a does not go with --teacher_model b"),
        (("--teacher_logprobs", "a", "--store_teacher", "b"), "does not go with --store_teacher b: it holds a "),
        (("--teacher_logprobs", "a", "--data_type", "prompts"), "the student's answers are not known before it draws"),
        (("--store_teacher", "a", "--teacher_model", "b", "--data_type", "prompts"), "does not go with --data_type pr"),
        (("--teacher_logprobs", "a", "--teacher_top_k", "8"), "--teacher_top_k 8 needs --store_teacher"),
        (("--teacher_logprobs", "a", "--context_parallel", "2", "--devices", "2"), "a rank reads a part of each row"),
        (("--objective", "next_token", "--teacher_logprobs", "a"), "--teacher_logprobs a needs --objective distill"),
        (("--teacher_logprobs", "none.safetensors"), "none.safetensors does not exist"),
    ],
)
def test_flags_that_do_not_go_together(files, flags, message):
    of_run = ["--load_model", str(files / "base.pth"), "--data_file", str(files / "data"), "--objective", "distill"]
    with pytest.raises(UserError, match=message):
        find_inputs(parse_run([*of_run, "--bone_r", "16", "--lr_init", "1e-3", *flags]))


def test_a_file_that_would_be_lost_or_misnamed_is_refused(files, command, teacher):
    for name, words in (
        (teacher, "is the file given as --teacher_model"),
        (str(files / "a.pt"), "a name that ends in .sa"),
    ):
        more = ("--teacher_model", teacher, "--store_teacher", name)
        with pytest.raises(UserError, match=words):
            store(parse_run(command("unwritten", *FLAGS, *PADDED, *more)[2:]), print)


def test_a_document_of_contexts_is_found_by_what_the_teacher_reads():
    own = {"tokens": torch.tensor([[7, 8]]), "counted": torch.tensor([1]), "cu_seqlens": torch.tensor([0, 2])}
    seen = {"tokens": torch.tensor([[1, 7, 8]]), "counted": torch.tensor([2]), "cu_seqlens": torch.tensor([0, 3])}
    behind = own | {f"teacher_{name}": tensor for name, tensor in seen.items()}
    assert list(documents_of(behind)) == list(documents_of(seen)) != list(documents_of(own))


@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_the_base_stores_its_word_on_rows_with_contexts(tmp_path, family):
    """And the divergence from that is the one from the base itself."""
    base, path = write_model(tmp_path / "base.pth", family, vocab_size=257), str(tmp_path / "said.safetensors")
    rows = ({"context": "AB" * (1 + i % 3), "question": f"{i}?", "answer": f"{i % 3}!"} for i in range(8))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--load_model", str(base), "--data_file", str(tmp_path / "rows.jsonl"), "--data_type", "contexts"]
    flags += ["--tokenizer", "bytes", "--ctx_len", "64", "--precision", "fp32", "--bone_r", "16", "--lr_init", "1e-3"]
    store(
        parse_run([*flags, "--store_teacher", path, "--teacher_top_k", "256", "--micro_bsz", "3"]), lambda *_, **__: 0
    )
    inputs = find_inputs(parse_run([*flags, "--teacher_logprobs", path]))
    model = make_teacher(inputs.base, inputs.config, torch.device("cpu"))
    told = Whole(inputs.config.objective, stored=inputs.stored.lookup)
    for batch in EvalBatches(inputs.samples, 4):
        loss = told.total(model, told.prepare_inputs(batch, torch.device("cpu")))
        torch.testing.assert_close(loss, Whole(Distill()).total(model, batch), rtol=1e-3, atol=1e-6)
        assert loss > 1e-3
