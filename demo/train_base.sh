# Makes one of the demo's bases anew, from nothing: sh demo/train_base.sh 6|7 [further flags of train.py]
#
# Writes the stories, turns them into tokens, and trains a new RWKV-6 or RWKV-7 on them with train.py. The loss counts
# the answers alone: what stands between "A:" (byte tokens 66 59) and the end of the line (11).
set -eu
. "$(dirname "$0")/../scripts/setup.sh"
generation="${1:-}"
case "$generation" in
6) sizes="--n_layer 4 --n_embd 128" ;;
7) sizes="--n_layer 3 --n_embd 128" ;;
*) fail "which base: sh demo/train_base.sh 6, or 7" ;;
esac
shift
cd "$root"
folder="out/demo-base-rwkv$generation"
mkdir -p "$folder"

python demo/task.py base --documents 16000 --seed 1 --output "$folder/base.jsonl"
rwkv-peft preprocess "$folder/base.jsonl" --tokenizer bytes --output "$folder/base"
# shellcheck disable=SC2086 # $sizes is a list of flags
python train.py --generation "$generation" --peft none $sizes --vocab_size 257 \
    --data_file "$folder/base" --dataload pad --ctx_len 192 \
    --loss_mask se --mask_id 66 59 --mask_end_id 11 --micro_bsz 8 \
    --epoch_count 1 --lr_init 2e-3 --lr_final 1e-4 --warmup_steps 20 --weight_decay 0.1 --beta2 0.99 \
    --precision fp32 --proj_dir "$folder/run" "$@"
python - <<END
from rwkv_peft.checkpoints.base import open_base, save_model
base = open_base("$folder/run/rwkv.pth").tensors
save_model("demo/rwkv$generation-demo.pth", {key: tensor.bfloat16() for key, tensor in base.items()})
END
