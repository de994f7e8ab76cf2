#!/usr/bin/env bash
# On a node of servers: one for every TP GPUs of this node, at ports 30000, 30001, …; all end with this script.
#   MODEL=models/Qwen2.5-7B DAPO_ENGINE_KEY=… server.sh [arguments of SGLang]
# One that ends is started again, and takes part from the trainer's next sync of weights on. One that ends five times in a row within five
# minutes of its start is given up; the script ends when all are.
set -euo pipefail
: "${MODEL:?the Hugging Face directory that the trainer starts from}" "${DAPO_ENGINE_KEY:?what the servers and the trainer share}"
gpus=${GPUS:-8} tp=${TP:-1} first_port=${FIRST_PORT:-30000}
export no_proxy='*' NO_PROXY='*' # a proxy would be sent prompts and key by the server's own calls
export SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=0 # healthy also while weights arrive, when nothing is generated

folder=$(mktemp -d)
loops=()
# shellcheck disable=SC2317 # the trap calls it
leave() {
  kill "${loops[@]}" 2>/dev/null || true
  wait
  rm -rf "$folder"
}
trap leave EXIT
trap 'exit 143' TERM INT
PATH="$(cd "$(dirname "$0")/../.." && pwd)/.venv/bin:$PATH"
(umask 077 && printf 'api-key: "%s"\n' "$DAPO_ENGINE_KEY" >"$folder/server.yaml") # a command line can be read by everyone on the node

serve() { # GPUS PORT [arguments of SGLang]
  local devices=$1 port=$2 failures=0 child began status
  shift 2
  trap - EXIT
  trap 'kill "$child" 2>/dev/null; wait "$child"; exit 0' TERM
  while ((failures < 5)); do
    began=$SECONDS status=0
    CUDA_VISIBLE_DEVICES=$devices python -m sglang.launch_server --config "$folder/server.yaml" \
      --model-path "$MODEL" --dtype bfloat16 --tp-size "$tp" --host 0.0.0.0 --port "$port" --log-level-http warning "$@" &
    child=$!
    wait "$child" || status=$?
    failures=$((SECONDS - began < 300 ? failures + 1 : 1))
    echo "the server at port $port ended with status $status" >&2
    sleep "$((2 * failures))" & # in the background: a trap waits for what is in the foreground
    child=$!
    wait "$child"
  done
  echo "the server at port $port is given up" >&2
}

for ((i = 0; i < gpus / tp; i++)); do
  serve "$(seq -s, $((i * tp)) $((i * tp + tp - 1)))" $((first_port + i)) "$@" &
  loops+=($!)
done
wait
exit 1
