"""Files written here compute the same logits in runtimes that others wrote."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rwkv_peft.checkpoints.base import base_of, open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models.rwkv7.keys import new_dimensions, shapes
from rwkv_peft.release.check import compare_structure, main
from rwkv_peft.release.runtimes import Runtime, all_runtimes, judge, reference_logits, run_all, written

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
    if config.version == "x070" and runtime.name == "rwkv-simple":
        pytest.skip(runtime.refuses(config))
    assert not runtime.refuses(config)
    tokens = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(1))
    logits = runtime.logits(written(folder, form, model), tokens, config)
    return judge(logits, reference_logits(model, tokens), form, runtime.shifted)[0]


def installed(module):
    import importlib.util

    return importlib.util.find_spec(module) is not None


def cases():
    for runtime in all_runtimes():
        for form in ("fp32",) if runtime.form == "pth" else ("f32", "f16", "bf16", "q8_0"):
            yield pytest.param(runtime, form, id=f"{runtime.name}-{form}")


@pytest.mark.parametrize("runtime, form", list(cases()))
def test_runtimes_agree_with_the_reference(tmp_path, tiny_state, runtime, form):
    assert ask(runtime, form, official(tiny_state), tmp_path) < dict(BOUNDS)[form]


@pytest.mark.parametrize("generation, wider", [(6, 2), (7, 8)])  # their logits spread more widely
@pytest.mark.parametrize("runtime, form", list(cases()))
def test_runtimes_agree_on_a_trained_model_whose_decays_are_strong(tmp_path, runtime, form, generation, wider):
    base = open_base(DEMO / f"rwkv{generation}-demo.pth")
    assert ask(runtime, form, base.tensors, tmp_path) < wider * dict(BOUNDS)[form]


@pytest.mark.parametrize("first_value", [True, False])
@pytest.mark.parametrize("name, form", [("rwkv, sequence", "fp32"), ("llama.cpp", "f32")])
def test_the_widths_of_an_rwkv7_agree(tmp_path, name, form, first_value):
    config = new_dimensions(n_layer=2, n_embd=384, vocab_size=300)
    assert config.value_rank != config.iclr_rank  # as in every release
    generator, unused = torch.Generator().manual_seed(0), tuple(f"blocks.0.att.v{n}" for n in "012")
    state = {
        key: torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) == 2 else 1)
        for key, shape in shapes(config).items()
        if first_value or key not in unused
    }
    runtime = next(runtime for runtime in all_runtimes() if runtime.name == name)
    assert ask(runtime, form, state, tmp_path, length=20) < 1e-4


@pytest.mark.parametrize("name, form", [("rwkv, sequence", "fp32"), ("llama.cpp", "f32")])
def test_the_widths_of_a_4096_wide_model_agree(tmp_path, tiny_state, name, form):
    state = official(tiny_state, n_layer=1, n_embd=4096, dim_ffn=128, vocab_size=64, maa_rank=64, decay_rank=128)
    runtime = next(runtime for runtime in all_runtimes() if runtime.name == name)
    assert ask(runtime, form, state, tmp_path, length=8) < 1e-4


@pytest.mark.parametrize("name", ["rwkv, sequence", "rwkv, token by token"])
def test_a_time_state_is_where_the_runtime_starts(tmp_path, tiny_state, name):
    state = official(tiny_state)
    generator = torch.Generator().manual_seed(2)
    tuned = state | {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64, generator=generator) for i in range(2)}
    runtime = next(runtime for runtime in all_runtimes() if runtime.name == name)
    assert ask(runtime, "fp32", tuned, tmp_path) < 1e-4
    tokens = torch.arange(20)
    difference = reference_logits(base_of(tuned), tokens) - reference_logits(base_of(state), tokens)
    assert difference.abs().max() > 0.1


def check(model, *flags):
    return main(["--runtimes", "--merged", str(model), *flags])


def asked_alone(monkeypatch, *names):
    """Make --runtimes ask only these."""
    runtimes = tuple(runtime for runtime in all_runtimes() if runtime.name in names)
    monkeypatch.setattr("rwkv_peft.release.runtimes.all_runtimes", lambda: runtimes)


def test_a_table_is_printed_and_a_difference_noticed(tmp_path, tiny_state, capsys, monkeypatch):
    pytest.importorskip("rwkv")
    save_model(tmp_path / "m.pth", official(tiny_state))
    assert check(tmp_path / "m.pth", "--gguf_types", "--base_model", str(tmp_path / "m.pth")) == 0
    text = capsys.readouterr().out
    assert "| rwkv, sequence" in text and "has the keys, order, shapes and dtypes of" in text
    asked_alone(monkeypatch, "rwkv, sequence")
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
    monkeypatch.setattr("rwkv_peft.release.runtimes.all_runtimes", lambda: runtimes)
    save_model(tmp_path / "m.pth", official(tiny_state))
    assert check(tmp_path / "m.pth") == 1
    rows = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "failed: RuntimeError: no such instruction" in rows["broken"]
    assert "not run: pip install some-thing" in rows["absent"]
    assert "failed: PackageNotFoundError" in rows["unlisted"]
    assert "0.0e+00" in rows["sound"]
    monkeypatch.setattr("rwkv_peft.release.runtimes.all_runtimes", lambda: runtimes[1:2])
    with pytest.raises(UserError, match="no runtime ran"):
        check(tmp_path / "m.pth")


def test_gguf_needs_its_writer_too(monkeypatch):
    llama = next(runtime for runtime in all_runtimes() if runtime.form == "gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gguf" else True)
    assert llama.missing() == "pip install gguf"


def test_runtimes_that_cannot_take_a_model_are_not_asked(tiny_state, monkeypatch):
    asked_alone(monkeypatch, "rwkv-simple")
    (row,) = run_all(base_of(tiny_state(n_layer=1)), length=4)
    assert row.difference is None and "not run" in row.note


@pytest.mark.parametrize("changes", [{"head_size": 32}, {"head_size": 16, "dim_ffn": 100}])
def test_rwkv_simple_is_asked_for_every_head_size(tiny_state, monkeypatch, changes):
    pytest.importorskip("rwkv_simple")
    asked_alone(monkeypatch, "rwkv-simple")
    (row,) = run_all(base_of(official(tiny_state, **changes)))
    assert row.difference is not None and not row.failed, row


def test_a_variant_of_rwkv_6_is_named(tmp_path, tiny_state):
    state = {key.replace("time_maa_w1", "time_maa_rkvw_w1"): tensor for key, tensor in tiny_state().items()}
    save_model(tmp_path / "m.pth", state)
    with pytest.raises(UserError, match="an experimental variant of RWKV-6"):
        check(tmp_path / "m.pth")


def test_a_nan_is_a_failure(tiny_state):
    reference = torch.randn(3, 5).double()
    difference, limit = judge(torch.full((3, 5), float("nan")), reference, "fp32", False)
    assert not difference <= limit


def test_structure_is_compared_with_the_base(tiny_state):
    base = base_of(tiny_state(), "b")
    compare_structure(base, base)
    tuned = {f"blocks.{i}.att.time_state": torch.zeros(4, 16, 16) for i in range(2)}
    compare_structure(replace(base, tensors=base.tensors | tuned), base)
    for changed, message in (
        ({key: tensor for key, tensor in base.tensors.items() if key != "head.weight"}, "head.weight"),
        (dict(reversed(base.tensors.items())), "their order"),
        (base.tensors | {"head.weight": base.tensors["head.weight"].bfloat16()}, "bfloat16"),
    ):
        with pytest.raises(UserError, match=message):
            compare_structure(replace(base, tensors=changed), base)


@pytest.mark.parametrize("broken", ["full", "missing"])
def test_a_temporary_folder_that_refuses_is_told_and_keeps_nothing(
    tiny_state, tmp_path, monkeypatch, largest_file, broken
):
    save_model(tmp_path / "model.pth", official(tiny_state))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("tmp" if broken == "full" else "model.pth")))
    (tmp_path / "tmp").mkdir()
    with pytest.raises(UserError, match="cannot write .*TMPDIR names another folder"), largest_file(100_000):
        check(tmp_path / "model.pth")
    assert list((tmp_path / "tmp").glob(".rwkv_peft*")) == []


def test_a_sum_of_probabilities_that_float32_rounded_says_nothing_of_a_model():
    torch.manual_seed(0)
    reference = torch.randn(7, 300, dtype=torch.float64)
    told = reference.log_softmax(-1)[-1:].float()
    assert judge(told + 1e-2, reference, "f32", shifted=True)[0] < 1e-6
    told[0, 5] += 1e-2
    difference, limit = judge(told, reference, "f32", shifted=True)
    assert difference == pytest.approx(1e-2, rel=1e-2) and difference > limit
