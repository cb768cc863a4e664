"""The examples for Kubernetes and SkyPilot: they are what these read, and train.py and torchrun take their flags."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from rwkv_peft.training.flags.request import parse_flags

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def check_goes_on(argv, tmp_path, monkeypatch):
    """Check that train.py takes flags, that nothing there contradicts, and that such a run outlives its nodes."""
    monkeypatch.chdir(tmp_path)
    given = [word.replace("/data/", f"{tmp_path}/") for word in argv]
    train = parse_flags(given).train
    assert train.resume == "auto" and (train.save_minutes or train.save_every)
    return train


@pytest.fixture
def alone(monkeypatch):
    """Variables of one node of eight ranks, as torchrun sets them for the first."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a"}
    for name, value in (place | {"TORCHELASTIC_RUN_ID": "x"}).items():
        monkeypatch.setenv(name, value)


def test_pods_find_each_other_and_share_a_step_however_many_there_are(tmp_path, monkeypatch, alone):
    service, job = yaml.safe_load_all((SCRIPTS / "kubernetes_example.yaml").read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert service["spec"]["selector"] == {"job-name": name} and pod["subdomain"] == service["metadata"]["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["command"] == ["torchrun"]
    told = get_args_parser().parse_args(container["args"])
    least, most = map(int, told.nnodes.split(":"))
    assert told.training_script == "train.py" and told.rdzv_endpoint.startswith(f"{name}-0.{pod['subdomain']}:")
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in {variable["name"] for variable in container["env"]}
    assert spec["completions"] == spec["parallelism"] == most
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(told.nproc_per_node)
    for nodes in range(least, most + 1):
        monkeypatch.setenv("WORLD_SIZE", str(8 * nodes))
        train = check_goes_on(told.training_script_args, tmp_path, monkeypatch)
        assert train.ranks * train.accumulate_grad_batches == 4 * 8 * 3


def test_nodes_of_skypilot_start_one_run(tmp_path, monkeypatch):
    job = yaml.safe_load((SCRIPTS / "skypilot_example.yaml").read_text())
    for script in (job["setup"], job["run"]):
        assert subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True).stderr == ""
    (gpus,) = re.findall(r":(\d+)$", job["resources"]["accelerators"])
    variables = {"NODE_IPS": "10.0.0.1\n10.0.0.2", "NODE_RANK": "1", "NUM_NODES": str(job["num_nodes"])}
    variables |= {"NUM_GPUS_PER_NODE": gpus}
    telling = """sh -c 'printf "%s\\n" "$MASTER_ADDR" "$NODE_RANK" "$@"' sh"""
    run = job["run"].replace(". .venv/bin/activate\n", "").replace("python train.py", telling)
    given = {f"SKYPILOT_{name}": value for name, value in variables.items()}
    done = subprocess.run(["sh", "-eu"], input=run, env=os.environ | given, text=True, capture_output=True)
    address, rank, *flags = done.stdout.splitlines()
    assert (done.stderr, address, rank) == ("", "10.0.0.1", "1")
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("NODE_RANK", rank)
    train = check_goes_on(flags, tmp_path, monkeypatch)
    assert (train.num_nodes, train.devices) == (2, int(gpus)) and list(job["volumes"]) == ["/data"]
