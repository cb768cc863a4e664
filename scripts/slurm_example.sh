#!/bin/sh
# Trains on several nodes under Slurm, and goes on by itself where a node fails or the job is preempted.
#
#   sbatch scripts/slurm_example.sh
#
# Edit the lines below: nodes, GPUs, and the four paths, all on disks that every node sees. --nodes is train.py's
# --num_nodes, --ntasks-per-node and --gpus-per-node its --devices. Slurm sends SIGTERM 5 minutes before the time is up,
# upon which the run saves and ends; it is queued again then, and --resume auto goes on.
#SBATCH --job-name=rwkv-peft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu

cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck disable=SC1091 # scripts/setup.sh makes it
. .venv/bin/activate

code=0
srun --kill-on-bad-exit=1 python train.py --num_nodes 2 --devices 8 --strategy deepspeed_stage_2 --resume auto \
    --load_model models/rwkv6-7b.pth --data_file data/mine --proj_dir out/mine \
    --peft bone --bone_config '{"bone_mode":"bat-in","bone_load":"","bone_r":64}' \
    --ctx_len 1024 --micro_bsz 8 --epoch_count 1 --save_every 200 --grad_cp 1 || code=$?

# 0: done. 2: the command is mistaken, and would be again. All else goes on from the last checkpoint, some times, also a
# start that was refused because a node did not come, or a lost one still locks the folder (75).
case "$code" in
0 | 2) exit "$code" ;;
esac
[ "${SLURM_RESTART_COUNT:-0}" -lt 20 ] || exit "$code"
scontrol requeue "$SLURM_JOB_ID"
