"""Merging: exact arithmetic, the base's keys and dtypes, every adapter tensor accounted for."""

import os
import threading
from functools import partial
from itertools import groupby

import pytest
import torch

from release.merges import RANK, VARIANTS, adapter_of, run
from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.checkpoints.adapter_file import Adapter, AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.base import base_of, fingerprint, open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.release import merge as merge_cli
from rwkv_peft.release.merge import Merge, MergeOptions, merged_tensors, prefetch


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [1.0, 0.3, -1.0])
def test_merged_weights_are_base_plus_delta_cast_once(folder, variant, scale):
    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of(variant, base)
    save_adapter(folder / "a.safetensors", tensors, metadata)
    merged = run(folder, "--scale", scale, "--output_dtype", "fp32", "--verify")
    assert list(merged) == list(base)
    modules = read_adapter(folder / "a.safetensors").modules()
    for key, tensor in base.items():
        params = modules.get(key.removesuffix(".weight"))
        if params is None:
            assert torch.equal(merged[key], tensor.float())
            continue
        exact = tensor.double() + scale * METHODS[variant].change.delta(tensor.double(), params, scale=metadata.scale)
        # residual variants subtract from a base rounded to bfloat16, as training does
        tolerance = 1e-2 if METHODS[variant].residual else 1e-5
        torch.testing.assert_close(merged[key].double(), exact, rtol=tolerance, atol=tolerance)
        assert (merged[key] - tensor.float()).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_base_keys_order_shapes_and_dtypes(tmp_path, tiny_state, dtype):
    save_model(tmp_path / "base.pth", tiny_state(dtype=dtype))
    base = open_base(tmp_path / "base.pth").tensors
    save_adapter(tmp_path / "a.safetensors", *adapter_of("bat-in", base))
    merged = run(tmp_path)
    found, due = ([(key, x.shape, x.dtype) for key, x in tensors.items()] for tensors in (merged, base))
    assert found == due


@pytest.mark.parametrize("variant", VARIANTS)
def test_bands_of_rows_give_the_whole_result(tiny_state, variant, monkeypatch):
    base = tiny_state(dim_ffn=104)
    adapter = Adapter(*adapter_of(variant, base))
    whole = merged_tensors(base_of(base), [("a", adapter)])
    monkeypatch.setattr("rwkv_peft.release.merge.BAND", 1000)
    banded = merged_tensors(base_of(base), [("a", adapter)])
    for key in base:
        torch.testing.assert_close(banded[key], whole[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_unmerge_recovers_the_base(tiny_state, variant, scale):
    base = tiny_state()
    adapters = [("a", Adapter(*adapter_of(variant, base))), ("b", Adapter(*adapter_of("bat-in", base, seed=7)))]
    merged = merged_tensors(base_of(base), adapters, MergeOptions(scale=scale))
    back = merged_tensors(base_of(merged), adapters, MergeOptions(scale=scale, unmerge=True))
    assert any((merged[key] - base[key]).abs().max() > 0.1 for key in base)
    for key in base:
        torch.testing.assert_close(back[key], base[key], rtol=1e-4, atol=2e-5)


def test_merging_leaves_its_inputs_alone(tiny_state):
    base = tiny_state()  # float32, so that no cast stands between inputs and arithmetic
    tensors, metadata = adapter_of("bat-in", base)
    tensors |= {"blocks.0.ln1.weight": torch.ones(64)}
    before = {key: tensor.clone() for key, tensor in (base | tensors).items()}
    merged_tensors(base_of(base), [("a", Adapter(tensors, metadata))])
    assert all(torch.equal(before[key], tensor) for key, tensor in (base | tensors).items())
    assert not torch.equal(base["blocks.0.ln1.weight"], torch.ones(64))


@pytest.mark.parametrize("written", [(), ("--output_dtype", "fp32"), ("--output_dtype", "fp16")])
def test_several_adapters_apply_in_order(folder, written):
    base = open_base(folder / "base.pth").tensors
    save_adapter(folder / "a.safetensors", *adapter_of("bat-in", base))
    first = run(folder, "--output_dtype", "fp32", output="first.pth")
    tensors, metadata = adapter_of("bat-out", base, seed=5)
    between = run(folder, *written, output="between.pth")  # what the second adapter's training started from
    save_adapter(
        folder / "b.safetensors", tensors, AdapterMetadata("bat-out", RANK, base_fingerprint=fingerprint(between))
    )
    argv = f"--bone_checkpoint {folder}/a.safetensors {folder}/b.safetensors --output_dtype fp32".split()
    argv += f"--base_model {folder}/base.pth --output {folder}/both.pth".split()
    merge_cli.main(argv)
    both = open_base(folder / "both.pth").tensors
    expected = merged_tensors(base_of(first), [("b", Adapter(tensors, metadata))])
    for key in base:
        torch.testing.assert_close(both[key], expected[key], rtol=1e-5, atol=1e-6)
    argv[1:3] = argv[2:0:-1]
    with pytest.raises(UserError, match="another base"):
        merge_cli.main(argv)


def test_whole_tensors_take_the_place_of_the_base(folder):
    base = open_base(folder / "base.pth").tensors
    whole = {"blocks.1.att.time_decay": torch.randn(1, 1, 64), "head.weight": torch.randn(80, 64)}
    save_adapter(folder / "a.safetensors", whole | adapter_of("bone", base)[0], AdapterMetadata("bone", RANK))
    merged = run(folder, "--output_dtype", "fp32")
    for key, tensor in whole.items():
        assert torch.equal(merged[key], tensor)


def test_time_states_are_added_at_the_end(folder):
    states = {f"blocks.{i}.att.time_state": torch.randn(4, 16, 16) for i in range(2)}
    torch.save(states, folder / "state.pth")
    merged = run(folder, adapter="state.pth")
    assert list(merged)[-2:] == list(states)
    assert torch.equal(merged["blocks.1.att.time_state"], states["blocks.1.att.time_state"].bfloat16())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda states: dict(list(states.items())[:1]), "states of 1 of the model's 2 layers.*blocks.1.att.time"),
        (lambda states: {key: tensor[:1] for key, tensor in states.items()}, "has shape .1, 16, 16."),
        (lambda states: states | {"blocks.5.att.time_state": torch.ones(4, 16, 16)}, "no place in the base"),
    ],
)
def test_time_states_are_for_every_layer(folder, change, message):
    torch.save(change({f"blocks.{i}.att.time_state": torch.randn(4, 16, 16) for i in range(2)}), folder / "state.pth")
    with pytest.raises(UserError, match=message):
        run(folder, adapter="state.pth")
    assert not (folder / "merged.pth").exists()


def test_the_folder_of_a_run_stands_for_its_adapter(folder):
    adapter = adapter_of("bat-in", open_base(folder / "base.pth").tensors)
    save_adapter(folder / "run" / "adapter.safetensors", *adapter)
    save_adapter(folder / "a.safetensors", *adapter)
    expected = run(folder)
    for _ in range(2):  # what an earlier merge wrote into the folder is no input
        merged = run(folder, adapter="run", output="run/merged.pth")
        assert all(torch.equal(merged[key], expected[key]) for key in expected)
    save_model(folder / "full" / "rwkv.pth", expected)
    with pytest.raises(UserError, match="full/rwkv.pth is its model, nothing merges"):
        run(folder, adapter="full")
    (folder / "begun").mkdir()
    (folder / "begun" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="the run in .*begun has saved nothing yet"):
        run(folder, adapter="begun")


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_an_adapter_on_a_quantized_base_merges_into_what_it_was_trained_on(folder, quant, capsys):
    pytest.importorskip("bitsandbytes")
    from rwkv_peft.adapters.quant import roundtrip

    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of("bat-in", base, quant=quant)
    save_adapter(folder / "a.safetensors", tensors, metadata)
    merged = run(folder, "--output_dtype", "fp32")
    plain = run(folder, "--output_dtype", "fp32", "--quant", "none", output="plain.pth")
    key = "blocks.0.ffn.key.weight"
    bone = {"bone": tensors["blocks.0.ffn.key.bone"]}
    for result, weight in ((merged, roundtrip(base[key], quant).float()), (plain, base[key].float())):
        due = weight + METHODS["bat-in"].change.delta(weight, bone)
        torch.testing.assert_close(result[key], due, rtol=1e-5, atol=1e-6)
    assert not torch.equal(merged[key], plain[key])
    lost = ((roundtrip(base[key], quant).float() - base[key].float()).norm() / base[key].float().norm()).item()
    assert f"differs from it by {lost:.0%}"[:-1] in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot undo"):
        run(folder, "--unmerge")
    with pytest.raises(UserError, match=f"contradicts .*, which was trained on a base quantized to {quant}"):
        run(folder, "--quant", "int8" if quant == "nf4" else "nf4")


def test_dry_run_writes_nothing_and_reports_all(folder, capsys):
    save_adapter(folder / "a.safetensors", *adapter_of("bat-in", open_base(folder / "base.pth").tensors))
    before = sorted(os.listdir(folder))
    merge_cli.main(f"--base_model {folder}/base.pth --lora_checkpoint {folder}/a.safetensors --dry_run".split())
    text = capsys.readouterr().out
    assert sorted(os.listdir(folder)) == before
    assert "bat-in rank 8 on 8 layers" in text and "changed 8 of 62 tensors" in text and "cast to bfloat16 lost" in text


def test_the_report_measures_change_and_loss(tiny_state):
    base = {key: tensor.bfloat16() for key, tensor in tiny_state().items()}
    adapter = Adapter(*adapter_of("bone", base, ("att.key",)))
    reports = []
    merging = Merge(base_of(base), [("a", adapter)]).bands(base.items(), reports.append)
    merged = {key: torch.cat([rows for _, rows in bands]) for key, bands in groupby(merging, lambda band: band[0])}
    assert [report.key for report in reports] == ["blocks.0.att.key.weight", "blocks.1.att.key.weight"]
    for report in reports:
        weight, params = base[report.key].double(), adapter.modules()[report.key.removesuffix(".weight")]
        change = METHODS["bone"].change.delta(weight, params)
        assert report.change == pytest.approx((change.norm() / weight.norm()).item(), rel=1e-3)
        lost = (merged[report.key].double() - weight - change).norm() / change.norm()
        assert report.lost == pytest.approx(lost.item(), rel=1e-2) and report.lost > 1e-3


def test_reading_back_notices_a_file_that_is_another(folder):
    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of("bat-in", base)
    save_adapter(folder / "a.safetensors", tensors, metadata)
    merged = dict(run(folder))
    merged["head.weight"] = merged["head.weight"] + 1
    save_model(folder / "other.pth", merged)
    with pytest.raises(UserError, match="does not read back"):
        merge = Merge(base_of(base), [("a", Adapter(tensors, metadata))])
        merge_cli.read_back(folder / "other.pth", None, merge, folder / "base.pth")


def test_the_table_fits_into_80_columns(tmp_path, tiny_state, capsys):
    base = tiny_state(dtype=torch.bfloat16)
    save_model(tmp_path / "base.pth", base)
    matrices = tuple(f"att.{n}" for n in ("receptance", "key", "value", "gate", "output"))
    matrices += tuple(f"ffn.{n}" for n in ("key", "receptance", "value"))
    tensors, metadata = adapter_of("bat-in", base, targets=matrices)
    whole = {f"blocks.{i}.ln1.weight": 300 * base[f"blocks.{i}.ln1.weight"] for i in range(2)}
    save_adapter(tmp_path / "a.safetensors", tensors | whole, metadata)
    for dtype, cast in (("keep", True), ("fp32", False)):
        run(tmp_path, "--output_dtype", dtype)
        printed = capsys.readouterr().out
        table = printed[printed.index("block  ") :].splitlines()[:3]
        for name in ("att.r", "att.k", "att.v", "att.g", "att.o", "ffn.k", "ffn.r", "ffn.v", "others"):
            assert f" {name} " in table[0] + " "
        assert all(len(line) <= 80 and len(line) == len(table[0]) for line in table)
        assert ("cast lost" in table[0], "the cast to bfloat16 lost at most" in printed) == (cast, cast)


@pytest.fixture(params=[1, 3])
def threads(request):
    """torch's number of threads while a test runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_bands_come_in_order_and_few_are_computed_before_they_are_taken(threads):
    gate, begun = threading.Event(), 0

    def band(number):
        if number == 0 and threads > 1:
            assert gate.wait(10)  # the first is done last
        gate.set()
        return number, torch.get_num_threads()

    def tasks():
        nonlocal begun
        for number in range(100):
            begun += 1
            yield partial(band, number)

    for taken, found in enumerate(prefetch(tasks())):
        assert found == (taken, 1)  # one thread of torch in each
        assert begun <= taken + 1 + 3 * threads
    assert torch.get_num_threads() == threads


def test_the_error_of_a_band_is_raised_in_its_turn_and_ends_the_work(threads):
    def failing():
        raise KeyError("no more")

    bands = prefetch([lambda: 1, failing, lambda: 3])
    assert next(bands) == 1
    with pytest.raises(KeyError, match="no more"):
        next(bands)
    assert list(bands) == [] and torch.get_num_threads() == threads
    begun = []
    bands = prefetch(lambda number=number: begun.append(number) for number in range(100))
    next(bands)
    bands.close()
    assert len(begun) <= 2 + 3 * threads
