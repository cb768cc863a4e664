"""scripts/setup.sh chooses the right Python and the right torch, or names the one that is missing and its remedy."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TOOLS = "sh dirname cat rm mkdir cp sed tr tail printenv awk touch sleep flock"
# Answers setup.sh's questions as a Python {version} would; `pip install` of the lock's uv brings $HOME/uv.
PYTHON = """#!/bin/sh
here="$(dirname "$0")"
case "$*" in
*version_info*) exit {unsupported} ;;
*find_spec*) [ -e "$here/rwkv-peft" ] ;;
*"pip config list"*) cat "$HOME/config" ;;
*"-m venv"*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python"; exit {no_venv} ;;
*"pip install"*--require-hashes*) cat >"$HOME/uv.txt" && cp "$HOME/uv" "$here/uv" ;;
*"pip install"*) echo "pip $*" >>"$HOME/calls" && touch "$here/rwkv-peft" ;;
esac
"""
# What uv pip is asked is in $HOME/calls, what the environment holds in $HOME/held.
UV = """#!/bin/sh
case "$*" in
*" show "*) [ -e "$HOME/torch" ] ;;
*--dry-run*) [ ! -e "$HOME/unreachable" ] || { echo "error"; echo "  cause: no such host" >&2; exit 2; } ;;
*--no-index*) for last; do :; done; [ "$(cat "$HOME/held")" = "${last#rwkv-peft}" ] ;;
*--editable*)
    echo "$*" >>"$HOME/calls"
    [ ! -e "$HOME/long" ] || exec sleep 60
    printenv >"$HOME/environment"
    [ ! -e "$HOME/failing" ] || exit 1
    [ ! -e "$HOME/slow" ] || sleep 0.2
    while [ "$1" != --editable ]; do shift; done
    echo "${2#.}" >"$HOME/held"
    touch "$(dirname "$0")/rwkv-peft"
    ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """A folder with setup.sh in it, and a PATH that holds no Python yet."""
    (tmp_path / "repo/scripts").mkdir(parents=True)
    text = (SCRIPTS / "setup.sh").read_text().replace("/proc/", f"{tmp_path}/proc/")
    (tmp_path / "repo/scripts/setup.sh").write_text(text)
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / "repo" / name).touch()
    (tmp_path / "repo/requirements.lock").write_text(
        "tqdm==1 \\\n    --hash=sha256:1\nuv==2 \\\n    --hash=sha256:2\nz==3\n"
    )
    (tmp_path / "config").touch()
    executable(tmp_path / "uv", UV)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS.split():
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def add_python(folder, name="python3", unsupported=0, no_venv=0):
    text = PYTHON.replace("{unsupported}", str(unsupported)).replace("{no_venv}", str(no_venv))
    executable(folder / name, text)


def start(machine, *extras, **environment):
    """Start a setup in a session of its own."""
    command = [shutil.which("sh"), str(machine / "repo/scripts/setup.sh"), *extras]
    how = dict(env={"PATH": str(machine / "bin"), "HOME": str(machine), **environment}, start_new_session=True)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def setup(machine, *extras, **environment):
    process = start(machine, *extras, **environment)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def calls(machine):
    record = machine / "calls"
    return record.read_text().splitlines() if record.exists() else []


def test_an_environment_is_made_and_filled_when_that_is_due_and_no_more(machine):
    add_python(machine / "bin")
    environment, repo = machine / "repo/.venv", machine / "repo"
    for count, extras in ((1, ()), (1, ()), (2, ("serve", "hf")), (2, ("serve", "hf")), (3, ())):
        done = setup(machine, *extras)
        assert done.returncode == 0, done.stderr
        assert len(calls(machine)) == count
    assert "--editable .[serve,hf] " in calls(machine)[1]
    for name in ("requirements.txt", "pyproject.toml"):
        os.utime(repo / name, (2**31, 2**31))  # as a pull of a newer one
        setup(machine)
        assert len(calls(machine)) == (count := count + 1)
        os.utime(repo / name, (0, 0))
    assert done.stdout.endswith(f"\n    conda activate '{environment}'\n")  # this one has no bin/activate
    (environment / "bin/activate").touch()
    assert setup(machine).stdout.endswith(f"\n    . '{environment}/bin/activate'\n")


def test_uv_is_the_locks_and_installs_with_its_hashes(machine):
    add_python(machine / "bin")
    setup(machine)
    assert (machine / "uv.txt").read_text() == "uv==2 \\\n    --hash=sha256:2\n"
    assert "UV_CONSTRAINT= requirements.lock\n" in (machine / "environment").read_text()
    assert "--build-constraints requirements.lock" in calls(machine)[0]


def test_without_uv_pip_installs_the_locks_versions(machine):
    add_python(machine / "bin")
    (machine / "uv").unlink()
    assert "uv cannot be had, so pip installs, and checks no hashes" in setup(machine, "hf").stdout
    constraint = machine / "repo/.venv/requirements.lock"
    assert calls(machine) == [f"pip -I -m pip install --quiet --constraint {constraint} --editable .[hf]"]
    assert constraint.read_text() == "tqdm==1\nuv==2\nz==3\n"


@pytest.mark.parametrize(
    "cards, present, variables, build, limit",
    [
        ("", "", {}, "cpu", ""),  # also beside Intel's graphics
        ("", "proc/driver/nvidia", {}, "auto", ""),
        ("", "bin/rocm_agent_enumerator", {}, "auto", ""),
        ("", "torch", {}, "", ""),
        ("", "", {"TORCH": "pip"}, "", ""),
        ("", "torch", {"TORCH": "cpu"}, "cpu", ""),
        ("9.0, 580.65.06", "torch", {"TORCH": "auto"}, "auto", ""),  # set up on a node without a card
        ("", "torch", {"TORCH": "auto"}, "cpu", ""),
        ("7.0, 580.65.06", "", {}, "cu126", ""),
        ("7.0, 580.65.06", "torch", {}, "", ""),
        ("9.0, 580.65.06\n6.1, 580.65.06", "", {}, "cu126", ""),
        ("7.0, 470.82.01", "", {}, "auto", ""),  # whose driver has no CUDA 12
        ("7.5, 580.65.06", "", {}, "auto", ""),
        ("12.0, 580.65.06", "", {}, "auto", ""),
        ("8.6, 550.54.14", "", {}, "auto", ""),
        ("7.0, 580.65.06", "", {"TORCH": "cpu"}, "cpu", ""),
        ("8.6, 550.54.14", "", {"TORCH": "pip"}, "", "torch<2.11"),
        ("", "unreachable", {}, "", ""),
        ("8.6, 550.54.14", "unreachable", {}, "", "torch<2.11"),
        ("7.0, 550.54.14", "unreachable", {}, "", "torch<2.8"),
        ("8.6, 580.65.06", "unreachable", {}, "", ""),
        ("8.6, 550.54.14", "torch", {}, "", ""),
    ],
)
def test_the_build_of_torch_suits_driver_card_and_user(machine, cards, present, variables, build, limit):
    add_python(machine / "bin")
    if present:
        executable(machine / present, "#!/bin/sh\n")
    executable(machine / "bin/nvidia-smi", f"#!/bin/sh\n[ -n '{cards}' ] && printf '%s' '{cards}'\n")
    done = setup(machine, **variables)
    (call,) = calls(machine)
    assert done.returncode == 0
    looked = "--torch-backend" in call or limit or present == "unreachable" or variables.get("TORCH") == "pip"
    assert ("below compute capability 8.0: training takes fp16" in done.stdout) == (cards[:1] == "7" and bool(looked))
    assert ("torch is taken, since its own builds cannot be had" in done.stdout) == (present == "unreachable")
    assert call.partition("--torch-backend ")[2].partition(" ")[0] == build
    assert [word for word in call.split() if word.startswith("torch<")] == limit.split()
    assert ("--reinstall-package torch" in call) == bool(variables)


def test_a_build_of_torch_that_is_named_and_cannot_be_had_is_an_error(machine):
    add_python(machine / "bin")
    (machine / "unreachable").touch()
    done = setup(machine, TORCH="cu999")
    assert done.returncode == 1 and "TORCH=cu999: see above" in done.stderr and not calls(machine)


@pytest.mark.parametrize(
    "config, variables, expected",
    [
        ("global.index-url='https://a/b'", {}, {"UV_DEFAULT_INDEX": "https://a/b"}),
        ("install.extra-index-url='\\nhttps://a\\nhttps://b'", {}, {"UV_INDEX": "https://a https://b"}),
        ("global.find-links='/b'\nglobal.no-index='1'", {}, {"UV_FIND_LINKS": "/b", "UV_NO_INDEX": "1"}),
        (":env:.find-links='/a /c'\nglobal.find-links='/b'", {}, {"UV_FIND_LINKS": "/a,/c"}),
        ("global.index-url='a'", {"UV_DEFAULT_INDEX": "b"}, {"UV_DEFAULT_INDEX": "b"}),
        ("global.constraint='/a.txt'", {}, {"UV_CONSTRAINT": "/a.txt requirements.lock"}),
        ("global.timeout='5'", {}, {}),
    ],
)
def test_uv_installs_from_where_pip_is_configured_to(machine, config, variables, expected):
    add_python(machine / "bin")
    (machine / "config").write_text(config + "\n")
    setup(machine, **variables)
    lines = (machine / "environment").read_text().splitlines()
    found = dict(line.partition("=")[::2] for line in lines if line.startswith("UV_"))
    found.pop("UV_INDEX_STRATEGY")
    assert found == {"UV_CONSTRAINT": " requirements.lock"} | expected


def test_setups_that_begin_at_once_make_one_environment(machine):
    add_python(machine / "bin")
    (machine / "slow").touch()
    processes = [start(machine) for _ in range(3)]
    told = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], told
    assert (machine / "repo/.venv/bin/rwkv-peft").exists() and not any(err for _, err in told)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_setup_that_was_ended_holds_up_no_other(machine, number):
    add_python(machine / "bin")
    (machine / "long").touch()
    process = start(machine)
    assert "installing" in process.stdout.readline()
    while not calls(machine):
        assert process.poll() is None
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    (machine / "long").unlink()
    done = setup(machine)
    assert process.returncode != 0 == done.returncode


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_is_taken(machine, variable):
    add_python(machine / "mine/bin", "python")
    done = setup(machine, **{variable: str(machine / "mine")})
    assert done.returncode == 0, done.stderr
    assert f"--python {machine}/mine/bin/python " in calls(machine)[0] and not (machine / "repo/.venv").exists()


def test_another_python_in_path_stands_in_for_an_old_or_crippled_one(machine):
    add_python(machine / "bin", "python3", unsupported=1)
    add_python(machine / "bin", "python3.12", no_venv=1)
    add_python(machine / "bin", "python3.10")
    assert setup(machine).returncode == 0
    assert (machine / "repo/.venv/bin/python").read_text() == (machine / "bin/python3.10").read_text()


@pytest.mark.parametrize(
    "place, answers, words",
    [
        ("bin/python3", {"unsupported": 1}, ("no Python 3.10 to 3.14 makes", "apt install")),
        ("bin/python3", {"no_venv": 1}, ("python3-venv",)),
        ("mine/bin/python", {"unsupported": 1}, ("/mine has no Python 3.10 to 3.14", "deactivate")),
        ("repo/.venv/bin/python", {"unsupported": 1}, ("/.venv has no Python 3.10 to 3.14", "delete")),
    ],
)
def test_a_python_that_does_not_serve_is_named_with_the_remedy(machine, place, answers, words):
    add_python((machine / place).parent, (machine / place).name, **answers)
    done = setup(machine, **({"VIRTUAL_ENV": str(machine / "mine")} if "mine" in place else {}))
    assert done.returncode == 1 and all(word in done.stderr for word in words)
    assert (machine / "repo/.venv").exists() == (".venv" in place)


def test_a_failed_install_is_an_error_and_tried_again(machine):
    add_python(machine / "bin")
    (machine / "failing").touch()
    for count in (1, 2):
        done = setup(machine)
        assert done.returncode == 1 and "the installation failed" in done.stderr and len(calls(machine)) == count
    (machine / "failing").unlink()
    assert setup(machine).returncode == 0
