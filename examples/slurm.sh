#!/bin/bash
# Finetunes on two machines with four GPUs each, and goes on by itself when the job's time is over.
#
#   litgpt download Qwen/Qwen3-8B      once, where there is a network
#   sbatch examples/slurm.sh           in the folder of the clone, which all machines must see under the same path

#SBATCH --job-name=finetune
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00

# One process for each GPU, and each must see all GPUs of its machine: so not --gpus-per-task.
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8

# This signal comes 300 seconds before the end: time to finish a step and to save it. A job that is cancelled gets another one.
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

srun --kill-on-bad-exit=1 .venv/bin/litgpt finetune_full Qwen/Qwen3-8B \
  --devices "$SLURM_NTASKS_PER_NODE" \
  --num_nodes "$SLURM_NNODES" \
  --strategy fsdp \
  --data JSON \
  --data.json_path data.json \
  --data.val_split_fraction 0.05 \
  --train.save_interval 200 \
  --train.keep_last 2 \
  --resume auto \
  --out_dir out/slurm
code=$?

if [ "$code" -eq 138 ]; then # 128 + SIGUSR1: the state is saved, and there is more to do
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
