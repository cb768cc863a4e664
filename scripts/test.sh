# Sets up what the tests need, and runs them, three at a time: sh scripts/test.sh [pytest arguments]
#
#   sh scripts/test.sh -n 0 -k merge   one at a time, those with "merge" in their names
#
# Each computes on one thread: on two cores, threads of two processes would wait for each other. The third computes
# while another waits for what it started.
set -eu
unset PYTHONDONTWRITEBYTECODE # else each process compiles what it imports
needs="test"
. "$(dirname "$0")/setup.sh"
cd "$root"
# GOMP_SPINCOUNT as rwkv_peft/__init__.py sets it, which says why: the tests load torch before it.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"
exec "$python" -m pytest -n 3 --dist worksteal "$@"
