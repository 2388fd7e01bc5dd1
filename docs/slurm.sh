#!/usr/bin/env bash
# Training on two machines of four GPUs under Slurm: sbatch docs/slurm.sh msdm.py --preset paper --data DIR ...
# Two minutes before the time is up torchrun gets SIGTERM: the run is saved, and the same command goes on.
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=32 --time=24:00:00 --signal=TERM@120
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)
srun .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 4 \
  --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" "$@"
