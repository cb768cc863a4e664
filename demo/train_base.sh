# Makes demo/rwkv6-demo.pth anew, from nothing: sh demo/train_base.sh [further flags of train.py]
#
# Writes the stories, turns them into tokens, and trains a new RWKV-6 on them with train.py. The loss counts the
# answers alone: what stands between "A:" (byte tokens 66 59) and the end of the line (11).
set -eu
. "$(dirname "$0")/../scripts/setup.sh"
cd "$root"
folder=out/demo-base
mkdir -p "$folder"

"$python" demo/task.py base --documents 16000 --seed 1 --output "$folder/base.jsonl"
"$python" -m rwkv_peft preprocess "$folder/base.jsonl" --tokenizer bytes --output "$folder/base"
"$python" train.py --peft none --n_layer 4 --n_embd 128 --vocab_size 257 \
    --data_file "$folder/base" --dataload pad --ctx_len 192 \
    --loss_mask se --mask_id 66 59 --mask_end_id 11 --micro_bsz 8 \
    --epoch_count 1 --lr_init 2e-3 --lr_final 1e-4 --warmup_steps 20 --weight_decay 0.1 --beta2 0.99 \
    --precision fp32 --proj_dir "$folder/run" "$@"
"$python" - <<END
from rwkv_peft.files.base import open_base, save_model
save_model("demo/rwkv6-demo.pth", {key: tensor.bfloat16() for key, tensor in open_base("$folder/run/rwkv.pth").tensors.items()})
END
