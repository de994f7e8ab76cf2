#!/usr/bin/env bash
# On a node of servers: one for every TP GPUs of this node, at ports 30000, 30001, …; all end with the first that ends, or with this script.
#   MODEL=models/Qwen2.5-7B DAPO_ENGINE_KEY=… server.sh [arguments of SGLang]
set -euo pipefail
: "${MODEL:?the Hugging Face directory that the trainer starts from}" "${DAPO_ENGINE_KEY:?what the servers and the trainer share}"
gpus=${GPUS:-8} tp=${TP:-1}
export SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=0 # healthy also while weights arrive, when nothing is generated

folder=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$folder"' EXIT
(umask 077 && printf 'api-key: "%s"\n' "$DAPO_ENGINE_KEY" >"$folder/server.yaml") # a command line can be read by everyone on the node

for ((i = 0; i < gpus / tp; i++)); do
  CUDA_VISIBLE_DEVICES=$(seq -s, $((i * tp)) $((i * tp + tp - 1))) python -m sglang.launch_server --config "$folder/server.yaml" \
    --model-path "$MODEL" --dtype bfloat16 --tp-size "$tp" --host 0.0.0.0 --port $((30000 + i)) --log-level-http warning "$@" &
done
wait -n
