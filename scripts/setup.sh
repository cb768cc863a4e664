# Finds or makes the Python environment and installs what is missing there.
#
#   sh scripts/setup.sh         set up, and say which python was taken
#   . "$root/scripts/setup.sh"  from another script of this folder: also sets `root` and `python`
#
# An active environment (venv, conda) is used as it is; otherwise .venv is made beside this repository's files.
# A stamp in the environment records what was installed, so that a second run costs nothing; one that begins meanwhile
# waits.

say() { printf '%s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

supported() {  # PYTHON: is it one of the versions that every dependency has wheels for?
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}

version_of() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "unknown"; }

gone() {  # LOCK: was it left by a setup of this machine that is no more?
    read -r machine process 2>/dev/null <"$1/owner" && [ "$machine" = "$(uname -n)" ] &&
        ! kill -0 "$process" 2>/dev/null && [ ! -d "/proc/$process" ]
}

alone() {  # LOCK COMMAND…: runs it while no other setup has the folder LOCK, which is made for this and removed again
    lock="$1" vanished=""
    shift
    until mkdir "$lock" 2>/dev/null; do
        if gone "$lock"; then
            rm -r "$lock"
        elif [ -d "$lock" ]; then
            [ "${awaited:-}" = "$lock" ] ||
                say "setup: another one goes on here, and is waited for; where there is none, delete $lock"
            awaited="$lock" vanished=""
            sleep 1
        else
            [ -z "$vanished" ] || fail "cannot make $lock; is that folder writable, and the disk not full?"
            vanished=1 # the other one may have been done this moment
        fi
    done
    (
        trap 'rm -r "$lock"' EXIT
        trap 'exit 129' HUP
        trap 'exit 130' INT
        trap 'exit 143' TERM
        printf '%s %s\n' "$(uname -n)" "$$" >"$lock/owner"
        "$@"
    )
}

make_venv() {  # The first supported interpreter that can make an environment makes .venv.
    found=""
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        { command -v "$candidate" >/dev/null 2>&1 && supported "$candidate"; } || continue
        found="$candidate"
        "$candidate" -c 'import venv, ensurepip' 2>/dev/null || continue
        say "setup: making .venv with Python $(version_of "$candidate")"
        if "$candidate" -m venv "$root/.venv"; then return 0; fi
        rm -rf "$root/.venv"
    done
    [ -z "$found" ] && fail "no Python 3.10 to 3.14 in PATH (python3 is $(version_of python3)); install one" \
        "(Debian, Ubuntu: apt install python3 python3-venv), or activate an environment that has one"
    fail "$found cannot make a virtual environment: its venv or ensurepip module is missing; install it" \
        "(Debian, Ubuntu: apt install python3-venv), or activate an environment of your own"
}

make_own() {  # .venv, unless another setup has made it meanwhile
    supported "$python" && return 0
    [ ! -d "$environment" ] ||
        fail "$environment is broken or has an unsupported Python; delete it (rm -r .venv), and run again"
    make_venv
}

choose_python() {
    environment="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    if [ -n "$environment" ]; then
        python="$environment/bin/python"
        [ -x "$python" ] || fail "the active environment $environment has no bin/python; deactivate it, and run again"
        supported "$python" || fail "the active environment $environment has Python $(version_of "$python")," \
            "and 3.10 to 3.14 is needed; deactivate it, and run again"
        return 0
    fi
    environment="$root/.venv"
    python="$environment/bin/python"
    if [ -d "$root/.venv-lock" ] || ! supported "$python"; then
        alone "$root/.venv-lock" make_own || exit 1
    fi
}

stamped() { [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; }

put_in() {  # what install is to install, unless another setup has done so meanwhile
    stamped && return 0
    say "setup: installing into $environment (a few minutes the first time)"
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 ||
        fail "$environment has no pip; install it there, and run again"
    # shellcheck disable=SC2086 # $what is a list of arguments without spaces of their own
    (cd "$root" && "$python" -m pip install --quiet --disable-pip-version-check $what) ||
        fail "pip install $what failed: see the lines above; run again when they are mended"
    printf '%s\n' "$wanted" >"$stamp"
}

install() {  # NAME WHAT FILE…: pip install WHAT, unless the stamp NAME shows that FILEs and this folder are unchanged
    stamp="$environment/.rwkv-peft-$1"
    what="$2"
    shift 2
    wanted="$(printf '%s\n' "$root"; cat "$@")"
    stamped || alone "$environment/.rwkv-peft-lock" put_in || exit 1
}

install_tests() {  # what the tests need, those of Hugging Face models too
    install requirements-test "-r requirements-test.txt -r requirements-hf.txt" "$root/requirements-test.txt" \
        "$root/requirements-hf.txt"
}

quoted() {  # PATH as a shell reads it
    case "$1" in
    *[!A-Za-z0-9_./-]*) printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf '%s' "$1" ;;
    esac
}

activate() {  # the line that makes the environment's commands those of a shell
    if [ -f "$environment/bin/activate" ]; then
        say ". $(quoted "$environment/bin/activate")"
    else
        say "conda activate $(quoted "$environment")"
    fi
}

root="$(cd "$(dirname "$0")/.." && pwd)"
choose_python
PATH="$(dirname "$python"):$PATH" # ninja is looked up there
export PATH
# As rwkv_peft/__init__.py does, which says why, for programs that load torch before it, such as the tests.
GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"
export GOMP_SPINCOUNT
install requirements "-e ." "$root/requirements.txt" "$root/pyproject.toml"
case "$0" in
*setup.sh)
    say "setup: ready, $python (Python $(version_of "$python")); in each new shell:"
    say ""
    say "    $(activate)"
    ;;
esac
