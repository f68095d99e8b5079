"""Whole-engine latency and throughput on this machine's GPUs, beside the memory-bandwidth floor.

    torchrun --nproc-per-node 1 benchmarks/bench_engine.py --model meta-llama/Llama-3.1-8B
    torchrun --nproc-per-node 2 benchmarks/bench_engine.py --model meta-llama/Llama-3.1-8B --tp 2
    torchrun --nproc-per-node 2 benchmarks/bench_engine.py --model Qwen/Qwen3-30B-A3B --tp 2 --ep 2

Random weights of the model's shapes, the real leader with its scheduler and its socket messages to
a client in another process, so that a figure is what a user of one replica sees before HTTP. The
floor of a decode step is the weights that a rank reads once (all but the embedding's unused rows,
and of the experts those that some token chose, if all are as likely) plus the KV cache of the
batch, over the copy bandwidth measured in the same run.
"""

import argparse
import random
import statistics
from typing import Any

import torch.distributed as dist

from client import Client
from rankwright.cost_model.memory import (
    embedding_weight_bytes,
    stage_kv_bytes_per_token,
    stage_layers,
    stage_weight_bytes,
)
from rankwright.cost_model.parameters import layer_tensors, tensor_bytes
from rankwright.planner.plan import Plan
from replica import add_arguments, describe, name_of, run, show, start
from result import write_result

# (batch, prompt tokens, output tokens); enough tokens that the first request still decodes when the
# last one's prompt is done.
SCENARIOS = (
    (1, 512, 128),
    (8, 512, 96),
    (32, 512, 64),
    (64, 512, 64),
    (128, 512, 128),
    (256, 512, 192),
)
PREFILLS = (512, 2048, 4096, 8000)
# Prompts of equal length at once, one token each: (prompts, tokens).
PREFILL_BATCH = (128, 512)
# Requests at once of random prompt and output lengths: the workload of nano-vllm's README.
NUM_MIXED, MIXED_LENGTHS = 256, (100, 1024)


def floor_bytes(plan: Plan, batch: int) -> tuple[float, int]:
    """Return the weights that the fullest rank reads in a step, and the KV bytes of a token."""
    split = plan.split
    weights = max(_read_weight_bytes(plan, stage, batch) for stage in range(split.pp))
    kv = max(stage_kv_bytes_per_token(plan.model, split, stage=stage) for stage in range(split.pp))
    return weights, kv


def _read_weight_bytes(plan: Plan, stage: int, batch: int) -> float:
    spec, split = plan.model, plan.split
    total: float = stage_weight_bytes(spec, split, stage=stage)
    if stage == 0 and not (spec.tie_embeddings and split.pp == 1):
        total -= embedding_weight_bytes(spec, tp=split.tp)
    for layer, count in stage_layers(spec, split, stage):
        block = layer.feed_forward
        if block.kind == "moe":
            experts = sum(
                tensor_bytes(tensor, spec.weight_dtypes)
                for tensor in layer_tensors(layer, spec.hidden_size, tp=split.tp, ep=split.ep)
                if tensor.name.startswith("expert ")
            )
            total -= count * experts * (1 - block.experts_per_token / block.num_experts) ** batch
    return total


def measure(client: Client, plan: Plan, bytes_per_s: float) -> list[dict[str, Any]]:
    """Run every scenario twice and keep the second; return a row for each."""
    limits = plan.limits
    rows = [
        decode_row(client, plan, bytes_per_s, *scenario)
        for scenario in SCENARIOS
        if scenario[0] <= limits.max_num_seqs and sum(scenario[1:]) <= limits.max_model_len
    ]
    for prompt in PREFILLS:
        if prompt + 2 <= limits.max_model_len:
            client.run([(prompt, 2)])
            times = [client.run([(prompt, 2)]).first_token_s()[0] for _ in range(5)]
            rows.append(
                {
                    "what": "ttft",
                    "batch": 1,
                    "prompt_tokens": prompt,
                    "ttft_ms": statistics.median(times) * 1e3,
                }
            )
    rows.append(prefill_row(client))
    rows.append(mixed_row(client, limits.max_model_len))
    return rows


def decode_row(
    client: Client, plan: Plan, bytes_per_s: float, batch: int, prompt: int, output: int
) -> dict[str, Any]:
    """Return the time of a step in which `batch` sequences decode."""
    # The first requests decode while prompts of the last are computed: those tokens come on top.
    output += -(-batch * prompt // plan.limits.max_batched_tokens)
    client.run([(prompt, 8)] * batch)
    line = client.run([(prompt, output)] * batch)
    step_s = line.decode_step_s()
    weights, kv = floor_bytes(plan, batch)
    # In a pipeline a token passes all stages, one after another.
    floor_s = plan.split.pp * (weights + batch * (prompt + output / 2) * kv) / bytes_per_s
    return {
        "what": "decode",
        "batch": batch,
        "prompt_tokens": prompt,
        "step_ms": step_s * 1e3,
        "floor_ms": floor_s * 1e3,
        "share_of_floor": floor_s / step_s,
        "output_tokens_per_s_of_a_replica": batch * output / line.total_s(),
    }


def prefill_row(client: Client) -> dict[str, Any]:
    """Return the rate at which many prompts are computed."""
    batch, prompt = PREFILL_BATCH
    times = [client.run([(prompt, 1)] * batch).total_s() for _ in range(3)][1:]
    seconds = statistics.median(times)
    return {
        "what": "prefill",
        "batch": batch,
        "prompt_tokens": prompt,
        "seconds": seconds,
        "prompt_tokens_per_s": batch * prompt / seconds,
    }


def mixed_row(client: Client, max_model_len: int) -> dict[str, Any]:
    """Return the output rate of requests that differ, all sent at once."""
    low, high = MIXED_LENGTHS
    rng = random.Random(0)
    lengths = [
        (rng.randint(low, min(high, max_model_len // 2)), rng.randint(low, high))
        for _ in range(NUM_MIXED)
    ]
    client.run(lengths[:32])
    line = client.run(lengths)
    return {
        "what": "mixed",
        "batch": NUM_MIXED,
        "prompt_tokens": sum(prompt for prompt, _ in lengths),
        "output_tokens": sum(output for _, output in lengths),
        "seconds": line.total_s(),
        "output_tokens_per_s_of_a_replica": sum(output for _, output in lengths) / line.total_s(),
    }


def main() -> None:
    """Start this rank, measure on the leader of replica 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    arguments = parser.parse_args()
    replica = start(arguments)
    rows = run(replica, measure, replica.plan, replica.copy_bytes_per_s)
    if replica.mesh.is_leader and replica.mesh.place.replica == 0:
        for row in rows:
            show(row)
        content = {**describe(replica, arguments.model), "rows": rows}
        print(
            write_result(
                name_of("engine", replica, arguments.model), content, folder=arguments.output
            )
        )
    del replica
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
