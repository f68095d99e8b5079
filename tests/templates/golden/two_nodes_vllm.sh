#!/bin/bash
# meta-llama/Llama-3.1-405B as TP8 PP2 on vLLM 0.26: 2 nodes x 8 GPUs.
# Made by rankwright 0.1.0.
# Run on every node, with its number and the addresses of all, in the order of the plan:
#   NODES="10.0.0.1 10.0.0.2" NODE_RANK=0 bash vllm.sh
# Serves on port 8000 of the first node.
# vLLM keeps 2 batches in flight over 2 stages; the plan was priced with 1.
set -euo pipefail
node_rank=${NODE_RANK:?set it to the number of this node, 0 to 1}
read -ra nodes <<< "${NODES:?set it to the addresses of the 2 nodes of the plan}"
given=$(wc -w <<< "$NODES")
if [ "$given" -ne 2 ]; then
  echo "vllm.sh: NODES has $given addresses, the plan has 2 nodes" >&2
  exit 2
fi

# a failing link must leave a line
export NCCL_DEBUG="WARN"
# ports of this node
export NCCL_IB_HCA="=mlx5_0,mlx5_1"
# the routed interface
export NCCL_SOCKET_IFNAME="=eth0"

engine=(
  vllm serve "meta-llama/Llama-3.1-405B"
  --tensor-parallel-size 8
  --pipeline-parallel-size 2
  --max-num-seqs 64
  --max-num-batched-tokens 2048
  --enable-chunked-prefill
  --max-model-len 8192
  --gpu-memory-utilization 0.9
  --dtype bfloat16
  --kv-cache-dtype auto
  --shutdown-timeout 60
  --host 0.0.0.0
)

started=()
ending=
# Starts replica $1's processes of this node, on the GPUs $2.
# The node is number $3 of those of the replica, whose first one has the address $4.
start() {
  local words=(--port "$((8000 + $1))")
  local part=$3 head=$4 meet=$((${MEET_PORT:-29500} + $1))
  words+=(--nnodes 2 --node-rank "$part")
  words+=(--master-addr "$head" --master-port "$meet")
  if [ "$part" -gt 0 ]; then
    words+=(--headless)
  fi
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

# Replica, GPUs, number of the node within the replica, address of its first node.
case $node_rank in
  0)
    start 0 0,1,2,3,4,5,6,7 0 "${nodes[0]}"
    ;;
  1)
    start 0 0,1,2,3,4,5,6,7 1 "${nodes[0]}"
    ;;
  *)
    echo "vllm.sh: NODE_RANK is $node_rank, the plan has nodes 0 to 1" >&2
    exit 2
    ;;
esac

status=0
wait -n || status=$?
if [ -z "$ending" ]; then
  echo "vllm.sh: a server ended with status $status" >&2
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
