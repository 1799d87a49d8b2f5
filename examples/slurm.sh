#!/bin/bash
# fastgpt train on 4 nodes of 8 GPUs:   sbatch examples/slurm.sh --config examples/gpt2.yaml --data.files /data/corpus
#SBATCH --job-name=fastgpt
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
# Slurm sends SIGTERM 120 s before the end; the run saves and leaves, and goes on in the next job.
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
    -m fastgpt.train --resume auto "$@"
