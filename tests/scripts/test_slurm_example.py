"""The example for Slurm: train.py takes its command, and the job is queued again if that helps."""

import os
import subprocess
from pathlib import Path

import pytest

from rwkv_peft.training.flags.parser import build_parser

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "slurm_example.sh"
TOOLS = {
    "srun": 'shift; "$@"',
    "python": 'printf "%s\\n" "$@" >arguments; exit "$CODE"',
    "scontrol": 'echo "$*" >requeued',
}


@pytest.mark.parametrize(
    "code, restarts, requeued",
    [(0, 0, False), (2, 0, False), (75, 0, True), (143, 0, True), (1, 19, True), (1, 20, False)],
)
def test_it_is_queued_again_where_that_helps(tmp_path, code, restarts, requeued):
    for name, text in TOOLS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    variables = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "CODE": str(code),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "17",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    done = subprocess.run(["sh", SCRIPT], env=os.environ | variables, capture_output=True, text=True)
    assert done.stderr == ""
    assert (tmp_path / "requeued").exists() == requeued and done.returncode == (0 if requeued else code)
    script, *flags = (tmp_path / "arguments").read_text().splitlines()
    args = build_parser().parse_args(flags)
    lines = SCRIPT.read_text()
    assert script == "train.py" and args.resume == "auto" and args.save_every
    assert f"--nodes={args.num_nodes}\n" in lines and f"--ntasks-per-node={args.devices}\n" in lines
