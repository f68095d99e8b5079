"""Times steps of our executor over batches and contexts, beside what the cost model says of each.

    python benchmarks/bench_points.py h100            one H100:    Llama-3.1-8B, Qwen3-30B-A3B
    python benchmarks/bench_points.py h200            one H200:    the same and Qwen3-32B
    python benchmarks/bench_points.py 2xh200          two H200:    TP2, PP2, DP2 and EP2
    torchrun --nproc-per-node 2 benchmarks/bench_points.py --model Qwen/Qwen3-32B --tp 2    one form

With the name of a machine every form runs in processes of its own, until `--seconds` (280) are
over; what did not fit is said. Random weights. A form writes `points-*.json` when it is done:
seconds of every point, and the most that each rank allocated beside what was predicted.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from executor_points import (
    OUTPUT_TOKENS,
    POINTS,
    Point,
    decode_s,
    fitting,
    pipeline_of,
    prompt_s,
)

# By machine: GPUs, and the forms from the one that matters most.
MACHINES: dict[str, tuple[int, tuple[tuple[str, ...], ...]]] = {
    "h100": (
        1,
        (("--model", "meta-llama/Llama-3.1-8B"), ("--model", "Qwen/Qwen3-30B-A3B")),
    ),
    "h200": (
        1,
        (
            ("--model", "Qwen/Qwen3-32B"),
            ("--model", "Qwen/Qwen3-30B-A3B"),
            ("--model", "meta-llama/Llama-3.1-8B"),
        ),
    ),
    "2xh200": (
        2,
        (
            ("--model", "meta-llama/Llama-3.1-8B", "--tp", "2"),
            ("--model", "Qwen/Qwen3-30B-A3B", "--tp", "2", "--ep", "2"),
            ("--model", "meta-llama/Llama-3.1-8B", "--pp", "2"),
            ("--model", "meta-llama/Llama-3.1-8B", "--dp", "2"),
            ("--model", "Qwen/Qwen3-32B", "--tp", "2"),
            ("--model", "Qwen/Qwen3-30B-A3B", "--tp", "2"),
        ),
    ),
}
PROMPTS = 9  # timed at each length, after three that are not
_FORM_S = 75.0  # that a form takes at most; none is begun with less left


def run_machine(name: str, seconds: float, output: Path | None) -> int:
    """Run the forms of a machine one after another; return how many failed."""
    num_gpus, forms = MACHINES[name]
    end_s = time.monotonic() + seconds
    failed = 0
    for form in forms:
        left_s = end_s - time.monotonic()
        if left_s < _FORM_S:
            print(f"left out, {left_s:.0f} s are left: {' '.join(form)}", flush=True)
            continue
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_gpus)]
        command += [__file__, *form]
        if output is not None:
            command += ["--output", str(output)]
        try:
            status = subprocess.run(command, timeout=left_s).returncode
        except subprocess.TimeoutExpired:
            status = 124
        if status:
            failed += 1
            print(f"failed with status {status}: {' '.join(form)}", flush=True)
    return failed


def measure(client: Any, points: list[Point], chunk_tokens: int) -> list[float]:
    """Return the seconds of each point."""
    client.run([(64, 8)] * 4)
    return [seconds_of(client, point, chunk_tokens) for point in points]


def seconds_of(client: Any, point: Point, chunk_tokens: int) -> float:
    """Return the median step of a batch that decodes, or the time to the token after a prompt."""
    if point.kind == "prompt":
        times = [client.run([(point.context, 2)]).first_token_s()[0] for _ in range(3 + PROMPTS)]
        return float(statistics.median(times[3:]))
    # The first sequences decode while prompts of the last are computed: those tokens come on top.
    output = OUTPUT_TOKENS + point.batch * point.context // chunk_tokens + 1
    return float(client.run([(point.context, output)] * point.batch).decode_step_s())


def predictions(plan: Any, points: list[Point]) -> list[float]:
    """Return the predicted seconds of each point, in the middle of the tokens it generates."""
    pipeline = pipeline_of(plan.split, plan.model, plan.cluster)
    found: list[float] = []
    for point in points:
        if point.kind == "prompt":
            found.append(prompt_s(pipeline, plan.split, point.context))
        else:
            context = point.context + OUTPUT_TOKENS / 2
            found.append(decode_s(pipeline, plan.split, point.batch, context))
    return found


def run_form(arguments: argparse.Namespace) -> None:
    """Start this rank of one form and measure on the leader of replica 0."""
    # Of the processes that torchrun starts; the one that starts torchrun does without torch.
    import torch
    import torch.distributed as dist

    from bench_engine import floor_bytes
    from replica import describe, name_of, peak_bytes, run, show, start
    from result import write_result

    replica = start(arguments)
    plan = replica.plan
    points = fitting(
        POINTS,
        plan.limits.max_num_seqs,
        plan.limits.max_model_len,
        plan.kv_cache.num_tokens * plan.split.cache_parts,
    )
    seconds = run(replica, measure, points, plan.limits.max_batched_tokens)
    peaks = replica.mesh.gather_integers(peak_bytes())
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    used = replica.mesh.gather_integers(total - free)
    if replica.mesh.is_leader and replica.mesh.place.replica == 0:
        made = predictions(plan, points)
        rows: list[dict[str, Any]] = [
            {
                "what": point.kind,
                "batch": point.batch,
                "context": point.context,
                "measured_ms": measured * 1e3,
                "predicted_ms": predicted * 1e3,
                "predicted_over_measured": predicted / measured,
            }
            for point, measured, predicted in zip(points, seconds, made, strict=True)
        ]
        for row, point in zip(rows, points, strict=True):
            if point.kind == "decode":
                # In a pipeline a token passes all stages, one after another.
                weights, kv = floor_bytes(plan, point.batch)
                held = point.batch * (point.context + OUTPUT_TOKENS / 2) * kv
                held /= plan.split.cache_parts
                floor_s = plan.split.pp * (weights + held) / replica.copy_bytes_per_s
                row |= {
                    "floor_ms": floor_s * 1e3,
                    "share_of_floor": floor_s * 1e3 / row["measured_ms"],
                }
            show(row)
        content = {
            **describe(replica, arguments.model),
            "peak_memory_bytes": peaks,
            "device_memory_bytes": used,
            "rows": rows,
        }
        name = name_of("points", replica, arguments.model)
        print(write_result(name, content, folder=arguments.output))
    del replica
    dist.destroy_process_group()


def main() -> int:
    """Return the exit status: 1 where a form failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    if len(sys.argv) > 1 and sys.argv[1] in MACHINES:
        parser.add_argument("machine", choices=tuple(MACHINES))
        parser.add_argument("--seconds", type=float, default=280.0)
        parser.add_argument("--output", type=Path, help="folder of the JSON files")
        arguments = parser.parse_args()
        return int(run_machine(arguments.machine, arguments.seconds, arguments.output) > 0)
    from replica import add_arguments

    add_arguments(parser)
    run_form(parser.parse_args())
    return 0


if __name__ == "__main__":
    sys.exit(main())
