# What a machine's GPU makes of the kernels and of training, in ten minutes, what matters first. A JSON line a result.
#
#   sh scripts/gpu_check.sh                       sets up what is missing, then runs the checks
#   sh scripts/gpu_check.sh --offline             takes the python at hand, leaves out what it lacks
#   sh scripts/gpu_check.sh --wheels FOLDER       installs from that folder alone, without a network
#   sh scripts/gpu_check.sh --only smoke engine   these steps, or those of these kinds, alone
#   sh scripts/gpu_check.sh --full                the whole test suite at the end, however long
#
# Other flags go to benchmarks/gpu_check.py, and `sh scripts/gpu_check.sh --offline --help` lists them. Results are in
# out/gpu_check, and the end tells what was measured, what failed and what was left out. Exit code 0 if no step failed,
# 1 if one did, 2 if there is no usable GPU.
set -eu
root="$(cd "$(dirname "$0")/.." && pwd)"
offline=false wheels="" previous=""
for argument in "$@"; do
    [ "$previous" != --wheels ] || wheels="$argument"
    case "$argument" in
    --offline) offline=true ;;
    --wheels=*) wheels="${argument#*=}" ;;
    esac
    previous="$argument"
done
if $offline || [ -n "$wheels" ]; then
    python="${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/}python3"
    PYTHONPATH="$root/RWKV-PEFT${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHONPATH
    if [ -n "$wheels" ]; then
        for wanted in "--requirement=$root/requirements.txt" pytest hypothesis bitsandbytes; do
            "$python" -I -m pip install --quiet --no-index --find-links "$wheels" "$wanted" ||
                printf '%s\n' "going on without what is missing in $wheels"
        done
    fi
else
    . "$root/scripts/setup.sh" # no more than requirements.txt yet: a later step installs what tests need
fi
exec "$python" "$root/benchmarks/gpu_check.py" "$@"
