"""scripts/setup.sh chooses the right Python, or says which one is missing and how to get it."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
FAKE_PYTHON = """#!/bin/sh
# Answers setup.sh's questions as a Python {version} would; records what it is told to do.
case "$*" in
*"sys.version_info"*) exit {unsupported} ;;
*"platform"*) echo {version} ;;
*"import venv, ensurepip"*) exit {no_venv} ;;
*"m.version"*) exit {no_torch} ;;
*"pip config list"*) echo "{config}" ;;
*"urllib"*) exit {unreachable} ;;
*"-m venv"*) mkdir -p "$4/bin" && {pause} && cp "$0" "$4/bin/python" ;;
*"-m pip install"*) {pause} && echo "$*" >>"$(dirname "$0")/installed" && echo "{said}" ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """A folder with setup.sh in it, and a PATH that holds no Python yet."""
    (tmp_path / "repo/scripts").mkdir(parents=True)
    shutil.copy(SCRIPTS / "setup.sh", tmp_path / "repo/scripts")
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / "repo" / name).write_text("first\n")
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "dirname", "cat", "rm", "mkdir", "cp", "sleep", "uname", "sed", "tee", "tail"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return tmp_path


ANSWERS = {"version": "3.11.7", "unsupported": 0, "no_venv": 0, "pause": "true", "said": ""}
ANSWERS |= {"no_torch": 0, "config": "", "unreachable": 1}


def add_python(folder, name, **answers):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(FAKE_PYTHON.format(**ANSWERS | answers))
    path.chmod(0o755)


def start(machine, **environment):
    """Start a setup in a session of its own."""
    return subprocess.Popen(
        [shutil.which("sh"), str(machine / "repo/scripts/setup.sh")],
        env={"PATH": str(machine / "bin"), "HOME": str(machine), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def setup(machine, **environment):
    process = start(machine, **environment)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def installs(environment):
    record = environment / "bin" / "installed"
    return record.read_text().splitlines() if record.exists() else []


def test_without_an_environment_one_is_made_and_filled_once(machine):
    add_python(machine / "bin", "python3")
    for _ in range(2):
        done = setup(machine)
        assert done.returncode == 0, done.stderr
    assert len(installs(machine / "repo/.venv")) == 1
    assert done.stdout.endswith(f"\n    conda activate {machine}/repo/.venv\n")  # this one has no bin/activate
    (machine / "repo/.venv/bin/activate").touch()
    assert setup(machine).stdout.endswith(f"\n    . {machine}/repo/.venv/bin/activate\n")


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="a GPU is here")
@pytest.mark.parametrize(
    "answers, torch, told",
    [
        ({"unreachable": 0}, "cpu", "so the CPU build of torch is installed (TORCH=pip"),
        ({"unreachable": 1}, "", "cannot be reached: pip's usual torch, with CUDA, is installed"),
        ({"unreachable": 0, "config": "global.index-url='https://mirror'"}, "", ""),
        ({"unreachable": 0, "config": ":env:.find-links='/wheels'"}, "", ""),
        ({"unreachable": 0, "no_torch": 0}, "", ""),
        ({"unreachable": 0, "TORCH": "pip"}, "", ""),
        ({"unreachable": 1, "TORCH": "cpu"}, "cpu", ""),
    ],
)
def test_without_a_gpu_the_cpu_build_of_torch_is_taken_where_it_can_be(machine, answers, torch, told):
    (machine / "repo/requirements.txt").write_text("torch>=2.6,<3  # why\ntorchlike>=1\n")
    variables = {name: answers[name] for name in answers if name.isupper()}
    add_python(
        machine / "bin", "python3", **{"no_torch": 1} | {name: answers[name] for name in answers if name.islower()}
    )
    done = setup(machine, **variables)
    commands = installs(machine / "repo/.venv")
    assert done.returncode == 0 and told in done.stdout and ("GPU" in done.stdout) == bool(told)
    assert len(commands) == 1 + bool(torch) and commands[-1].endswith(" -e .")
    if torch:
        assert commands[0].endswith("--index-url https://download.pytorch.org/whl/cpu torch>=2.6,<3")


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="a GPU is here")
def test_a_cpu_build_that_does_not_come_gives_way_to_the_usual_torch(machine):
    (machine / "repo/requirements.txt").write_text("torch>=2.6,<3\n")
    broken = 'case "$*" in *--index-url*) exit 1 ;; esac'
    add_python(machine / "bin", "python3", no_torch=1, unreachable=0, pause=broken)
    done = setup(machine)
    assert done.returncode == 0 and "pip's usual torch, with CUDA, is installed" in done.stdout
    assert [command.endswith(" -e .") for command in installs(machine / "repo/.venv")] == [True]


def test_a_gpu_gets_the_usual_torch(machine):
    (machine / "bin/nvidia-smi").symlink_to(shutil.which("true"))
    add_python(machine / "bin", "python3", no_torch=1, unreachable=0)
    assert "CPU build" not in setup(machine).stdout and len(installs(machine / "repo/.venv")) == 1


def test_what_pip_downloads_is_shown_and_no_more(machine):
    lines = (
        "Collecting torch",
        "  Downloading https://x.org/whl/torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl (184.5 MB)",
        "  Downloading numpy-2.3.1-cp311-cp311-linux_x86_64.whl.metadata (62 kB)",
        "Requirement already satisfied: filelock",
        "Installing collected packages: torch",
    )
    add_python(machine / "bin", "python3", said="\n".join(lines))
    out = setup(machine).stdout
    assert "    torch 2.13.0+cpu, 184.5 MB\n    all is there" in out
    assert not any(word in out for word in ("numpy", "Collecting", "filelock"))


def test_a_download_is_shown_before_the_next_begins(machine):
    waits = 'n=0; until [ -e "$HOME/seen" ]; do n=$((n + 1)); [ $n -lt 2400 ] || exit 1; sleep 0.05; done'
    add_python(machine / "bin", "python3", said=f'  Downloading some-1.0.tar.gz (3 kB)"; {waits}; echo "')
    process = start(machine)
    while "some" not in (line := process.stdout.readline()):
        assert line
    (machine / "seen").touch()
    process.communicate(timeout=60)
    assert (line, process.returncode) == ("    some 1.0, 3 kB\n", 0)


def locks(machine):
    return list((machine / "repo").rglob("*lock"))


def test_setups_that_begin_at_once_make_one_environment(machine):
    add_python(machine / "bin", "python3", pause="sleep 0.3")
    processes = [start(machine) for _ in range(3)]
    told = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], told
    assert sum(out.count("making .venv") for out, _ in told) == 1
    assert len(installs(machine / "repo/.venv")) == 1 and not locks(machine)


@pytest.mark.parametrize("owner", [None, "another-machine 1\n"])
def test_a_setup_that_may_go_on_is_waited_for_and_told(machine, owner):
    add_python(machine / "bin", "python3")
    (lock := machine / "repo/.venv-lock").mkdir()
    if owner is not None:
        (lock / "owner").write_text(owner)
    process = start(machine)
    assert "goes on here, and is waited for; where there is none, delete " in (line := process.stdout.readline())
    shutil.rmtree(line.split()[-1])
    process.communicate(timeout=60)
    assert process.returncode == 0 and len(installs(machine / "repo/.venv")) == 1


def test_a_setup_that_was_killed_holds_up_no_other(machine):
    add_python(machine / "bin", "python3", pause='{ [ ! -e "$HOME/long" ] || sleep 60; }')
    setup(machine)
    (machine / "repo/requirements.txt").write_text("second\n")
    (machine / "long").touch()
    process = start(machine)
    assert "installing" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert locks(machine)
    (machine / "long").unlink()
    assert setup(machine).returncode == 0 and len(installs(machine / "repo/.venv")) == 2 and not locks(machine)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_setup_that_is_interrupted_holds_up_no_other(machine, number):
    add_python(machine / "bin", "python3", pause='{ [ ! -e "$HOME/long" ] || sleep 60; }')
    setup(machine)
    (machine / "repo/requirements.txt").write_text("second\n")
    (machine / "long").touch()
    process = start(machine)
    assert "installing" in process.stdout.readline()
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not locks(machine)
    (machine / "long").unlink()
    assert setup(machine).returncode == 0 and len(installs(machine / "repo/.venv")) == 2


def test_changed_requirements_are_installed_again(machine):
    add_python(machine / "bin", "python3")
    setup(machine)
    (machine / "repo/requirements.txt").write_text("second\n")
    setup(machine)
    assert len(installs(machine / "repo/.venv")) == 2


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_is_used_as_it_is(machine, variable):
    add_python(machine / "mine/bin", "python")
    done = setup(machine, **{variable: str(machine / "mine")})
    assert done.returncode == 0, done.stderr
    assert len(installs(machine / "mine")) == 1 and not (machine / "repo/.venv").exists()


def test_another_python_in_path_stands_in_for_an_old_or_crippled_one(machine):
    add_python(machine / "bin", "python3", version="3.9.2", unsupported=1)
    add_python(machine / "bin", "python3.12", version="3.12.1", no_venv=1)
    add_python(machine / "bin", "python3.10", version="3.10.4")
    done = setup(machine)
    assert done.returncode == 0 and "Python 3.10.4" in done.stdout


def test_an_old_python_alone_is_named_with_the_remedy(machine):
    add_python(machine / "bin", "python3", version="3.9.2", unsupported=1)
    done = setup(machine)
    assert done.returncode == 1 and "3.9.2" in done.stderr and "apt install" in done.stderr


def test_a_missing_venv_module_is_named_with_the_remedy(machine):
    add_python(machine / "bin", "python3", no_venv=1)
    done = setup(machine)
    assert done.returncode == 1 and "python3-venv" in done.stderr


def test_an_active_environment_with_an_old_python_is_refused(machine):
    add_python(machine / "mine/bin", "python", version="3.9.2", unsupported=1)
    done = setup(machine, VIRTUAL_ENV=str(machine / "mine"))
    assert done.returncode == 1 and "3.9.2" in done.stderr and "deactivate" in done.stderr


def test_a_failed_install_is_an_error_and_tried_again(machine):
    add_python(machine / "bin", "python3")
    setup(machine)
    python = machine / "repo/.venv/bin/python"
    python.write_text(python.read_text().replace('*"-m pip install"*)', '*"-m pip install"*) exit 1 #'))
    (machine / "repo/requirements.txt").write_text("second\n")
    assert setup(machine).returncode == 1 and setup(machine).returncode == 1
