# Finds or makes the Python environment and installs what is missing there.
#
#   sh scripts/setup.sh         set up, and say which python was taken
#   . "$root/scripts/setup.sh"  from another script of this folder: also sets `root` and `python`
#
# On Linux pip's torch comes with CUDA, 5.7 GB. Without an NVIDIA GPU here the CPU build is taken, from pytorch.org,
# unless pip is configured to install from elsewhere. TORCH=pip takes pip's own in any case, TORCH=cpu the CPU build.
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
    "$1" -I -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}

version_of() { "$1" -I -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "unknown"; }

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
        "$candidate" -I -c 'import venv, ensurepip' 2>/dev/null || continue
        say "setup: making .venv with Python $(version_of "$candidate")"
        if "$candidate" -I -m venv "$root/.venv"; then return 0; fi
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

has_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 || [ -e /dev/nvidia0 ] || [ -e /usr/lib/wsl/lib/nvidia-smi ]
}

own_index() {  # does pip's configuration say where to install from?
    case "$("$python" -I -m pip config list)" in *index* | *find-links*) return 0 ;; *) return 1 ;; esac
}

reachable() {  # URL: does it answer within 5 seconds?
    "$python" -I -c 'import signal, sys, urllib.request
signal.alarm(5)  # also where a name is looked up, which has no time-out
urllib.request.urlopen(sys.argv[1])' "$1" >/dev/null 2>&1
}

install_torch() {  # the CPU build, where that is to be had and serves; all else pip installs with the rest
    ! "$python" -I -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null || return 0
    case "${TORCH:-auto}" in
    pip) return 0 ;;
    cpu) cpu_torch ;;
    auto)
        if [ "$(uname -s)" != Linux ] || has_gpu || own_index; then return 0; fi
        if reachable "$cpu_index/torch/"; then
            say "setup: no GPU here, so the CPU build of torch is installed (TORCH=pip takes the one with CUDA)"
            (cpu_torch --retries 1) && return 0
        fi
        say "setup: no GPU here, and $cpu_index cannot be reached: pip's usual torch, with CUDA, is installed"
        ;;
    *) fail "TORCH=$TORCH: one of cpu, pip, auto" ;;
    esac
}

cpu_torch() {  # ARGUMENT…
    pip_install "$@" --index-url "$cpu_index" "$(sed -n 's/^\(torch[<>=][^ #]*\).*/\1/p' "$root/requirements.txt")"
}

downloads() {  # pip's lines -> what it downloads, each line at once; sed would hold them back where no terminal is
    while IFS= read -r line; do
        case "$line" in
        *.metadata*) ;;
        *" Downloading "*" ("*)
            size="${line##* (}" line="${line##* Downloading }"
            line="${line%% (*}"
            line="${line##*/}"
            version="${line#*-}"
            version="${version%.tar.gz}"
            say "    ${line%%-*} ${version%%-*}, ${size%)}"
            ;;
        "Installing collected packages"*) say "    all is there, and is being installed" ;;
        esac
    done
}

pip_install() {  # ARGUMENT…: shows what pip downloads, as it does, and if it fails all that it said; what is never
    # imported, most of these packages, need not be compiled
    log="$environment/.rwkv-peft-pip.log"
    {
        "$python" -I -m pip install --disable-pip-version-check --no-compile --progress-bar off "$@" &&
            echo "setup: installed"
    } 2>&1 | tee "$log" | downloads
    case "$(tail -n 1 "$log")" in
    "setup: installed") rm "$log" ;;
    *)
        cat "$log" >&2
        fail "pip install $* failed: see the lines above; run again when they are mended"
        ;;
    esac
}

put_in() {  # what install is to install, unless another setup has done so meanwhile
    stamped && return 0
    say "setup: installing into $environment (a few minutes the first time)"
    "$python" -I -m pip --version >/dev/null 2>&1 || "$python" -I -m ensurepip >/dev/null 2>&1 ||
        fail "$environment has no pip; install it there, and run again"
    install_torch
    cd "$root" || return
    # shellcheck disable=SC2086 # $what is a list of arguments without spaces of their own
    pip_install $what
    printf '%s\n' "$wanted" >"$stamp"
}

install() {  # NAME WHAT FILE…: pip install WHAT, unless the stamp NAME shows that FILEs and this folder are unchanged
    stamp="$environment/.rwkv-peft-$1"
    what="$2"
    shift 2
    wanted="$(printf '%s\n' "$root"; cat "$@")"
    stamped || alone "$environment/.rwkv-peft-lock" put_in || exit 1
}

install_tests() {  # what the tests need, those of Hugging Face models and of the documentation too
    install requirements-test "-r requirements-test.txt -r requirements-hf.txt -r requirements-docs.txt" \
        "$root/requirements-test.txt" "$root/requirements-hf.txt" "$root/requirements-docs.txt"
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
cpu_index=https://download.pytorch.org/whl/cpu
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
