# Says what this machine can do, what is missing, and the command that mends it: sh scripts/doctor.sh
#
# Needs no environment and installs nothing: it looks at the active one, else at .venv, else at python3. If there is no
# torch in it, one line tells the command that makes an environment.
set -eu
root="$(cd "$(dirname "$0")/.." && pwd)"
python="${VIRTUAL_ENV:-${CONDA_PREFIX:-$root/.venv}}/bin/python"
[ -x "$python" ] || python=python3
if ! "$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "no environment: $python is no Python 3.10 to 3.14; make one (sh $root/scripts/setup.sh)"
    exit 1
fi
exec "$python" "$root/RWKV-PEFT/rwkv_peft/children.py" rwkv_peft doctor "$@"
