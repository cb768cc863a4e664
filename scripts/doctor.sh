# Says what this machine can do, what is missing, and the command that mends it: sh scripts/doctor.sh
#
# Needs no environment and installs nothing: it looks at the active one, else at .venv, else at python3.
set -eu
root="$(cd "$(dirname "$0")/.." && pwd)"
python="${VIRTUAL_ENV:-${CONDA_PREFIX:-$root/.venv}}/bin/python"
[ -x "$python" ] || python=python3
PYTHONPATH="$root/RWKV-PEFT${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m rwkv_peft doctor "$@"
