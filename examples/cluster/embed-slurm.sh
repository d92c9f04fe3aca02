#!/bin/bash
# Embedding on many machines: a job array, of which each task computes one share, and a job that joins them.
# Checked for syntax, not yet run on a cluster.
#
#   shards=$(sbatch --parsable examples/cluster/embed-slurm.sh big.fasta.gz /shared/vectors.parquet -m esm2_t33_650M_UR50D --fast)
#   sbatch --dependency=afterok:$shards --cpus-per-task=4 --wrap "protea merge /shared/vectors.parquet"
#
# A task that is killed continues where it stopped when it is submitted again; a finished one has nothing to do.
# Take more shards than machines, four times as many or more, so that none waits long for the slowest.
#SBATCH --job-name=protea-embed
#SBATCH --array=1-64%16
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
#SBATCH --requeue

set -euo pipefail
input=$1
output=$2
shift 2

export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
srun protea embed "$input" -o "$output" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" "$@"
