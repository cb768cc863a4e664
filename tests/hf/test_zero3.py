"""Bone under DeepSpeed's ZeRO-3, where a layer's weight is there only while it is in use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_training_under_zero_3_is_training_without_it():
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("zero3_steps.py"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    traces = json.loads(done.stdout.split("TRACES ")[1])
    for plain, zero in traces.values():
        assert plain[0] > plain[1] > plain[2]
        assert zero == pytest.approx(plain, rel=1e-6)
