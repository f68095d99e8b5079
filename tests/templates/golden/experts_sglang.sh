#!/bin/bash
# deepseek-ai/DeepSeek-V3 as TP8 EP4 attnDP on SGLang 0.5.17: 1 node x 8 GPUs.
# Made by rankwright 0.1.0.
# Serves on port 8000.
set -euo pipefail

# a failing link must leave a line
export NCCL_DEBUG="WARN"
# ports of this node
export NCCL_IB_HCA="=mlx5_0,mlx5_1"
# the routed interface
export NCCL_SOCKET_IFNAME="=eth0"

engine=(
  python3 -m sglang.launch_server --model-path "deepseek-ai/DeepSeek-V3"
  --tp-size 8
  --pp-size 1
  --ep-size 4
  --enable-dp-attention
  --dp-size 8
  --max-running-requests 64
  --chunked-prefill-size 2048
  --max-prefill-tokens 2048
  --context-length 8192
  --mem-fraction-static 0.9
  --dtype bfloat16
  --kv-cache-dtype auto
  --enable-metrics
  --host 0.0.0.0
)

started=()
ending=
# Starts replica $1's processes of this node, on the GPUs $2.
start() {
  local words=(--port "$((8000 + $1))")
  CUDA_VISIBLE_DEVICES=$2 "${engine[@]}" "${words[@]}" &
  started+=("$!")
}

# A TERM lets running requests end. A process that ends by itself takes those of this node along.
end() {
  if [ -z "$ending" ]; then
    ending=1
    kill -TERM "${started[@]}" 2>/dev/null || true
  fi
}
trap end TERM INT

# Replica and GPUs.
start 0 0,1,2,3,4,5,6,7

status=0
wait -n || status=$?
if [ -z "$ending" ]; then
  echo "sglang.sh: a server ended with status $status" >&2
  end
else
  status=0
fi
for pid in "${started[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do
    wait "$pid" || true
  done
done
exit "$status"
