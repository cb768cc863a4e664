# Sets up what the tests need, and runs them, three at a time: sh scripts/test.sh [--processors] [pytest arguments]
#
#   sh scripts/test.sh -n 0 -k merge   one at a time, those with "merge" in their names
#   sh scripts/test.sh --processors    those that ask about the processor, as on two older ones, on one and two threads
#
# Each computes on one thread: on two cores, threads of two processes would wait for each other. The third computes
# while another waits for what it started. Without arguments a part of the tests that ask about the processor runs once
# more (those marked processor), as on a processor with AVX2, on two threads, and as on one with AVX-512.
set -eu
unset PYTHONDONTWRITEBYTECODE # else each process compiles what it imports
needs="test"
. "$(dirname "$0")/setup.sh"
cd "$root"
# GOMP_SPINCOUNT as rwkv_peft/__init__.py sets it, which says why: the tests load torch before it.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"

failed=0
run() { # pytest arguments…
    "$python" -m pytest -n 3 --dist worksteal "$@" || failed=$?
}
as_on() { # FLAG of /proc/cpuinfo, what torch and what oneDNN call it, threads, pytest arguments…
    grep -qsw "$1" /proc/cpuinfo || return 0
    printf '\ntests as on a processor with %s, %s thread(s)\n' "$2" "$4"
    export ATEN_CPU_CAPABILITY="$2" ONEDNN_MAX_CPU_ISA="$3" OMP_NUM_THREADS="$4"
    shift 4
    run tests/ops tests/adapters tests/inference/test_decode.py tests/release/test_check.py tests/tools/plan \
        tests/training/test_optimizers.py "$@"
}

if [ "${1-}" = --processors ]; then
    shift
    for threads in 1 2; do
        as_on avx2 avx2 AVX2 "$threads" "$@"
        as_on avx512bw avx512 AVX512_CORE "$threads" "$@"
    done
else
    run "$@"
    if [ $# = 0 ]; then
        as_on avx2 avx2 AVX2 2 -m processor
        as_on avx512bw avx512 AVX512_CORE 1 -m processor
    fi
fi
exit "$failed"
