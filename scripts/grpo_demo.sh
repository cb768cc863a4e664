# Learns from rewards alone, on two CPU cores in less than ten minutes: sh scripts/grpo_demo.sh [--flags]
#
# The bundled RWKV-7 is to answer questions in JSON (demo/README.md). A supervised start of 70 steps leaves an adapter
# that answers few of them. From there on it sees no answer any more: it writes eight to each prompt itself, and those
# that are right, letter by letter, earn 1. At the end the merged model answers at least 95 % of the held-out questions
# (how many more depends on the processor: 96.5 and 99.5 % were seen), after some minutes. --flags go to the second
# run; docs/guides/rewards.md describes them.
set -eu
case " $* " in
*" -h "* | *" --help "*) exec sed -n '/^set -eu/q; s/^# \{0,1\}//p' "$0" ;;
esac
. "$(dirname "$0")/setup.sh"
cd "$root"
base=demo/rwkv7-demo.pth out=out/demo-rewards

step() { printf '\n== %s\n' "$*"; }

train() {
    python train.py --load_model "$base" --data_file "$out/prompts.jsonl" --tokenizer bytes --ctx_len 256 \
        --bone_mode bat-in --bone_r 32 --epoch_count 1 --precision fp32 --accelerator cpu \
        --answer_rows 0 "$@"
}

asked() {  # RUN [--flags]: merges the adapter of a run, and asks the held-out questions
    run="$out/$1"
    shift
    python merge_bone.py --base_model "$base" --bone_checkpoint "$run/adapter.safetensors" --output "$run/merged.pth"
    python demo/evaluate.py --model "$run/merged.pth" --questions "$out/heldout.jsonl" "$@"
}

rm -rf "$out"  # it holds only what this script made
mkdir -p "$out"
python demo/task.py finetune --documents 4000 --seed 1 --output "$out/prompts.jsonl"
python demo/task.py heldout --documents 200 --seed 2 --output "$out/heldout.jsonl"

step "1. a short supervised start"
train --data_type sft --micro_bsz 8 --epoch_steps 70 --lr_init 5e-3 --lr_schedule constant --warmup_steps 5 \
    --proj_dir "$out/start"
asked start

step "2. from here on by an exact reward alone"
train --data_type prompts --reward jsonl --draw_stop '\n' --num_generations 8 --max_completion_length 72 --micro_bsz 8 \
    --bone_load "$out/start/adapter.safetensors" --epoch_steps 250 --lr_init 6e-4 --lr_final 6e-5 \
    --proj_dir "$out/rewarded" "$@"

step "3. the merged model"
asked rewarded --at_least 0.95
step "done: rewards in $out/rewarded/loss.png, every answer in $out/rewarded/answers.jsonl"
