# Finds or makes the Python environment, and installs what is missing there, in the versions of requirements.lock.
#
#   sh scripts/setup.sh [EXTRA…]   sets up, with some of pyproject.toml's extras: sh scripts/setup.sh serve hf
#   needs=serve; . setup.sh        from another script of this folder: also sets `root`, `python` and `activate`
#
# An active environment (venv, conda) is taken, otherwise .venv beside this repository's files. uv installs from where
# pip is configured to, and chooses torch's build by the driver. TORCH installs torch anew: auto by the driver that is
# there now, cpu, cu126, … by that name (uv's --torch-backend), pip from the package index, on Linux one with CUDA.

say() { printf '%s\n' "$@"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

supported() { "$1" -I -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; }

make_environment() {  # by the first Python that can
    [ ! -e "$environment" ] || fail "$environment has no Python 3.10 to 3.14 that runs; deactivate or delete it"
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if supported "$candidate" && "$candidate" -I -m venv "$environment"; then return; fi
        rm -rf "$environment"
    done
    fail "no Python 3.10 to 3.14 makes an environment here; install one (apt install python3 python3-venv)"
}

take_pip_settings() {  # as uv's, unless those are set
    settings="$("$python" -I -m pip config list 2>/dev/null)"
    for pair in index-url=UV_DEFAULT_INDEX extra-index-url=UV_INDEX no-index=UV_NO_INDEX trusted-host=UV_INSECURE_HOST \
        constraint=UV_CONSTRAINT find-links=UV_FIND_LINKS; do
        value="$(say "$settings" | sed -n "s/^[^=]*\.${pair%=*}='\(.*\)'\$/\1/p" | sed '1! d; s/\\n/ /g; s/^ *//')"
        [ "$pair" != find-links=UV_FIND_LINKS ] || value="$(say "$value" | tr -s ' ' ,)"
        [ -z "$value" ] || printenv "${pair#*=}" >/dev/null || export "${pair#*=}=$value"
    done
    export UV_INDEX_STRATEGY=unsafe-best-match # as pip, which takes the best of all indexes
}

choose_torch() {  # -> build: a --torch-backend, or ""; limit: what the package index's torch has to be, or ""
    build="${TORCH:-auto}" limit=""
    if [ -z "${TORCH:-}" ] && uv pip show --quiet --python "$python" torch 2>/dev/null; then
        build=""
        return
    fi
    cards="$(nvidia-smi --query-gpu=compute_cap,driver_version --format=csv,noheader 2>/dev/null)"
    say "$cards" | awk '/^7[.]/ { old = 1 } END { exit !old }' &&
        say "setup: a card below compute capability 8.0: training takes fp16, and plain torch instead of kernels"
    age="$(say "$cards" | awk -F '[., ]+' '$3 >= 525 { print 10 * $1 + $2 < 75 ? "card" : $3 < 580 ? "driver" : "" }')"
    case "$age" in
    *card*) suited=cu126 limit="torch<2.8" ;; # CUDA 13 has no code for it, the index's torch has CUDA 12.6 until 2.7
    *driver*) suited=auto limit="torch<2.11" ;; # CUDA 13 needs driver 580, the index's torch has CUDA 12 until 2.10
    *) suited=auto ;;
    esac
    # without a driver uv may take Intel's graphics for a GPU, with gigabytes of libraries that nothing here uses
    [ -n "$cards" ] || nvidia-smi -L >/dev/null 2>&1 || [ -e /proc/driver/nvidia ] ||
        command -v rocm_agent_enumerator >/dev/null || suited=cpu
    [ "$build" != auto ] || build=$suited
    if [ "$build" = pip ]; then
        build=""
    elif UV_HTTP_RETRIES=1 UV_HTTP_TIMEOUT=5 UV_HTTP_CONNECT_TIMEOUT=5 \
        uv pip install --quiet --dry-run --python "$python" --torch-backend "$build" torch; then
        limit=""
    else
        [ -z "${TORCH:-}" ] || fail "TORCH=$TORCH: see above"
        say "setup: the package index's torch is taken, since its own builds cannot be had"
        build=""
    fi
}

put_in() {  # this package with $extras into the environment, while no other set-up of this folder does
    flock 8 2>/dev/null
    supported "$python" || make_environment
    say "setup: installing into $environment"
    cd "$root" || exit
    if sed -n '/^uv==/,/[^\\]$/p' requirements.lock |
        "$python" -I -m pip install --quiet --no-deps --require-hashes --requirement /dev/stdin ||
        command -v uv >/dev/null; then
        take_pip_settings
        choose_torch
        UV_CONSTRAINT="${UV_CONSTRAINT:-} requirements.lock" uv pip install --python "$python" --editable ".$extras" \
            --build-constraints requirements.lock ${build:+--torch-backend "$build"} ${limit:+"$limit"} \
            ${TORCH:+--reinstall-package torch}
    else
        say "setup: uv cannot be had, so pip installs, and checks no hashes"
        sed '/^ *--hash/d; s/ *\\$//' requirements.lock >"$environment/requirements.lock"
        "$python" -I -m pip install --quiet --constraint "$environment/requirements.lock" --editable ".$extras"
    fi || fail "the installation failed: see the lines above, and run again when that is mended"
}

serves() {  # has the environment this folder's package with $extras, installed since its requirements changed?
    [ -z "${TORCH:-}" ] && [ ! "$root/pyproject.toml" -nt "$environment/bin/rwkv-peft" ] &&
        [ ! "$root/requirements.txt" -nt "$environment/bin/rwkv-peft" ] &&
        uv pip install --quiet --offline --no-index --python "$python" "rwkv-peft$extras" &&
        "$python" -I -c 'import importlib.util as i, sys; sys.exit(i.find_spec("rwkv_peft").origin != sys.argv[1])' \
            "$root/RWKV-PEFT/rwkv_peft/__init__.py"
}

root="$(cd "$(dirname "$0")/.." && pwd)"
environment="${VIRTUAL_ENV:-${CONDA_PREFIX:-$root/.venv}}"
python="$environment/bin/python"
export PATH="$environment/bin:$PATH"
case "$0" in *setup.sh) needs="$*" ;; esac
extras="$(say "${needs:-}" | sed '/./ !d; s/ /,/g; s/.*/[&]/')"
serves 2>/dev/null || (put_in) 8<"$root" || exit 1
activate="conda activate '$environment'"
[ ! -f "$environment/bin/activate" ] || activate=". '$environment/bin/activate'"
case "$0" in *setup.sh) say "setup: ready, $python; in each new shell:" "" "    $activate" ;; esac
