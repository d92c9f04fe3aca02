#!/bin/bash
# Pre-training on 8 machines of 8 GPUs. Submit it again, and the run continues from its newest checkpoint.
#
#   sbatch examples/cluster/slurm.sh esm2_3B data.store=/shared/store parallel.replicate=8 parallel.shard=8 -o /shared/run
#
#SBATCH --job-name=protea
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Five minutes before the end of its time, the run saves a checkpoint and stops.
#SBATCH --signal=TERM@300
#SBATCH --requeue

set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8

# One torchrun on each machine starts a process for each GPU. If a process ends, all start again from the checkpoint.
srun torchrun \
  --nnodes="$SLURM_NNODES" \
  --nproc-per-node=8 \
  --max-restarts=3 \
  --rdzv-id="$SLURM_JOB_ID" \
  --rdzv-backend=c10d \
  --rdzv-endpoint="$first:29500" \
  -m protea pretrain "$@"
