"""Files written here compute the same logits in runtimes that others wrote."""

import tempfile
from pathlib import Path

import pytest
import torch

from rwkv_peft.checkpoints.base import base_of, open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models.rwkv7.keys import new_dimensions, shapes
from rwkv_peft.release.check import main
from rwkv_peft.release.runtimes import RUNTIMES, Runtime, compare, reference_logits, written

# (format, largest absolute difference of logits that the runtimes' own arithmetic may make)
BOUNDS = (("fp32", 1e-5), ("f32", 1e-5), ("f16", 4e-3), ("bf16", 2.5e-2), ("q8_0", 1e-1))
DEMO = Path(__file__).resolve().parents[2] / "demo"


def official(tiny_state, **changes):
    """A small model with official ones' head size and low-rank widths, which every runtime takes."""
    sizes = dict(n_layer=2, n_embd=128, dim_ffn=448, head_size=64, vocab_size=300, maa_rank=32, decay_rank=64)
    return tiny_state(**sizes | changes)


def ask(runtime, form, state, folder, length=50):
    """The largest difference of a runtime's logits from the reference; skips the test if it is not installed."""
    if runtime.missing() or (form != "fp32" and not installed("gguf")):
        pytest.skip(runtime.missing() or "pip install gguf")
    model = base_of(state)
    config = model.config
    assert not runtime.refuses(config)
    tokens = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(1))
    logits = runtime.logits(written(folder, form, model), tokens, config)
    return compare(logits, reference_logits(model, tokens), form, runtime.shifted)[0]


def installed(module):
    import importlib.util

    return importlib.util.find_spec(module) is not None


BY_FORM = pytest.mark.parametrize(
    "runtime, form",
    [(RUNTIMES[0], "fp32"), *((RUNTIMES[1], form) for form in ("f32", "f16", "bf16", "q8_0"))],
    ids=lambda value: getattr(value, "name", value),
)
EXACT = pytest.mark.parametrize("runtime, form", [*zip(RUNTIMES, ("fp32", "f32"))], ids=["rwkv", "llama.cpp"])


@BY_FORM
def test_runtimes_agree_with_the_reference(tmp_path, tiny_state, runtime, form):
    assert ask(runtime, form, official(tiny_state), tmp_path) < dict(BOUNDS)[form]


@pytest.mark.parametrize("generation, wider", [(6, 2), (7, 8)])  # their logits spread more widely
@BY_FORM
def test_runtimes_agree_on_a_trained_model_whose_decays_are_strong(tmp_path, runtime, form, generation, wider):
    base = open_base(DEMO / f"rwkv{generation}-demo.pth")
    assert ask(runtime, form, base.tensors, tmp_path) < wider * dict(BOUNDS)[form]


@pytest.mark.parametrize("first_value", [True, False])
@EXACT
def test_the_widths_of_an_rwkv7_agree(tmp_path, runtime, form, first_value):
    config = new_dimensions(n_layer=2, n_embd=384, vocab_size=300)
    assert config.value_rank != config.iclr_rank  # as in every release
    generator, unused = torch.Generator().manual_seed(0), tuple(f"blocks.0.att.v{n}" for n in "012")
    state = {
        key: torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) == 2 else 1)
        for key, shape in shapes(config).items()
        if first_value or key not in unused
    }
    assert ask(runtime, form, state, tmp_path, length=20) < 1e-4


@EXACT
def test_the_widths_of_a_4096_wide_model_agree(tmp_path, tiny_state, runtime, form):
    state = official(tiny_state, n_layer=1, n_embd=4096, dim_ffn=128, vocab_size=64, maa_rank=64, decay_rank=128)
    assert ask(runtime, form, state, tmp_path, length=8) < 1e-4


def test_a_time_state_is_where_the_runtime_starts(tmp_path, tiny_state):
    state = official(tiny_state)
    generator = torch.Generator().manual_seed(2)
    tuned = state | {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64, generator=generator) for i in range(2)}
    assert ask(RUNTIMES[0], "fp32", tuned, tmp_path) < 1e-4
    tokens = torch.arange(20)
    difference = reference_logits(base_of(tuned), tokens) - reference_logits(base_of(state), tokens)
    assert difference.abs().max() > 0.1


def check(model, *flags):
    return main(["--runtimes", "--merged", str(model), *flags])


def test_a_table_is_printed_and_a_difference_noticed(tmp_path, tiny_state, capsys, monkeypatch):
    pytest.importorskip("rwkv")
    save_model(tmp_path / "m.pth", official(tiny_state))
    assert check(tmp_path / "m.pth", "--gguf_types") == 0
    assert "| rwkv        | " in capsys.readouterr().out
    monkeypatch.setattr(
        "rwkv_peft.release.runtimes.reference_logits", lambda model, tokens: reference_logits(model, tokens) + 0.1
    )
    assert check(tmp_path / "m.pth", "--gguf_types") == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_runtime_that_breaks_or_is_missing_is_a_row_and_the_others_are_asked(
    tmp_path, tiny_state, capsys, monkeypatch
):
    def broken(path, tokens, config):
        raise RuntimeError("no such instruction\nat all")

    def exact(path, tokens, config):
        return reference_logits(base_of(official(tiny_state)), tokens)

    sound = Runtime("sound", "torch", "torch", "pth", exact, lambda config: "")
    runtimes = (
        sound._replace(name="broken", logits=broken),
        sound._replace(name="absent", package="some-thing", module="no_module"),
        sound._replace(name="unlisted", package="no-package"),
        sound,
    )
    monkeypatch.setattr("rwkv_peft.release.runtimes.RUNTIMES", runtimes)
    save_model(tmp_path / "m.pth", official(tiny_state))
    assert check(tmp_path / "m.pth") == 1
    rows = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "failed: RuntimeError: no such instruction" in rows["broken"]
    assert "not run: pip install some-thing" in rows["absent"]
    assert "failed: PackageNotFoundError" in rows["unlisted"]
    assert "0.0e+00" in rows["sound"]
    monkeypatch.setattr("rwkv_peft.release.runtimes.RUNTIMES", runtimes[1:2])
    with pytest.raises(UserError, match="no runtime ran"):
        check(tmp_path / "m.pth")


def test_gguf_needs_its_writer_too(monkeypatch):
    llama = next(runtime for runtime in RUNTIMES if runtime.form == "gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else True)
    assert llama.missing() == "pip install gguf"


def test_a_nan_is_a_failure(tiny_state):
    reference = torch.randn(3, 5).double()
    difference, limit = compare(torch.full((3, 5), float("nan")), reference, "fp32", False)
    assert not difference <= limit


def test_a_temporary_folder_that_is_full_is_told_and_keeps_nothing(tiny_state, tmp_path, monkeypatch, largest_file):
    save_model(tmp_path / "model.pth", official(tiny_state))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with pytest.raises(UserError, match="cannot write .*TMPDIR names another folder"), largest_file(100_000):
        check(tmp_path / "model.pth")
    assert list((tmp_path / "tmp").glob(".rwkv_peft*")) == []


def test_a_sum_of_probabilities_that_float32_rounded_says_nothing_of_a_model():
    torch.manual_seed(0)
    reference = torch.randn(7, 300, dtype=torch.float64)
    told = reference.log_softmax(-1)[-1:].float()
    assert compare(told + 1e-2, reference, "f32", shifted=True)[0] < 1e-6
    told[0, 5] += 1e-2
    difference, limit = compare(told, reference, "f32", shifted=True)
    assert difference == pytest.approx(1e-2, rel=1e-2) and difference > limit
