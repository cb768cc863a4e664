"""--data_type pairs: the loss is DPO's, against the base, and a run learns which answer is the better one."""

import json
import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F

from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.layer import untrained
from rwkv_peft.adapters.methods import METHODS, words_of
from rwkv_peft.config import AdapterConfig
from rwkv_peft.data.batches import collate
from rwkv_peft.errors import UserError
from rwkv_peft.files.base import save_model
from rwkv_peft.models import FAMILIES
from rwkv_peft.training.flags.request import parse_flags
from rwkv_peft.training.step.preferences import Preferences, losses_of_documents
from training.runs import ROOT, finish, metrics, start

VOCABULARY, BETA, NLL = 30, 0.7, 0.3
ADAPTERS = {
    name: AdapterConfig(**words_of(method), rank=8, mini_rank=4 if method.mini else 0, alpha=16.0, svd_niter=0)
    for name, method in METHODS.items()
    if not method.from_gradient
}


def make(family, adapter=None, grad_checkpoint=False, dtype=torch.float64):
    torch.manual_seed(0)
    model = family.build(family.new_dimensions(n_layer=2, n_embd=16, vocab_size=VOCABULARY, head_size=8))
    model.grad_checkpoint = grad_checkpoint
    family.init_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if adapter is not None:
        inject(model, adapter, family=family)
    return model.to(dtype)


def shaken(model):
    """The same model, with adapter values as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def documents(lengths):
    """Documents with so many targets, whose last half counts; no target counts if a length is negative."""
    generator = torch.Generator().manual_seed(1)
    for length in lengths:
        tokens = torch.randint(VOCABULARY, (abs(length) + 1,), generator=generator)
        yield tokens, (torch.arange(abs(length)) >= abs(length) // 2) & (length > 0)


def naive(model, base, lengths, count):
    """(loss, accuracy, margin, chosen) by the paper's formula, a document at a time."""

    def answer(model, tokens, mask):
        log_probabilities = model(tokens[None, :-1])[0][0].log_softmax(-1)
        return log_probabilities.gather(1, tokens[1:, None])[:, 0][mask]

    total, right, margins, likelier = 0.0, 0, 0.0, 0.0
    pairs = list(documents(lengths))
    for chosen, rejected in zip(pairs[::2], pairs[1::2]):
        if not chosen[1].any():
            continue
        ratios = [answer(model, *one).sum() - answer(base, *one).sum().detach() for one in (chosen, rejected)]
        margin = BETA * (ratios[0] - ratios[1])
        total = total - F.logsigmoid(margin) - NLL * answer(model, *chosen).mean()
        right, margins, likelier = right + (margin > 0), margins + margin, likelier + BETA * ratios[0]
    return total / count, right / count, margins / count, likelier / count


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_loss_gradients_and_measures_are_the_papers(family, adapter):
    model, base = shaken(make(family, adapter)), make(family)
    lengths = [7, 4, 3, 11, -1, -1]
    batch = collate([list(documents(lengths))])
    step = Preferences(BETA, NLL)
    found, expected = step.loss(model, batch, 2.0), naive(model, base, lengths, 2.0)
    measured = torch.stack([found, *(step.measures[name] for name in ("accuracy", "margin", "chosen"))])
    torch.testing.assert_close(measured, torch.stack(expected), rtol=1e-6, atol=1e-8)  # pissa's base is rounded
    assert step.items(batch) == 2 and step.total(model, batch) == step.loss(model, batch, 1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = (torch.autograd.grad(loss, trained) for loss in (found, expected[0]))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_fresh_adapter_has_no_margin(family):
    model, step = make(family, ADAPTERS["bat-in"], dtype=torch.float32), Preferences(BETA)
    loss = step.loss(model, collate([list(documents([5, 6]))]), 1)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7) and step.measures["margin"] == 0


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_dropout_does_not_touch_what_answers_are_measured_by(method):
    adapter = AdapterConfig(method=method, rank=4, alpha=8.0, dropout=0.5, svd_niter=0)
    model, batch = shaken(make(FAMILIES[0], adapter)), collate([list(documents([7, 4]))])
    with torch.no_grad(), untrained(model):
        dropping = losses_of_documents(model.train(), batch)
        torch.testing.assert_close(dropping, losses_of_documents(model.eval(), batch), rtol=0, atol=0)


def test_checkpointed_blocks_have_the_same_gradients():
    batch, found = collate([list(documents([7, 4]))]), []
    for checkpoint in (False, True):
        torch.manual_seed(3)
        model = shaken(make(FAMILIES[1], ADAPTERS["bat-in"], checkpoint))
        Preferences(BETA, NLL).loss(model, batch, 1).backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_adapters_come_back_after_an_error():
    model = shaken(make(FAMILIES[0], ADAPTERS["bat-in"]))
    tokens = torch.arange(5)[None]
    before = model(tokens)[0]
    with pytest.raises(RuntimeError), untrained(model):
        assert not torch.equal(model(tokens)[0], before)
        raise RuntimeError
    assert torch.equal(model(tokens)[0], before)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--peft", "none"], "--peft none: answers are compared with what the base says"),
        (["--train_parts", "ln"], "--train_parts: "),
        (["--bone_load", "x.safetensors"], r"an adapter to start from \(x.safetensors\): .* merge it first"),
        (["--peft", "lora-ga"], "--peft lora-ga: "),
        (["--lr_init", "auto"], "--lr_init auto: .* give a number"),
        (["--train_type", "infctx"], "--train_type infctx: "),
        (["--dataload", "pad"], "--dataload pad: "),
        (["--loss_mask", "none"], "--loss_mask none: "),
    ],
)
def test_what_has_no_answer_to_compare_with_is_refused(flags, words):
    with pytest.raises(UserError, match=f"--data_type pairs does not go with {words}"):
        parse_flags(["--load_model", "base.pth", "--data_file", "pairs.jsonl", "--data_type", "pairs", *flags])


@pytest.mark.parametrize("flag", ["--dpo_beta", "--dpo_nll"])
def test_flags_of_preferences_need_pairs(flag):
    with pytest.raises(UserError, match=f"{flag} 0.5 belongs to --data_type pairs, and the data is binidx"):
        parse_flags(["--load_model", "base.pth", "--data_file", "data", flag, "0.5"])


def test_dpo_is_found_by_its_name(capsys):
    with pytest.raises(UserError, match="--data_type pairs"):
        parse_flags(["--load_model", "base.pth", "--data_file", "pairs.jsonl", "--train_type", "dpo"])


def test_a_run_learns_which_answer_is_better(tmp_path, tiny_state, accelerator):
    """Whatever the question, the answer in capital letters is the better one."""
    save_model(tmp_path / "base.pth", tiny_state(vocab_size=257))
    rows = [{"query": f"{i}?", "chosen": "YES" * (1 + i % 3), "rejected": "no" * (1 + i % 4)} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--load_model", tmp_path / "base.pth", "--data_file", tmp_path / "pairs.jsonl", "--data_type", "pairs"]
    flags += ["--tokenizer", "bytes", "--bone_r", 16, "--ctx_len", 64, "--micro_bsz", 2, "--lr_init", "3e-3"]
    flags += ["--accelerator", accelerator, "--precision", "fp32", "--val_split", "0.2", "--accumulate_grad_batches", 2]

    flags += ["--epoch_count", 2, "--proj_dir", tmp_path / "out"]
    out, _ = finish(start([sys.executable, str(ROOT / "train.py"), *map(str, flags)]))
    assert "DPO: the chosen answer above the rejected" in out and "accuracy" in out
    lines = metrics(tmp_path, "out")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and lines[0]["margin"] == 0
    assert lines[0]["chosen"] == 0 and "val_chosen" in lines[-1] and re.search(r"margin \d\.\d+, chosen ", out)
    assert lines[-1]["val_accuracy"] == 1 and lines[-1]["val_margin"] > 0.1 and "val_ppl" not in lines[-1]
    assert lines[-1]["val_loss"] < lines[0]["loss"]
