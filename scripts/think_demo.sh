# Learns to think as long as the prompt says, on two CPU cores in some five minutes: sh scripts/think_demo.sh [--flags]
#
# Rows about little stories (demo/thinking.py) have a short, a medium or a long thinking each, drawn by chance.
# --think_labels 32 64 ends each question in RWKV-7 G1's words for the length that its thinking has. The merged
# model then is asked 200 held-out questions in each of the three ways: 90 % or more of the thinkings have the length
# that was asked for, and as many answers are right. The same rows without labels leave the length to chance, whatever
# is asked. --flags go to both runs; docs/guides/data.md describes them.
set -eu
case " $* " in
*" -h "* | *" --help "*) exec sed -n '/^set -eu/q; s/^# \{0,1\}//p' "$0" ;;
esac
. "$(dirname "$0")/setup.sh"
cd "$root"
base=demo/rwkv7-demo.pth out=out/demo-thinking

step() { printf '\n== %s\n' "$*"; }

train() {  # RUN [--flags]: trains on the rows, and merges the adapter
    run="$out/$1"
    shift
    python train.py --load_model "$base" --data_file "$out/rows.jsonl" --data_type sft --sft_think on \
        --tokenizer bytes --bone_mode bat-in --bone_r 64 --train_parts time ln --dataload pack --ctx_len 3600 \
        --epoch_count 1 --lr_init 5e-3 --lr_final 5e-4 --warmup_steps 5 --precision fp32 --accelerator cpu \
        --answer_rows 0 --proj_dir "$run" "$@"
    python merge_bone.py --base_model "$base" --bone_checkpoint "$run/adapter.safetensors" --output "$run/merged.pth"
}

rm -rf "$out"  # it holds only what this script made
mkdir -p "$out"
python demo/thinking.py rows --documents 4000 --output "$out/rows.jsonl"
python demo/thinking.py heldout --documents 200 --output "$out/heldout.jsonl"

step "1. with labels"
train labelled --think_labels 32 64 "$@"

step "2. without labels"
train plain "$@"

step "3. asked for a short, a medium and a long thinking"
python demo/thinking.py ask --model "$out/plain/merged.pth" --questions "$out/heldout.jsonl"
python demo/thinking.py ask --model "$out/labelled/merged.pth" --questions "$out/heldout.jsonl" --at_least 0.9
step "done: chat with it by rwkv-peft generate --model $out/labelled/merged.pth --chat --think low"
