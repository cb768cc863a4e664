"""Losses measured while training, without changing the run: of held-out rows, which end one that no longer improves,
and of --retain_data, by which a run shows what it forgets."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from rwkv_peft.checkpoints.adapters import AdapterSource
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data.token_file_writer import TokenFileWriter
from rwkv_peft.inference.loading import load_model
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.inputs import find_samples
from training.runs import metrics, rewound

DROPOUT = ("--peft", "lora", "--lora_config", '{"lora_r":4,"lora_dropout":0.2}', "--precision", "fp32")
DROPOUT += ("--lr_schedule", "constant")


def losses(lines, name):
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="module")
def measured(files, train, kept):
    """The output of a run of 8 steps that is measured after every third one, and of one that goes on after 4."""
    flags = (*DROPOUT, "--val_data", str(files / "data"), "--val_every", "3", "--retain_data", kept)
    first, _ = train("measured", *flags)
    rewound(files / "measured", "again")
    second, _ = train("again", *flags, "--resume")
    return first, second


def test_it_is_measured_before_the_first_step_and_with_each_validation(files, measured):
    lines = metrics(files, "again")
    assert list(losses(lines, "retain_start")) == [0]
    retained = losses(lines, "retain_loss")
    assert list(retained) == list(losses(lines, "val_loss")) == [2, 5, 7]
    assert retained == losses(metrics(files, "measured"), "retain_loss")
    first, second = measured
    starts = (lines[0][f"{name}_start"] for name in ("val", "retain"))
    assert "before the first step: validation loss {:.4f}, retained loss {:.4f}\n".format(*starts) in first
    assert f"validation  loss {lines[0]['val_start']:.4f} at first, {lines[-1]['val_loss']:.4f} at" in second
    assert "before the first step" not in second
    assert f", perplexity {lines[5]['val_ppl']:.2f}, retained loss {retained[5]:.4f}\n" in second
    assert f"forgetting is measured on 9 samples of {files / 'kept'}: loss on all 205 tokens\n" in first


def test_first_it_is_the_bases_own_loss_and_last_that_of_what_is_saved(files, measured, kept):
    flags = ["--load_model", str(files / "base.pth"), "--data_file", str(files / "data"), "--retain_data", kept]
    samples = find_samples(parse_run([*flags, "--bone_r", "16", "--ctx_len", "24"]).config)[1]["retain"]
    lines = metrics(files, "measured")
    last = [AdapterSource(files / "measured" / "adapter.safetensors")]
    for adapters, found in (([], lines[0]["retain_start"]), (last, lines[-1]["retain_loss"])):
        model, _ = load_model(files / "base.pth", adapters)
        total = 0.0
        for tokens, mask in (samples[n] for n in range(len(samples))):
            with torch.no_grad():
                logits = model(tokens[None, :-1])[0][0]
            total += F.cross_entropy(logits.double(), tokens[1:], reduction="none")[mask].sum().item()
        expected = total / sum(samples.count(n) for n in range(len(samples)))
        # what is merged is rounded to the base's bfloat16
        assert found == pytest.approx(expected, rel=1e-3 if adapters else 1e-5)


def test_what_the_run_computes_does_not_change(files, train, measured):
    """With dropout, whose random draws the measurement must not change."""
    train("unmeasured", *DROPOUT, "--val_data", str(files / "data"), "--val_every", "3")

    def numbers(name):
        return [(line["loss"], line["grad_norm"], line.get("val_loss")) for line in metrics(files, name)]

    assert numbers("unmeasured") == numbers("measured")
    for label in ("adapter", "adapter-best"):
        plain, other = (load_file(files / name / f"{label}.safetensors") for name in ("unmeasured", "measured"))
        assert plain and all(torch.equal(tensor, other[key]) for key, tensor in plain.items())


def test_it_needs_no_validation_and_decides_nothing(files, train, kept):
    """Whatever the stage, and on several ranks."""
    more = ("--strategy", "deepspeed_stage_3", "--devices", "2")
    out, _ = train("alone", "--precision", "fp32", "--retain_data", kept, *more)
    lines = metrics(files, "alone")
    assert list(losses(lines, "retain_loss")) == [3, 7] and not losses(lines, "val_loss")
    assert f"step 4: retained loss {lines[3]['retain_loss']:.4f}, perplexity" not in out
    assert f"step 4: retained loss {lines[3]['retain_loss']:.4f}\n" in out and "best loss" not in out
    assert not list((files / "alone").glob("*-best*"))


def test_text_without_a_mask_is_measured_whole_where_answers_are_learned(files, kept, tmp_path):
    with TokenFileWriter(tmp_path / "answers", vocab_size=80) as writer:
        writer.add(list(range(1, 60)), [False] * 30 + [True] * 29)
    words = ["--load_model", str(files / "base.pth"), "--bone_r", "16", "--ctx_len", "24", "--dataload", "get"]

    def found(data, *more):
        samples, measured = find_samples(parse_run([*words, "--data_file", data, *more]).config)
        return [sum(part.count(n) for n in range(len(part))) for part in (samples, measured["retain"])]

    answers = str(tmp_path / "answers")
    assert found(answers, "--retain_data", kept) == [29, 204]
    assert found(answers, "--retain_data", answers) == [29, 29]
    with pytest.raises(UserError, match="absent"):
        found(answers, "--retain_data", str(tmp_path / "absent"))


def test_early_stop_ends_a_run_that_no_longer_improves(files, train):
    rates = ("--lr_init", "0", "--lr_final", "0", "--warmup_steps", "0")
    flags = ("--precision", "fp32", *rates, "--val_data", str(files / "data"), "--val_every", "1", "--early_stop")
    train("early", *flags, "2")
    lines = metrics(files, "early")
    assert len(lines) == 3 and "val_ppl" in lines[0]
    assert (files / "early" / "adapter.safetensors").exists()

    # and it stays ended, however often its command is run again
    out, _ = train("early", *flags, "2", "--resume", "auto")
    assert "is complete (3 steps, the last 2 validations without a lower loss)" in out
    _, err = train("early", *flags, "2", "--resume", code=2)
    assert "raise --early_stop, or leave it out, to go on" in err and "Traceback" not in err
    assert metrics(files, "early") == lines
    train("early", *flags, "3", "--resume")
    assert len(metrics(files, "early")) == 4
