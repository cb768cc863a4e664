# Learns to use a tool from rewards alone, on two CPU cores in some ten minutes: sh scripts/turns_demo.sh [--flags]
#
# What is in somebody's box only a tool knows (demo/lookup.py), so that one turn answers no question. A supervised start
# shows the bundled RWKV-7 how to call the tool, and then mostly chats that guess: it asks in some 6 of 100 answers that
# it samples, and never greedily. From there on it holds eight conversations with each prompt itself, and a right last
# answer, letter by letter, earns 1. At the end the merged model asks the tool, and answers at least 95 % of 200
# held-out questions. Calls have the form hermes, in which this was measured. --flags go to the last run;
# docs/guides/rewards.md describes them.
set -eu
case " $* " in
*" -h "* | *" --help "*) exec sed -n '/^set -eu/q; s/^# \{0,1\}//p' "$0" ;;
esac
. "$(dirname "$0")/setup.sh"
cd "$root"
base=demo/rwkv7-demo.pth out=out/demo-turns

step() { printf '\n== %s\n' "$*"; }

train() {  # KIND: trains on its rows, --flags
    rows="$out/$1.jsonl"
    shift
    python train.py --load_model "$base" --data_file "$rows" --tokenizer bytes --tool_form hermes --bone_mode bat-in \
        --bone_r 64 --train_parts time ln --epoch_count 1 --precision fp32 --accelerator cpu --answer_rows 0 "$@"
}

asked() {  # RUN [--flags]: merges the adapter of a run, and asks the held-out questions
    run="$out/$1"
    shift
    python merge_bone.py --base_model "$base" --bone_checkpoint "$run/adapter.safetensors" --output "$run/merged.pth"
    python demo/lookup.py ask --model "$run/merged.pth" --questions "$out/heldout.jsonl" "$@"
}

rm -rf "$out"  # it holds only what this script made
mkdir -p "$out"
python demo/lookup.py calls --documents 4000 --output "$out/calls.jsonl"
python demo/lookup.py guesses --documents 1600 --output "$out/guesses.jsonl"
python demo/lookup.py prompts --documents 4000 --output "$out/prompts.jsonl"
python demo/lookup.py heldout --documents 200 --output "$out/heldout.jsonl"

step "1. a supervised start: how the tool is called"
train calls --data_type sft --dataload pack --ctx_len 3600 --lr_init 5e-3 --lr_final 1e-3 --warmup_steps 5 \
    --proj_dir "$out/called"

step "2. and chats that mostly guess"
train guesses --data_type sft --ctx_len 640 --micro_bsz 1 --accumulate_grad_batches 8 --epoch_steps 150 --lr_init 3e-4 \
    --lr_final 2e-5 --bone_load "$out/called/adapter.safetensors" --proj_dir "$out/start"
asked start

step "3. from here on by a reward for right answers alone"
train prompts --data_type prompts --environment demo/lookup.py:Boxes --reward jsonl --ctx_len 640 --micro_bsz 8 \
    --num_generations 8 --max_completion_length 200 --max_turns 4 --epoch_steps 100 --lr_init 3e-4 \
    --bone_load "$out/start/adapter.safetensors" --proj_dir "$out/rewarded" "$@"

step "4. the merged model"
asked rewarded --at_least 0.95
step "done: rewards in $out/rewarded/loss.png, every conversation in $out/rewarded/answers.jsonl"
