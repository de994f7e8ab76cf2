#!/usr/bin/env bash
# One node of 8 GPUs: the trainer on the first four, a server on each of the others. Arguments are overrides: launch.sh optim.lr=2e-6
# CONFIG=my.yaml, from the repository's root, trains another config.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"
source examples/environment.sh
exec dapo train "${CONFIG:-examples/qwen2.5_7b/config.yaml}" --nproc "${TRAINER_GPUS:-4}" "$@"
