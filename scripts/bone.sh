# Trains Bone on an RWKV model, merges it, and checks the result in a runtime that is not ours.
#
#   sh scripts/bone_rwkv6.sh [--flags]        the bundled demo of RWKV-6, on whatever this machine has
#   sh scripts/bone_rwkv7.sh [--flags]        that of RWKV-7
#
#   LOAD_MODEL=base.pth DATA_FILE=data.jsonl PROJ_DIR=out/mine DEVICES=8 STRATEGY=deepspeed_stage_2 \
#       sh scripts/bone_rwkv7.sh [--flags]    your model, of which its file says what it is, and your data
#
# DATA_FILE is a file of rows or text (.jsonl, .json, .csv, .parquet, .txt) or a folder of rows, which is made into
# PROJ_DIR/data.bin and .idx (but for --data_type sft, pairs and labels, which read its rows), or the prefix of a
# .bin/.idx pair. --load_model, --data_file and --proj_dir say the same as the variables, and go before them. Also read:
# TOKENIZER (world, bytes or a tokenizer.json), BONE_MODE, BONE_R, ACCELERATOR, NUM_NODES, PRECISION, and CHECK=0,
# which leaves out the last step (it needs memory for two float32 copies of the model). --flags go to train.py, which
# checks them; `python train.py --help` lists them.
set -eu
case " $* " in
*" -h "* | *" --help "*) exec sed -n '/^set -eu/q; s/^# \{0,1\}//p' "$(dirname "$0")/bone.sh" ;;
esac
. "$(dirname "$0")/setup.sh"
here="$(pwd)"

step() { printf '\n== %s\n' "$*"; }

# What the flags say stands for what is chosen here. Those that the variables say, too, are train.py's no more.
method=bone json=false rows=false resuming=false flag_mode="" flag_rank="" previous="" path=""
for argument in "$@"; do
    shift
    case "$argument" in
    --*=*) name="${argument%%=*}" value="${argument#*=}" previous="" path="" ;;
    -*) name="$argument" value="" previous="$argument" path="" ;;
    *)
        [ -z "$path" ] || fail "$path takes one path, and $argument follows it; several files of rows are one" \
            "input if they lie in a folder, and the folder is given"
        name="$previous" value="$argument" previous=""
        ;;
    esac
    case "$name" in
    --load_model | --data_file | --proj_dir) [ -z "$value" ] || path="$name" ;;
    esac
    case "$name" in
    --load_model) LOAD_MODEL="$value" && continue ;;
    --data_file) DATA_FILE="$value" && continue ;;
    --proj_dir) PROJ_DIR="$value" && continue ;;
    --peft) method="$value" ;;
    --bone_mode) flag_mode="$value" ;;
    --bone_r) flag_rank="$value" ;;
    --bone_config | --disha_config | --peft_config) json=true ;;
    --resume) resuming=true ;;
    --data_type) case "$value" in sft | pairs | labels) rows=true ;; *) rows=false ;; esac ;;
    esac
    set -- "$@" "$argument"
done
case "$previous" in
--load_model | --data_file | --proj_dir) fail "$previous: one path is due behind it" ;;
esac

if [ -n "${LOAD_MODEL:-}" ] || [ -n "${DATA_FILE:-}" ]; then
    demo=false
    [ -n "${LOAD_MODEL:-}" ] || fail "DATA_FILE is given without LOAD_MODEL; name the base model (.pth)"
    [ -n "${DATA_FILE:-}" ] ||
        fail "LOAD_MODEL is given without DATA_FILE; name a file or folder of rows, or the prefix of a .bin/.idx pair"
    out="${PROJ_DIR:-$here/out/bone}"
    tokenizer="${TOKENIZER:-world}"
    base="$LOAD_MODEL" mode="${BONE_MODE:-bat-in}" rank="${BONE_R:-64}"
else
    demo=true
    base="$root/${demo_base:?: bone_rwkv6.sh and bone_rwkv7.sh name it; run one of them}"
    out="${PROJ_DIR:-$root/$demo_folder}"
    tokenizer=bytes
    mode="${BONE_MODE:-bat-in}" rank="${BONE_R:-32}"
    DATA_FILE="$out/finetune.jsonl"
    # One document a row; the answers alone count, as the data's .mask says.
    set -- --dataload pad --loss_mask file --ctx_len 256 --micro_bsz 8 --lr_init 5e-3 --lr_final 1e-4 \
        --warmup_steps 10 "$@"
    PRECISION="${PRECISION:-fp32}"
fi

untokenized() {  # PATH: is it a file or folder of rows or text, and no prefix of token files?
    case "$1" in *.bin | *.idx) return 1 ;; esac
    for index in "$1.idx" "$1"/*.idx; do [ ! -e "$index" ] || return 1; done
    [ -e "$1" ]
}

data="$DATA_FILE" tokens_due=false
if $rows; then
    set -- --tokenizer "$tokenizer" "$@"
elif $demo || untokenized "$DATA_FILE"; then
    data="$out/data" tokens_due=true
fi
mode="${flag_mode:-$mode}" rank="${flag_rank:-$rank}"
case "$method $json" in
"bone false" | "disha false")
    what="Bone $mode, rank $rank"
    set -- --bone_mode "$mode" --bone_r "$rank" "$@"
    ;;
*) what="--peft $method" ;;
esac

train() {
    "$python" "$root/train.py" --load_model "$base" --data_file "$data" --proj_dir "$out" \
        --accelerator "${ACCELERATOR:-auto}" --devices "${DEVICES:-1}" --num_nodes "${NUM_NODES:-1}" \
        --strategy "${STRATEGY:-deepspeed_stage_1}" --precision "${PRECISION:-bf16}" "$@"
}

# A mistake in the flags is told now, and not after minutes of other work.
anew=false
$resuming || [ -n "${PROJ_DIR:-}" ] || anew=$demo
if $anew; then  # The demo writes only what it made itself, so a second run starts from nothing.
    train "$@" --proj_dir "$out/anew" --check_flags >/dev/null
    rm -rf "$out"
else
    train "$@" --check_flags >/dev/null
fi
mkdir -p "$out"

if $demo; then
    step "demo: a base that answers in words is to answer in JSON"
    "$python" "$root/demo/task.py" finetune --documents 4000 --seed 1 --output "$DATA_FILE"
    "$python" "$root/demo/task.py" heldout --documents 200 --seed 2 --output "$out/heldout.jsonl"
    step "before: held-out questions, the base model"
    "$python" "$root/demo/evaluate.py" --model "$base" --questions "$out/heldout.jsonl"
fi

if $tokens_due; then
    [ "${NUM_NODES:-1}" = 1 ] || fail "several nodes would write the same token files; make them once with" \
        "rwkv-peft preprocess, and give their prefix as DATA_FILE"
    again=""  # tokens that this script made and that no run has read are made again, such as by another tokenizer
    [ ! -f "$data.json" ] || [ -f "$out/config.json" ] || again=--overwrite
    step "1. data: $DATA_FILE -> $data.bin, data.idx"
    "$python" "$root/RWKV-PEFT/rwkv_peft/children.py" rwkv_peft preprocess "$DATA_FILE" \
        --tokenizer "$tokenizer" --output "$data" ${again:+"$again"}
fi

step "2. train: $what"
train "$@"

[ "${NODE_RANK:-0}" = 0 ] || exit 0
# The adapter of the lowest validation loss is taken if it holds better for other rows than the last: a note says so.
taken="$("$python" "$root/RWKV-PEFT/rwkv_peft/children.py" rwkv_peft.files.best "$out")"
case "$taken" in
*.pth)
    step "done: the model is $taken"
    exit 0
    ;;
esac

step "3. merge: base + adapter -> $out/merged.pth"
"$python" "$root/merge_bone.py" --base_model "$base" --bone_checkpoint "$taken" \
    --output "$out/merged.pth"

if [ "${CHECK:-1}" != 0 ]; then
    step "4. check: the merged file in the rwkv package"
    "$python" "$root/RWKV-PEFT/rwkv_peft/children.py" rwkv_peft check --base_model "$base" \
        --bone_checkpoint "$taken" --merged "$out/merged.pth"
fi
if $demo; then
    step "after: the same questions, the merged model in the rwkv package"
    "$python" "$root/demo/evaluate.py" --model "$out/merged.pth" --questions "$out/heldout.jsonl" --runtime rwkv \
        --at_least 0.9
fi

# What to do with it, in lines that a new shell takes as they are.
case "$out" in /*) ;; *) out="$here/$out" taken="$here/$taken" ;; esac
prompt='User: hi\n\nAssistant:' stop='\n\n' more="" chat=""
case "$(sed -n 's/^ *"opening": "\(.*\)",\{0,1\}$/\1/p' "$out/config.json")" in
"Assistant: <think></think") chat=" --chat --think off" ;;
"Assistant: <think") chat=" --chat --think on" ;;
"Assistant:") chat=" --chat" ;;
"Response:") prompt='Instruction: hi\n\nResponse:' stop='\n\nInstruction:' ;;
"Answer:") prompt='Question: hi\n\nAnswer:' stop='\n\nQuestion:' ;;
esac
if $demo; then
    prompt='Two birds sing. Sue has 9 purple dolls.\nQ: What is there, as JSON?\nA:' stop='\n' more=" --temperature 0"
elif [ "$tokenizer" != world ]; then
    more=" --tokenizer $(quoted "$tokenizer")"
fi
step "done"
say "adapter     $taken"
say "merged      $out/merged.pth"
say "loss curve  $out/loss.png"
say ""
say "Try it:"
say ""
say "    $(activate)"
if [ -n "$chat" ]; then
    say "    rwkv-peft generate --model $(quoted "$out/merged.pth")$more$chat"
else
    say "    rwkv-peft generate --model $(quoted "$out/merged.pth")$more --escapes --stop '$stop' \\"
    say "        --prompt '$prompt'"
fi
