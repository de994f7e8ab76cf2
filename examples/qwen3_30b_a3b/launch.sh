#!/bin/bash
#SBATCH --job-name=dapo-30b-a3b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@600
# One torchrun agent a machine, eight ranks each. Under SLURM: sbatch launch.sh [section.key=value …]. Without it, on every machine:
#   NODES=2 HEAD=first-machine bash launch.sh [section.key=value …]
# Ten minutes before the time limit the ranks save. RESTARTS=3 starts them again after a failure, all machines being there.
# From the root of the repository. The same command goes on where the run stopped. CONFIG=my.yaml trains another config.
set -euo pipefail
CONFIG=${CONFIG:-examples/qwen3_30b_a3b/config.yaml}
NODES=${NODES:-$SLURM_NNODES}
HEAD=${HEAD:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}
PATH="$PWD/.venv/bin:$PATH"
source examples/environment.sh

command=(torchrun --nnodes "$NODES" --nproc-per-node "${GPUS:-8}" --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}"
  --rdzv-id "${SLURM_JOB_ID:-dapo}" --max-restarts "${RESTARTS:-0}" -m dapo train "$CONFIG" "$@")
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${SLURM_STEP_ID:-}" ]; then
  srun --kill-on-bad-exit=1 "${command[@]}"
else
  "${command[@]}"
fi
