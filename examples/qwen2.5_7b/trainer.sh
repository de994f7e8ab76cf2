#!/usr/bin/env bash
# On every trainer node, with servers elsewhere: the nodes meet at HEAD, rank 0 runs there, and the servers are waited for.
#   HEAD=node0 NODES=2 NODE_RANK=0 SERVERS="node2:30000 node2:30001 …" DAPO_ENGINE_KEY=… trainer.sh [section.key=value …]
# run.dir, the model and the data must be on a file system that all trainer nodes share.
# CONFIG=my.yaml, from the repository's root, trains another config.
set -euo pipefail
: "${HEAD:?the first trainer node}" "${NODES:?how many}" "${NODE_RANK:?which of them this is, from 0}" "${SERVERS:?host:port …}"
: "${DAPO_ENGINE_KEY:?what the servers and the trainer share}"
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"
source examples/environment.sh

urls=()
for server in $SERVERS; do
  urls+=("http://$server")
  patience=$((SECONDS + ${PATIENCE:-1800}))
  until curl --noproxy '*' --silent --fail --output /dev/null --max-time 5 "http://$server/health"; do
    ((SECONDS < patience)) || { echo "no server at $server" >&2 && exit 1; }
    sleep 5
  done
done

exec torchrun --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "${GPUS:-8}" --master-addr "$HEAD" --master-port "${PORT:-29500}" \
  -m dapo train "${CONFIG:-examples/qwen2.5_7b/config.yaml}" engine.kind=sglang engine.urls="[$(IFS=, && echo "${urls[*]}")]" engine.sglang={} "$@"
