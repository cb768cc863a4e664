# Trains Bone on an RWKV model, merges it, and checks the result in a runtime that is not ours.
#
#   sh scripts/bone_rwkv6.sh [--flags]        the bundled demo of RWKV-6, on whatever this machine has
#   sh scripts/bone_rwkv7.sh [--flags]        that of RWKV-7
#
#   LOAD_MODEL=base.pth DATA_FILE=data.jsonl PROJ_DIR=out/mine DEVICES=8 STRATEGY=deepspeed_stage_2 \
#       sh scripts/bone_rwkv7.sh [--flags]    your model, of which its file says what it is, and your data
#
# DATA_FILE is a file of rows or text (.jsonl, .json, .csv, .parquet, .txt) or a folder of rows, or the prefix of a
# .bin/.idx pair; with --data_type sft, pairs or labels, train.py reads its rows. TOKENIZER is world, bytes or a
# tokenizer.json. Also read: BONE_MODE, BONE_R, PRECISION, ACCELERATOR, NUM_NODES, and CHECK=0, which leaves out the
# last step (it needs memory for two float32 copies of the model). --flags go to train.py, and `python train.py --help`
# lists them; --peft and --bone_config stand for BONE_MODE and BONE_R.
set -eu
case " $* " in
*" -h "* | *" --help "*) exec sed -n '/^set -eu/q; s/^# \{0,1\}//p' "$(dirname "$0")/bone.sh" ;;
esac
. "$(dirname "$0")/setup.sh"
step() { printf '\n== %s\n' "$*"; }

demo="" tokens=""
if [ -z "${LOAD_MODEL:-}${DATA_FILE:-}" ]; then # a base that answers in words is to answer in JSON
    demo="$root/${demo_base:?: bone_rwkv6.sh and bone_rwkv7.sh name it; run one of them}"
    case "${PROJ_DIR:-} $*" in [!\ ]* | *--resume*) ;; *) rm -rf "${root:?}/${demo_folder:?}" ;; esac # begins anew
    LOAD_MODEL="$demo" PROJ_DIR="${PROJ_DIR:-$root/$demo_folder}" PRECISION="${PRECISION:-fp32}"
    DATA_FILE="$PROJ_DIR/finetune.jsonl" TOKENIZER=bytes BONE_R="${BONE_R:-32}" tokens="$PROJ_DIR/data"
    set -- --dataload pad --loss_mask file --ctx_len 256 --micro_bsz 8 --lr_init 5e-3 --lr_final 1e-4 \
        --warmup_steps 10 "$@"
fi
: "${LOAD_MODEL:?is to name the base (.pth), since DATA_FILE is given}"
: "${DATA_FILE:?is to name rows or a .bin/.idx pair, since LOAD_MODEL is given}"
: "${PROJ_DIR:=out/bone}" "${TOKENIZER:=world}" "${BONE_MODE:=bat-in}" "${BONE_R:=64}" "${PRECISION:=bf16}"
: "${STRATEGY:=deepspeed_stage_1}" "${DEVICES:=1}" "${NUM_NODES:=1}" "${ACCELERATOR:=auto}"

DATA_FILE="${DATA_FILE%.bin}" DATA_FILE="${DATA_FILE%.idx}"
if [ -e "$DATA_FILE" ] && [ ! -e "$DATA_FILE.idx" ]; then tokens="$PROJ_DIR/data"; fi
case " $*" in *" --load_model"* | *" --data_file"* | *" --proj_dir"*)
    fail "give the paths before this command, as LOAD_MODEL=… DATA_FILE=… PROJ_DIR=…" ;;
esac
case " $*" in *" --data_type"*) tokens="" && set -- --tokenizer "$TOKENIZER" "$@" ;; esac
case " $*" in *" --peft"* | *_config*) ;; *) set -- --bone_mode "$BONE_MODE" --bone_r "$BONE_R" "$@" ;; esac
set -- --load_model "$LOAD_MODEL" --data_file "${tokens:-$DATA_FILE}" --proj_dir "$PROJ_DIR" --precision "$PRECISION" \
    --strategy "$STRATEGY" --devices "$DEVICES" --num_nodes "$NUM_NODES" --accelerator "$ACCELERATOR" "$@"
python "$root/train.py" "$@" --check_flags >/dev/null # a mistake in them is reported now, not after minutes

if [ -n "$demo" ]; then
    step "before: held-out questions, the base model"
    mkdir -p "$PROJ_DIR"
    python "$root/demo/task.py" finetune --documents 4000 --seed 1 --output "$DATA_FILE"
    python "$root/demo/task.py" heldout --documents 200 --seed 2 --output "$PROJ_DIR/heldout.jsonl"
    python "$root/demo/evaluate.py" --model "$LOAD_MODEL" --questions "$PROJ_DIR/heldout.jsonl"
fi
if [ -n "$tokens" ]; then
    step "1. data: $DATA_FILE -> $tokens.bin, $tokens.idx"
    [ "$NUM_NODES" = 1 ] || fail "several nodes would write these files; write them once, by rwkv-peft preprocess"
    mkdir -p "$PROJ_DIR"
    [ -e "$PROJ_DIR/config.json" ] && again="" || again=--overwrite # such as those of another tokenizer
    rwkv-peft preprocess "$DATA_FILE" --tokenizer "$TOKENIZER" --output "$tokens" ${again:+"$again"}
fi

step "2. train"
python "$root/train.py" "$@"
if [ "${NODE_RANK:-0}" != 0 ] || [ -e "$PROJ_DIR/rwkv.pth" ]; then exit 0; fi # with --peft none that is the model

step "3. merge: base + adapter -> $PROJ_DIR/merged.pth"
python "$root/merge_bone.py" --base_model "$LOAD_MODEL" --bone_checkpoint "$PROJ_DIR" --output "$PROJ_DIR/merged.pth"

if [ "${CHECK:-1}" != 0 ]; then
    step "4. check: the merged file in the rwkv package"
    rwkv-peft check --base_model "$LOAD_MODEL" --bone_checkpoint "$PROJ_DIR" --merged "$PROJ_DIR/merged.pth"
fi
if [ -n "$demo" ]; then
    step "after: the same questions, the merged model in the rwkv package"
    python "$root/demo/evaluate.py" --model "$PROJ_DIR/merged.pth" --questions "$PROJ_DIR/heldout.jsonl" \
        --runtime rwkv --at_least 0.9
fi

step "done: $PROJ_DIR has the adapter, merged.pth and loss.png; in a new shell: $activate"
if [ -n "$demo" ]; then
    say "rwkv-peft generate --model '$PROJ_DIR/merged.pth' --temperature 0 --escapes --stop '\\n' \\" \
        "    --prompt 'Two birds sing. Sue has 9 purple dolls.\\nQ: What is there, as JSON?\\nA:'"
else
    rwkv-peft doctor --model "$PROJ_DIR/merged.pth" # names the commands that suit it
fi
