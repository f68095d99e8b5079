"""Long prompts and decoding over long contexts, with and without context parallelism.

    torchrun --nproc-per-node 1 benchmarks/bench_context_parallel.py --cp 1
    torchrun --nproc-per-node 2 benchmarks/bench_context_parallel.py --cp 2
    torchrun --nproc-per-node 2 benchmarks/bench_context_parallel.py --cp 2 --cp-exchange ring

Random weights, the real leader and scheduler. Run it with --cp 1 and --cp 2 on one machine: the
time to first token of the first over that of the second is what a prompt gains. The floor of a
decode step is the weights and this rank's part of the KV cache, over the copy bandwidth measured in
the same run. The floor of a prompt is its products and attention over the rate that --flops names.
"""

import argparse
import statistics
from typing import Any

import torch.distributed as dist

from bench_engine import floor_bytes
from client import Client
from rankwright.cost_model.parameters import count_parameters
from rankwright.cost_model.workload import Workload
from rankwright.planner.plan import Plan
from replica import add_arguments, describe, name_of, pinned_plan, run, show, start
from result import write_result

# What an H100 or H200 reaches in large bfloat16 products (benchmarks/results).
MATRIX_FLOPS_PER_S = 770e12
OUTPUT_TOKENS = 48


def long_plan(arguments: argparse.Namespace) -> Plan:
    """Return the pinned plan, with a cache for the batch and chunks as asked."""
    workload = Workload(
        input_tokens=arguments.prompt,
        output_tokens=OUTPUT_TOKENS,
        concurrency=max(arguments.batches) * arguments.dp,
    )
    plan = pinned_plan(arguments, workload)
    tokens = arguments.prompt + OUTPUT_TOKENS + arguments.chunk
    block_tokens = arguments.block_tokens
    blocks = max(arguments.batches) * (-(-tokens // (block_tokens * arguments.cp)) + 1)
    limits = {
        "max_batched_tokens": arguments.chunk,
        "max_num_seqs": max(arguments.batches),
        "max_model_len": arguments.prompt + OUTPUT_TOKENS,
    }
    return plan.model_copy(
        update={
            "kv_cache": plan.kv_cache.model_copy(
                update={"block_tokens": block_tokens, "num_blocks": blocks}
            ),
            "limits": plan.limits.model_copy(update=limits),
        }
    )


def prefill_flops(plan: Plan, tokens: int) -> float:
    """Return the operations of a prompt: twice the parameters a token, and causal attention."""
    spec = plan.model
    pairs = tokens * (tokens + 1) / 2
    heads = sum(layer.attention.num_heads * layer.attention.head_dim for layer in spec.layers)
    in_layers = count_parameters(spec) - spec.vocab_size * spec.hidden_size
    return 2.0 * tokens * in_layers + 4.0 * pairs * heads


def measure(
    client: Client, plan: Plan, bytes_per_s: float, prompt: int, batches: list[int]
) -> list[dict[str, Any]]:
    """Return a row for the prompt alone, and one for each batch that decodes."""
    client.run([(prompt, 2)])
    times = [client.run([(prompt, 2)]).first_token_s()[0] for _ in range(3)]
    split = plan.split
    ranks = split.gpus_per_replica
    floor_s = prefill_flops(plan, prompt) / (MATRIX_FLOPS_PER_S * ranks)
    seconds = statistics.median(times)
    rows: list[dict[str, Any]] = [
        {
            "what": "prefill",
            "prompt_tokens": prompt,
            "chunk_tokens": plan.limits.max_batched_tokens,
            "block_tokens": plan.kv_cache.block_tokens,
            "ttft_s": seconds,
            "floor_s": floor_s,
            "share_of_floor": floor_s / seconds,
        }
    ]
    for batch in batches:
        steps = -(-batch * prompt // plan.limits.max_batched_tokens)
        output = min(OUTPUT_TOKENS, 24) if batch == 1 else OUTPUT_TOKENS
        if batch > 1 and steps + 8 > OUTPUT_TOKENS:
            continue  # the first would be done before the last decodes
        step_s = client.run([(prompt, output)] * batch).decode_step_s()
        weights, kv = floor_bytes(plan, batch)
        floor_s = split.pp * (weights + batch * prompt * kv / split.cp) / bytes_per_s
        rows.append(
            {
                "what": "decode",
                "batch": batch,
                "context_tokens": prompt,
                "step_ms": step_s * 1e3,
                "floor_ms": floor_s * 1e3,
                "share_of_floor": floor_s / step_s,
            }
        )
    return rows


def main() -> None:
    """Start this rank, measure on the leader."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--prompt", type=int, default=131_000, help="tokens of a prompt")
    parser.add_argument("--chunk", type=int, default=16_384, help="tokens of a step at most")
    parser.add_argument("--block-tokens", type=int, default=128, help="of the KV cache")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="that decode")
    arguments = parser.parse_args()
    replica = start(arguments, long_plan(arguments))
    rows = run(
        replica,
        measure,
        replica.plan,
        replica.copy_bytes_per_s,
        arguments.prompt,
        arguments.batches,
    )
    if replica.mesh.is_leader and replica.mesh.place.replica == 0:
        for row in rows:
            show(row)
        content = {**describe(replica, arguments.model), "rows": rows}
        name = name_of("context", replica, arguments.model)
        print(write_result(name, content, folder=arguments.output))
    del replica
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
