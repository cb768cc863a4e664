# Merges adapters into a base model.
#
#   BASE_MODEL=base.pth ADAPTER=out/run/adapter.safetensors OUTPUT=merged.pth sh scripts/merge_bone.sh [--flags]
#
# Further flags are passed on to merge_bone.py: see `python merge_bone.py --help`.
set -eu
. "$(dirname "$0")/setup.sh"
: "${BASE_MODEL:?give BASE_MODEL=base.pth}" "${ADAPTER:?give ADAPTER=adapter.safetensors}"
: "${OUTPUT:?give OUTPUT=merged.pth}"
exec python "$root/merge_bone.py" --base_model "$BASE_MODEL" --bone_checkpoint "$ADAPTER" --output "$OUTPUT" "$@"
