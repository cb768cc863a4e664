# Runs the tests of rwkv_peft.hf under each version of peft that it knows, in an environment of its own.
#
#   sh tests/hf/versions.sh FOLDER [VERSION…]     FOLDER keeps the environment (2 GB); versions: 0.19 … 0.21
#
# PYTHON names the interpreter that makes the environment (python3). transformers 4.57 works with all of them.
set -eu
[ $# -ge 1 ] || { sed -n '3s/^# *//p' "$0" >&2; exit 2; }
root="$(cd "$(dirname "$0")/../.." && pwd)"
environment="$1"
shift
[ $# -gt 0 ] || set -- 0.19 0.20 0.21
[ -d "$environment" ] || "${PYTHON:-python3}" -m venv "$environment"
environment="$(cd "$environment" && pwd)"
zero_3=tests/hf/test_finetune.py::test_the_command_under_accelerates_zero_3_trains_and_merges_as_it_does_alone
cd "$root"
for version in "$@"; do
    "$environment/bin/python" -m pip install --quiet 'torch>=2.6,<3' 'transformers==4.57.*' "peft==$version.*" \
        'trl>=1.11,<2' datasets accelerate safetensors numpy bitsandbytes pytest
    echo "peft $version:"
    PYTHONPATH=RWKV-PEFT "$environment/bin/python" -m pytest --quiet -p no:cacheprovider --disable-warnings \
        --deselect "$zero_3" tests/hf
done
