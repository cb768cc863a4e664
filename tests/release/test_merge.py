"""Merging: exact arithmetic, the base's keys and dtypes, every adapter tensor accounted for; what cannot be merged is
refused, and every file stays as it was."""

import os
import subprocess
import threading
from dataclasses import replace
from functools import partial
from itertools import groupby

import pytest
import torch

from release.merges import RANK, ROOT, VARIANTS, adapter_of, run
from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.checkpoints.adapter_file import Adapter, AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.base import base_of, fingerprint, open_base, save_model
from rwkv_peft.checkpoints.tensors import TensorSpec
from rwkv_peft.cli.errors import UserError
from rwkv_peft.inference import command as generate_cli
from rwkv_peft.release import merge_command as merge_cli
from rwkv_peft.release.changes import TensorChange, change_table
from rwkv_peft.release.merge import Merge, merged_tensors, prefetch
from rwkv_peft.training.run import main as train


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [1.0, 0.3, -1.0])
def test_merged_weights_are_base_plus_delta_cast_once(folder, variant, scale):
    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of(variant, base)
    save_adapter(folder / "a.safetensors", tensors, metadata)
    merged = run(folder, "--output_dtype", "fp32", adapter=f"a.safetensors={scale}")
    assert list(merged) == list(base)
    modules = read_adapter(folder / "a.safetensors").modules()
    for key, tensor in base.items():
        params = modules.get(key.removesuffix(".weight"))
        if params is None:
            assert torch.equal(merged[key], tensor.float())
            continue
        change = METHODS[variant].change
        exact = tensor.double() + scale * change.delta(tensor.double(), params, scale=metadata.scale)
        if (part := change.times(params, scale)) is not None:
            found = tensor.double() + change.delta(tensor.double(), part, scale=metadata.scale)
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
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


def test_merging_leaves_its_inputs_alone(tiny_state):
    base = tiny_state()  # float32, so that no cast stands between inputs and arithmetic
    tensors, metadata = adapter_of("bat-in", base)
    tensors |= {"blocks.0.ln1.weight": torch.ones(64)}
    before = {key: tensor.clone() for key, tensor in (base | tensors).items()}
    merged_tensors(base_of(base), [("a", Adapter(tensors, metadata))])
    assert all(torch.equal(before[key], tensor) for key, tensor in (base | tensors).items())
    assert not torch.equal(base["blocks.0.ln1.weight"], torch.ones(64))


def test_several_adapters_apply_in_order(folder):
    base = open_base(folder / "base.pth").tensors
    save_adapter(folder / "a.safetensors", *adapter_of("bat-in", base))
    first = run(folder, "--output_dtype", "fp32", output="first.pth")
    tensors, metadata = adapter_of("bat-out", base, seed=5)
    trained_later = AdapterMetadata("bat-out", RANK, base_fingerprint=fingerprint(run(folder, output="between.pth")))
    save_adapter(folder / "b.safetensors", tensors, trained_later)
    argv = f"--bone_checkpoint {folder}/a.safetensors {folder}/b.safetensors --output_dtype fp32".split()
    argv += f"--base_model {folder}/base.pth --output {folder}/both.pth".split()
    with pytest.raises(UserError, match="b.safetensors was trained on another base.*merge the adapters before it"):
        merge_cli.main(argv)
    merge_cli.main([*argv, "--any_base"])
    both = open_base(folder / "both.pth").tensors
    expected = merged_tensors(base_of(first), [("b", Adapter(tensors, metadata))])
    for key in base:
        torch.testing.assert_close(both[key], expected[key], rtol=1e-5, atol=1e-6)


def test_whole_tensors_take_the_place_of_the_base(folder):
    base = open_base(folder / "base.pth").tensors
    whole = {"blocks.1.att.time_decay": torch.randn(1, 1, 64), "head.weight": torch.randn(80, 64)}
    save_adapter(folder / "a.safetensors", whole | adapter_of("bone", base)[0], AdapterMetadata("bone", RANK))
    merged = run(folder, "--output_dtype", "fp32")
    for key, tensor in whole.items():
        assert torch.equal(merged[key], tensor)


def test_each_adapter_has_a_scale(folder):
    """It scales whole tensors and time states too; a name with "=" is a name if there is such a file."""
    base = open_base(folder / "base.pth").tensors
    whole = {"head.weight": torch.randn(80, 64), "blocks.0.ln1.weight": torch.randn(64)}
    states = {f"blocks.{i}.att.time_state": torch.randn(4, 16, 16) for i in range(2)}
    lora = whole | states | adapter_of("lora", base, seed=3)[0]
    save_adapter(folder / "a=2" / "adapter.safetensors", *adapter_of("bone", base))
    save_adapter(folder / "b.safetensors", lora, AdapterMetadata("lora", RANK))
    flags = ("--bone_checkpoint", f"{folder}/b.safetensors=-0.3", "--output_dtype", "fp32")
    merged = run(folder, *flags, "--state_output", folder / "s.pth", adapter="a=2=0.7")
    bone, lora = (read_adapter(folder / name).modules() for name in ("a=2", "b.safetensors"))
    for key, tensor in base.items():
        due = tensor.double()
        if module := bone.get(key.removesuffix(".weight")):
            due += 0.7 * METHODS["bone"].change.delta(due, module)
            due -= 0.3 * METHODS["lora"].change.delta(due, lora[key.removesuffix(".weight")])
        if key in whole:
            due += -0.3 * (whole[key].double() - due)
        torch.testing.assert_close(merged[key].double(), due, rtol=1e-5, atol=1e-6)
    found = torch.load(folder / "s.pth")
    assert all(torch.allclose(found[key], -0.3 * state, atol=1e-2) for key, state in states.items())
    named, scaled = run(folder, adapter="a=2", output="n.pth"), run(folder, adapter="a=2=1", output="n.pth")
    assert all(torch.equal(named[key], scaled[key]) for key in base)
    for scale, words in (("0", "0 would leave nothing of the change"), ("-1e40", "-1e40 is larger than 100")):
        with pytest.raises(UserError, match=words):
            run(folder, adapter=f"b.safetensors={scale}")
    with pytest.raises(UserError, match="there is no --scale here; it is --adapter FILE=SCALE"):
        run(folder, "--scale", 2)


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
def test_an_adapter_on_a_quantized_base_merges_into_what_it_was_trained_on(folder, quant):
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


def test_the_table_has_a_place_for_every_tensor():
    specs = {key: TensorSpec((4, 4), torch.float32) for key in ("blocks.0.att.key.weight", "blocks.0.ffn.value.weight")}
    changes = {"blocks.0.att.key.weight": 0.1, "blocks.2.ffn.value.weight": 0.2, "blocks.2.ln1.weight": 0.03}
    changes |= {"blocks.2.att.x_r": 0.04, "emb.weight": 0.05}
    lines = change_table([TensorChange(*change) for change in changes.items()], specs).splitlines()
    assert [line.split() for line in lines] == [
        ["block", "att.k", "ffn.v", "others"],
        ["0", "10"],
        ["2", "20", "4"],
        ["-", "5"],
    ]


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


def adapter_file(folder, variant="bat-in", **changes):
    """Write a.safetensors of a method on base.pth -> its {key: tensor}."""
    tensors, metadata = adapter_of(variant, open_base(folder / "base.pth").tensors)
    save_adapter(folder / "a.safetensors", tensors, replace(metadata, **changes))
    return tensors


def test_an_adapter_of_another_base_or_generation_is_refused(folder, tiny_state):
    """Another base can be forced, and another generation is refused before that."""
    save_adapter(folder / "a.safetensors", *adapter_of("bat-in", tiny_state(seed=9)))
    with pytest.raises(UserError, match="trained on another base"):
        run(folder)
    run(folder, "--any_base")
    adapter_file(folder, generation="x070", base_fingerprint="0" * 32)
    with pytest.raises(UserError, match="was trained on an RWKV-7, and .* is an RWKV-6: give the adapter's own base"):
        generate_cli.main(f"--model {folder}/base.pth --adapter {folder}/a.safetensors --prompt a".split())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {f"model.{key}": value for key, value in t.items()}, "no place in the base"),
        (lambda t: {key.replace("blocks.1", "blocks.7"): value for key, value in t.items()}, "no place in the base"),
        (lambda t: t | {"x" * 10_000 + ".bone": torch.ones(8, 8, 8)}, "there is no x{200}…, and the base has"),
        (lambda t: {key: value[:-1] for key, value in t.items()}, "needs .*trained on another model"),
        (lambda t: {key: torch.zeros_like(value) for key, value in t.items()}, "changes nothing"),
        (lambda t: t | {"blocks.0.ln1.weight": torch.ones(3)}, "has shape .3,."),
        (lambda t: t | {"blocks.0.att.key.lora_A": torch.ones(3, 3)}, "holds"),
        (lambda t: t | {"blocks.0.ln1.bone": torch.ones(8, 8, 8)}, "no linear layer"),
        (lambda t: t | {"blocks.0.att.value.bone": torch.ones(0, 8, 8)}, "shape .0, 8, 8."),
        (lambda t: t | {"blocks.0.att.value.bone": torch.tensor(1.0)}, "shape .., which no bat-in adapter has"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_and_leave_no_file(folder, change, message):
    tensors, metadata = adapter_of("bat-in", open_base(folder / "base.pth").tensors)
    save_adapter(folder / "a.safetensors", change(tensors), metadata)
    before = sorted(os.listdir(folder))
    with pytest.raises(UserError, match=message):
        run(folder)
    assert sorted(os.listdir(folder)) == before


def test_a_result_that_is_not_finite_is_refused(folder, tiny_state):
    tensors = adapter_file(folder)
    metadata = read_adapter(folder / "a.safetensors").metadata
    save_adapter(folder / "a.safetensors", {key: tensor * 1e7 for key, tensor in tensors.items()}, metadata)
    with pytest.raises(UserError, match="holds NaN or Inf, after the merge.*too large for float16"):
        run(folder, "--output_dtype", "fp16")
    save_adapter(folder / "a.safetensors", tensors, metadata)
    base = tiny_state()
    base["head.weight"][0, 0] = 1e6
    save_model(folder / "base.pth", base)
    with pytest.raises(UserError, match="head.weight .*base's own values are too large for float16; give --output_"):
        run(folder, "--any_base", "--output_dtype", "fp16")
    assert not (folder / "merged.pth").exists()


@pytest.mark.parametrize(
    "variant, change, flags, message",
    [
        ("lora", lambda tensor: tensor, ("--lora_alpha", 0), "changes no weight: the adapters' change is zero"),
        ("bone", lambda tensor: 1e-8 * tensor, (), "lost in the cast to bfloat16; --output_dtype fp32 keeps it"),
        ("bone", lambda tensor: 1e-20 * tensor, ("--output_dtype", "fp32"), "changes no weight"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
def test_a_merge_that_equals_the_base_is_refused(folder, variant, change, flags, message, dry):
    tensors, _ = adapter_of(variant, open_base(folder / "base.pth").tensors)
    torch.save({key: change(tensor) for key, tensor in tensors.items()}, folder / "a.pth")
    with pytest.raises(UserError, match=message):
        run(folder, *flags, *dry, adapter="a.pth")
    assert sorted(os.listdir(folder)) == ["a.pth", "base.pth"]
    if "keeps it" in message and not dry:
        run(folder, "--output_dtype", "fp32", adapter="a.pth")


@pytest.mark.parametrize(
    "output, flags, message",
    [
        ("base.pth", (), "must not be overwritten"),
        ("link.pth", (), "must not be overwritten"),
        ("a.safetensors", (), "ends in .pth"),
        ("m.pth", ("--bone_checkpoint", "{}/a.safetensors", "{}/again.safetensors"), "twice"),
        ("m.pth", ("--use-gpu",), "there is no --use-gpu here; it is --device cuda"),
        ("m.pth", ("--quant", "4bit"), "4bit of other tools is --quant nf4 here"),
        ("m.pth", ("--state_output", "{}/s.st"), "neither the base nor an adapter holds time states"),
    ],
)
def test_what_contradicts_itself_is_refused_before_the_work(folder, output, flags, message):
    adapter_file(folder)
    os.link(folder / "base.pth", folder / "link.pth")
    os.link(folder / "a.safetensors", folder / "again.safetensors")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=message):
        run(folder, *(flag.format(folder) for flag in flags), output=output)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_an_adapter_that_is_given_as_the_base_is_named(folder):
    adapter_file(folder)
    with pytest.raises(UserError, match="a.safetensors is an adapter, not a base model; give it as --adapter of"):
        train(["--load_model", str(folder / "a.safetensors"), "--data_file", "data"])


def test_an_interrupt_leaves_no_file_and_a_full_disk_is_noticed_before_the_work(folder, monkeypatch):
    adapter_file(folder)

    def interrupted(path, specs, tensors):
        next(iter(tensors))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(merge_cli, "write_pth", interrupted)
        run(folder)
    monkeypatch.setattr("rwkv_peft.checkpoints.atomic.room_at", lambda path: 10)
    with pytest.raises(UserError, match="bytes, and its disk has 10 free"):
        run(folder)
    assert sorted(os.listdir(folder)) == ["a.safetensors", "base.pth"]


def test_the_command_exits_with_2_and_one_message(folder, warm_python):
    adapter_file(folder)
    command = [warm_python, ROOT / "merge_bone.py", "--base_model", folder / "base.pth", "--output", folder / "m.pth"]
    good = subprocess.run([*command, "--bone_checkpoint", folder / "a.safetensors"], capture_output=True, text=True)
    assert good.returncode == 0 and not good.stderr and "wrote" in good.stdout
    for flags in (["--bone_checkpoint", folder / "none.pth"], ["--bone_chekpoint", folder / "a.safetensors"]):
        bad = subprocess.run([*command, *flags], capture_output=True, text=True)
        assert bad.returncode == 2
        assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
