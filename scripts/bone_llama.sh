# Trains Bone on a Hugging Face model and merges it.
#
#   sh scripts/bone_llama.sh [--flags]        a small LLaMA and data that it makes itself; needs no network
#
#   BASE_MODEL=meta-llama/Llama-2-7b-hf DATA_PATH=fxmeng/pissa-dataset OUTPUT_DIR=out/llama \
#       sh scripts/bone_llama.sh [--flags]    your model (hub name or folder) and data (hub name, folder or .jsonl)
#
# Also read: DATASET_SPLIT, BONE_R, INIT_WEIGHTS (True, bat-in, bat-out, mini), BITS (bf16, fp16, fp32, nf4, int8).
# --flags go to demo/bone_finetuning.py, which checks them: its own, and every argument of trl's SFTConfig;
# `python demo/bone_finetuning.py --help` lists them.
set -eu
case " $* " in
*" -h "* | *" --help "*) exec sed -n '/^set -eu/q; s/^# \{0,1\}//p' "$0" ;;
esac
needs="hf"
. "$(dirname "$0")/setup.sh"

if [ -n "${BASE_MODEL:-}" ] || [ -n "${DATA_PATH:-}" ]; then
    [ -n "${BASE_MODEL:-}" ] || fail "DATA_PATH is given without BASE_MODEL; name the base model (hub name or folder)"
    [ -n "${DATA_PATH:-}" ] || fail "BASE_MODEL is given without DATA_PATH; name the data (hub name, folder or .jsonl)"
    out="${OUTPUT_DIR:-out/bone_llama}"
    rank="${BONE_R:-64}" bits="${BITS:-bf16}" split="${DATASET_SPLIT:-train}"
    set -- --bf16 True --num_train_epochs 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \
        --save_strategy steps --save_steps 1000 --save_total_limit 1 --logging_steps 1 --learning_rate 2e-5 \
        --weight_decay 0. --tf32 True --report_to none "$@"
    case " $*" in
    *" --warmup"*) ;; # --warmup_steps and --warmup_ratio exclude each other
    *) set -- --warmup_ratio 0.03 "$@" ;;
    esac
else
    case " $* " in
    *" --base_model_name_or_path"* | *" --data_path"*)
        fail "without BASE_MODEL and DATA_PATH the settings are the demo's, for its own model; name yours by them" ;;
    esac
    out="${OUTPUT_DIR:-$root/out/bone_llama}"
    rank="${BONE_R:-16}" bits="${BITS:-fp32}" split="${DATASET_SPLIT:-train}"
    case " $* " in
    *" --resume"*) ;;
    *) [ -n "${OUTPUT_DIR:-}" ] || rm -rf "$out" ;; # The demo writes only what it made itself; it starts from nothing.
    esac
    python "$root/demo/tiny_llama.py" --output "$out"
    BASE_MODEL="$out/model" DATA_PATH="$out/data.jsonl"
    set -- --max_steps 60 --per_device_train_batch_size 4 --logging_steps 10 --learning_rate 1e-2 --save_strategy no \
        --report_to none "$@"
fi

python "$root/demo/bone_finetuning.py" --base_model_name_or_path "$BASE_MODEL" --data_path "$DATA_PATH" \
    --dataset_split "$split" --dataset_field query response --output_dir "$out" --bits "$bits" --bone_r "$rank" \
    --init_weights "${INIT_WEIGHTS:-bat-in}" --merge_and_save "$@"
