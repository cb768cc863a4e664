# Checks the CUDA kernels on this machine's GPU, and prints one table: what was checked, the result, the seconds.
#
#   sh scripts/gpu_check.sh
#
# Builds the kernels; runs their tests on the device, every kernel on packed sequences under compute-sanitizer where
# that is installed, the whole test suite, and benchmarks/wkv6.py. Each step's output goes to out/gpu_check. Exit code 0
# when every step passed, 1 when one failed, 2 where there is no usable GPU.
set -u
. "$(dirname "$0")/setup.sh"
export PYTHONPATH="$root/RWKV-PEFT${PYTHONPATH:+:$PYTHONPATH}"
cd "$root" || exit 2

if ! card=$("$python" - <<'PYTHON'
import sys
import torch

if not torch.cuda.is_available():
    print(f"torch {torch.__version__} sees no NVIDIA GPU")
    sys.exit(2)
capability = ".".join(map(str, torch.cuda.get_device_capability()))
print(f"{torch.cuda.get_device_name()}, compute capability {capability}, torch {torch.__version__}")
PYTHON
); then
    say "no GPU check: ${card:-torch does not start}."
    say "Run this on a machine with an NVIDIA GPU and a CUDA build of torch."
    exit 2
fi

install_tests
logs="$root/out/gpu_check"
mkdir -p "$logs"
table="$logs/table.md"
failed=0
printf '%s\n\n| step | result | seconds |\n| --- | --- | --- |\n' "$card" > "$table"

row() { printf '| %s | %s | %s |\n' "$1" "$2" "$3" >> "$table"; }

step() {  # NAME LOG COMMAND...: runs the command into its log, adds a row
    name=$1 log=$logs/$2
    shift 2
    say "$name ..."
    start=$(date +%s)
    if "$@" > "$log" 2>&1; then
        result=passed
    else
        result="FAILED: see $log"
        failed=1
    fi
    row "$name" "$result" $(($(date +%s) - start))
}

step "build" build.log "$python" -c '
from rwkv_peft.ops.wkv6 import cuda
reason = cuda.unavailable()
raise SystemExit(reason and f"the kernels cannot be used: {reason}")'
step "op tests on the device" ops.log "$python" -m pytest -q tests/ops
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck synccheck; do
        step "compute-sanitizer $tool" "$tool.log" "$sanitizer" --tool "$tool" --error-exitcode 1 \
            "$python" -m pytest -q tests/ops/wkv6/test_cuda.py -k 'packed_sequences and gpu'
    done
else
    row "compute-sanitizer" "not installed" -
fi
step "whole test suite, training on the GPU" suite.log "$python" -m pytest -q tests --accelerator gpu
step "benchmarks/wkv6.py" benchmark.log "$python" benchmarks/wkv6.py --device cuda --dtype bfloat16

say ""
cat "$table"
if [ -s "$logs/benchmark.log" ]; then
    say ""
    cat "$logs/benchmark.log"
fi
exit "$failed"
