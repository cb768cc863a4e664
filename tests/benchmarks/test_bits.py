"""bits.py: what it compares."""

import subprocess

import pytest

from programs import ROOT


def test_the_runs_and_parts_that_differ_are_named(benchmark):
    bits, machine = benchmark("bits"), {"processor": "one"}
    before = {"machine": machine, "lora": {"losses": "1", "model": "2"}, "muon": {"losses": "3"}}
    after = before | {"lora": {"losses": "1", "model": "4"}, "fp16": {"losses": "5"}}
    assert bits.differences(before, before) == []
    assert bits.differences(before, after) == ["lora (model)", "fp16 (losses)"]
    with pytest.raises(SystemExit, match="another machine"):
        bits.differences(before, after | {"machine": {"processor": "two"}})


def test_a_commit_is_a_checkout_of_its_files(benchmark, tmp_path):
    if subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("these files are not in a git repository")
    bits = benchmark("bits")
    assert bits.checkout(str(ROOT), tmp_path) == ROOT
    root = bits.checkout("HEAD", tmp_path)
    assert (root / "demo" / "rwkv6-demo.pth").read_bytes() == (ROOT / "demo" / "rwkv6-demo.pth").read_bytes()
    with pytest.raises(SystemExit, match="no commit"):
        bits.checkout("no-such-commit", tmp_path)
