"""`rwkv-peft plan`: its numbers agree with a run's, with its own limits, and with ZeRO's sharding."""

import re
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from rwkv_peft.cli.commands import main
from rwkv_peft.cli.errors import UserError
from rwkv_peft.tools.plan.command import (
    alternatives,
    changes,
    estimate_of,
    largest,
    largest_rows,
    largest_tokens,
    memory_size,
    parse_flags,
)
from rwkv_peft.training.estimate.memory import CPU, GPU, OPTIMIZER, peak, saved_epochs, written
from rwkv_peft.training.flags.request import open_request
from tools.plan.rehearsal import NEW, estimate


def size(parts, name):
    return sum(part.size for part in parts if part.name == name)


def test_a_base_is_planned_from_its_header(tmp_path, tiny_state, capsys):
    torch.save(tiny_state(dtype=torch.bfloat16), tmp_path / "base.pth")
    flags = ("--load_model", str(tmp_path / "base.pth"), "--bone_r", "16", "--ctx_len", "32", "--gpu", "2GiB")
    assert main(["plan", *flags, "--proj_dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    adapted = 2 * (7 * 64 * 16 + 96 * 16)  # bat-in: in x rank numbers a layer, ffn.value's in is 96
    total = sum(tensor.numel() for tensor in tiny_state().values()) + adapted
    assert f"16 layers adapted; trainable params: {adapted:,} || all params: {total:,}" in out
    assert (
        f"weights, frozen {(total - adapted) * 2 / 2**20:18.1f} MiB".split()
        == re.search("weights, frozen .*", out)[0].split()
    )
    for words in ("GPU of 2.00 GiB", "fits      --micro_bsz up to ", "--grad_cp 1 ", "disk "):
        assert words in out
    assert main(["plan", *flags[:2], "--train_type", "state", "--grad_cp", "1", "--ctx_len", "32"]) == 0
    assert "instead" in out and "instead" not in capsys.readouterr().out  # nothing else is smaller
    assert not (tmp_path / "out").exists()


def test_a_base_in_float64_is_refused(tmp_path, tiny_state):
    torch.save(tiny_state(dtype=torch.float64), tmp_path / "base.pth")
    with pytest.raises(UserError, match="emb.weight is float64; weights must be dense tensors of bfloat16, float16 or"):
        main(["plan", "--load_model", str(tmp_path / "base.pth"), "--bone_r", "16", "--ctx_len", "32"])


def test_tables_stay_in_their_file_until_they_train():
    plain, deep, whole = (
        estimate("--model_version", version, *more).parts(1, 128)
        for version, more in (("x070", ()), ("x070a", ()), ("x070a", ("--train_parts", "emb")))
    )
    beside, table = 1024 * 64 + 64 * 32 + 32 * 256 + 256, 80 * 1024  # numbers of a layer; s_emb_x is the first
    frozen = [size(parts, "weights, frozen") for parts in (plain, deep, whole)]
    assert frozen[1] - frozen[0] == 2 * 4 * beside
    trained = size(whole, "weights that train") - size(deep, "weights that train")
    assert trained == 2 * (80 * 64 + 4 * (table + 1024 * 64))
    assert size(deep, "tables, rows that are read") == 2 * 4 * table and not size(whole, "tables, rows that are read")


def test_what_does_not_fit_says_so_and_exits_with_1(capsys):
    assert main(["plan", *NEW, "--gpu", "600MiB"]) == 1
    out = capsys.readouterr().out
    assert "does not fit: 0.56 GiB can be used" in out and "--micro_bsz up to none at --ctx_len 128" in out


def test_a_pair_of_answers_is_two_rows():
    rows, pairs = estimate(), estimate("--data_type", "pairs")
    assert pairs.parts(3, 128) == rows.parts(6, 128)


def test_a_step_near_the_base_keeps_its_hidden_states():
    parts = estimate("--kl_to_base", "0.1").parts(2, 128)
    assert size(parts, "hidden states of the base") > 0 and not size(parts, "weights of the teacher")


def test_drawing_takes_states_and_logits_of_its_own():
    flags = "--data_type", "prompts", "--reward", "gsm8k", "--num_generations", "8", "--max_completion_length", "64"
    told, few = (estimate(*flags, *more).parts(2, 128) for more in ((), ("--draw_batch", "4")))
    for name in ("states of the answers that are drawn", "logits of drawing"):
        assert 4 * size(few, name) == size(told, name) > 0  # of 2 x 8 answers, and of 4
    rows = estimate("--dataload", "pack").parts(16, 64 + 64 // 8)  # a prompt is there once
    assert size(told, "activations") == size(rows, "activations")
    parts = estimate(*flags, "--learn_batch", "8").parts(2, 128)
    assert size(parts, "activations") < 0.6 * size(told, "activations") and size(parts, "gradients, summed over parts")


def test_states_take_memory_where_they_are_handed_on():
    segments = estimate("--train_type", "infctx", "--chunk_ctx", "64").parts(1, 128)
    assert size(segments, "states of the layers") > 0
    assert "states of the layers" not in {part.name for part in estimate().parts(1, 128)}


def test_ranks_that_share_rows_each_hold_a_part():
    machine = "--devices", "4"
    alone, shared = estimate(*machine).parts(1, 512), estimate(*machine, "--context_parallel", "4").parts(1, 512)
    assert shared[-5:] == estimate(*machine).parts(1, 128)[-5:]  # the parts that depend on the batch
    kept = size(shared, "gradients, before they are exchanged")
    assert kept == size(shared, "weights that train") and peak(shared, GPU) < peak(alone, GPU)
    assert "--context_parallel 4" in {change.flags for change in changes(estimate(*machine), 2 << 30)}


def test_the_largest_batch_and_context_fit_and_no_larger_ones():
    told = estimate()
    room = 2 * peak(told.parts(1, 128), GPU)
    rows, tokens = largest_rows(told, room), largest_tokens(told, room)
    assert peak(told.parts(rows, 128), GPU) <= room < peak(told.parts(rows + 1, 128), GPU)
    assert peak(told.parts(1, tokens), GPU) <= room < peak(told.parts(1, tokens + 64), GPU)
    assert largest(lambda number: number <= 37) == 37 and largest(lambda number: False) == 0


COMBINATIONS = (
    ("", "--compile"),
    ("", "--grad_cp 1"),
    ("--bone_r 64", "--bone_r 64 --quant nf4", "--peft lora", "--peft none", "--peft none --save_dtype fp32"),
    ("", "--dataload pack"),
    ("", "--eval_data questions.jsonl"),
    ("", "--strategy deepspeed_stage_3"),
)


@pytest.mark.parametrize("one", COMBINATIONS[0])
def test_train_takes_whatever_is_advised_together_with_the_flags_that_are_there(one, monkeypatch):
    """Every change, over each pair of flags; the memory that these take does not matter."""
    monkeypatch.setattr("rwkv_peft.tools.plan.command.largest_rows", lambda *_: 0)
    told = asked = 0
    for more in product(*COMBINATIONS[1:]):
        if sum(map(bool, (one, *more))) > 2:
            continue
        flags = [*NEW, *" ".join((one, *more)).split()]
        try:
            here = estimate_of(parse_flags(flags), GPU)
        except UserError:
            continue
        asked += 1
        for change in changes(here, 1 << 40):
            open_request(parse_flags([*flags, *change.flags.split()]))
            told += 1
    assert asked > 4 and told > asked


def test_an_adapter_that_does_not_fit_the_layers_is_not_advised(capsys):
    assert main(["plan", *NEW, "--dim_ffn", "224", "--peft", "none", "--gpu", "8GiB"]) == 0  # of which 64 is no divisor
    assert "--peft bone" not in capsys.readouterr().out


def test_each_change_that_is_named_lowers_the_peak_and_none_that_does_is_left_out():
    told = estimate("--micro_bsz", "8", "--bone_r", "16")  # 64 is as wide as the model
    now, room = peak(told.parts(8, 128), GPU), 4 << 30
    found = changes(told, room)
    assert [change.peak for change in found] == sorted(change.peak for change in found)
    assert all(change.peak < now for change in found)
    assert {"--grad_cp 1", "--bone_mode bone"} <= {change.flags for change in found}
    assert {flags for flags, _ in alternatives(told.config)} >= {change.flags for change in found}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_share_what_zero_shares(stage):
    alone, shared = (
        estimate("--strategy", f"deepspeed_stage_{stage}", "--devices", str(n), "--num_nodes", str(n), "--peft", "none")
        for n in (1, 2)
    )
    trains = alone.counts.trains
    one, four = alone.parts(1, 128), shared.parts(1, 128)
    each = OPTIMIZER["adamw"]
    assert size(one, "optimizer") == each * trains and size(four, "optimizer") == each * (trains // 4)
    held = trains if stage < 3 else trains // 4
    assert size(four, "weights that train") == held * 2
    assert size(four, "activations") == size(one, "activations")


def test_muon_keeps_one_moment_of_each_matrix():
    told = estimate("--optim", "muon", "--train_parts", "ln", "--bone_r", "16")
    assert (
        told.counts.matrices == told.counts.of_adapter < told.counts.trains
    )  # bat-in's blocks are matrices, norms are none
    parts = told.parts(1, 128)
    assert size(parts, "optimizer") == 12 * told.counts.trains - 4 * told.counts.of_adapter
    assert size(parts, "updates, gathered") == 4 * told.counts.of_adapter


def test_offload_moves_the_optimizer_and_quantization_shrinks_the_frozen_layers():
    plain, moved = estimate().parts(1, 128), estimate("--strategy", "deepspeed_stage_2_offload").parts(1, 128)
    where = {part.device for part in moved if part.name == "optimizer"}
    assert where == {CPU} and size(moved, "optimizer") == size(plain, "optimizer")
    told = estimate("--quant", "nf4")
    weights = 4 * (6 * 64 * 64 + 2 * 64 * 256)
    assert size(told.parts(1, 128), "weights, frozen and quantized") == weights // 2 + weights // 64 * 4
    assert size(told.parts(1, 128), "weights, frozen") == size(plain, "weights, frozen") - 2 * weights


@pytest.mark.parametrize(
    "text, value", [("24GiB", 24 << 30), ("24gb", 24 << 30), ("1.5", 3 << 29), ("512 MiB", 512 << 20)]
)
def test_sizes_of_memory(text, value):
    assert memory_size(text) == value


@pytest.mark.parametrize(
    "flags, message",
    [
        ((*NEW, "--gpu", "large"), "'large' is no size of a memory; write it as 24GiB"),
        ((*NEW, "--gpu", "0"), "0 is no memory of a GPU: 1 MiB to 1,024 GiB"),
        ((*NEW, "--gpu", "9" * 5000), "9… is no memory of a GPU"),
        ((*NEW, "--n_layer", "1000000000"), "1000000000 is above 1,000"),
        ((*NEW, "--n_embd", "1000000000000"), "1000000000000 is above 1,048,576"),
        ((*NEW, "--gpu", "24GiB", "--accelerator", "cpu"), "cpu: it plans for a GPU, and that trains on none"),
        (("--gpu", "24GiB"), "a new model needs --n_layer"),
        ((*NEW, "--gpu", "24GiB", "--bone_r", "48"), "does not divide"),
        ((*NEW, "--micro_bsz", "0"), "0 is below 1"),
    ],
)
def test_mistakes_are_told(flags, message):
    with pytest.raises(UserError, match=message):
        main(["plan", *flags])


def test_accumulated_gradients_and_a_head_that_trains_are_counted():
    plain, more = (
        estimate().parts(1, 128),
        estimate("--accumulate_grad_batches", "2", "--train_parts", "head").parts(1, 128),
    )
    assert size(more, "gradients, accumulated") > 0 == size(plain, "gradients, accumulated")
    assert size(more, "gradient of the head") == 8 * 80 * 64 > 0 == size(plain, "gradient of the head")


def test_pages_of_a_file_in_the_dtype_of_the_training_are_the_weights():
    told = replace(estimate(accelerator=CPU), file=1000)
    assert (told.file_pages(), replace(told, mapped=False).file_pages()) == (0, 1000)
    rows = 128 * (64 * 2 + 4096)  # a step reads so much of the embedding, and no more than it has
    assert size(told.parts(1, 128), "embedding, rows that are read") == min(rows, 80 * 64 * 2)
    assert size(told.parts(1, 128), "weights, frozen") == 2 * (told.counts.total - told.counts.of_adapter - 80 * 64)
    for mapped, moved in ((True, 0), (False, 2 * (told.counts.total - told.counts.of_adapter))):
        parts = replace(told, accelerator=GPU, mapped=mapped).parts(1, 128)
        assert size(parts, "weights, on their way to the GPU") == moved


def test_segments_bound_what_a_row_takes_and_tuned_states_count():
    told = estimate("--train_type", "infctx", "--chunk_ctx", "64", "--train_parts", "state", "--head_size", "16")
    assert told.parts(1, 64) == told.parts(1, 65536)
    states = told.counts.trains - estimate("--head_size", "16").counts.trains
    assert states == 4 * 4 * 16 * 16  # layers, heads and their matrices
    assert size(told.parts(1, 64), "gradients, summed over segments") == 4 * told.counts.trains


def test_files_are_counted_with_their_copies():
    told = estimate("--epoch_count", "6", "--epoch_save", "2", "--val_data", "x", "--merge_on_save")
    adapter, merged, checkpoints = written(told)
    assert adapter.copies == merged.copies == 3 + 1  # three epochs, of which the newest is one, and the best
    assert adapter.size == 2 * told.counts.of_adapter and merged.size == 2 * (
        told.counts.total - told.counts.of_adapter
    )
    assert checkpoints.size == OPTIMIZER["adamw"] * told.counts.trains
    assert written(estimate("--retain_data", "x")) == written(estimate()) != written(estimate("--val_data", "x"))
    told = estimate("--train_parts", "state")
    adapter, states, _ = written(told)
    assert states.name.startswith("state.pth") and states.copies == adapter.copies
    assert states.size == 2 * (told.counts.trains - estimate().counts.trains)
    for first, last, save in product(range(3), range(7), range(4)):
        train = SimpleNamespace(epoch_begin=first, epoch_count=last, epoch_save=save)
        assert saved_epochs(train) == sum(n == last or save > 0 and n % save == 0 for n in range(first + 1, last + 1))


@pytest.mark.parametrize(
    "flags, adapters, checkpoints, name",
    [
        ("", 6, 3, "checkpoints"),  # two stay while the third is written
        ("--keep_checkpoints 1", 2, 2, "checkpoints"),
        ("--keep_checkpoints 0", 6, 6, "checkpoints"),
        ("--save_every 7", 6 + 3, 3, "checkpoints"),  # no checkpoint need be of an epoch
        ("--keep_checkpoints 0 --save_minutes 5", 12, 6, "checkpoints, or more"),
    ],
)
def test_copies_that_stay_of_a_run_are_counted(flags, adapters, checkpoints, name):
    files = written(estimate("--epoch_count", "6", *flags.split()))
    assert [file.copies for file in files] == [adapters, checkpoints] and files[-1].name == name
