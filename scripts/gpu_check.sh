# What a machine's GPU makes of the kernels and of training, in ten minutes, what matters first. A JSON line a result.
#
#   sh scripts/gpu_check.sh                       sets up what is missing, then runs the checks
#   sh scripts/gpu_check.sh --offline             takes the python at hand, leaves out what it lacks
#   sh scripts/gpu_check.sh --only smoke engine   these steps, or those of these kinds, alone
#   sh scripts/gpu_check.sh --full                all steps and the whole test suite, however long
#   sh scripts/gpu_check.sh --list                the steps of ten minutes, and the seconds that each should take
#
# Other flags go to benchmarks/gpu_check.py, and `sh scripts/gpu_check.sh --offline --help` lists them. Results are in
# out/gpu_check, and the end lists what was measured, what failed and what was left out. Exit code 0 if no step failed,
# 1 if one did, 2 if there is no usable GPU.
set -eu
root="$(cd "$(dirname "$0")/.." && pwd)"
case " $* " in
*" --offline "* | *" --list "*)
    python="${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/}python3"
    export PYTHONPATH="$root/RWKV-PEFT${PYTHONPATH:+:$PYTHONPATH}"
    ;;
*) . "$root/scripts/setup.sh" ;; # no more than requirements.txt yet: a later step installs what others need
esac
exec "$python" "$root/benchmarks/gpu_check.py" "$@"
