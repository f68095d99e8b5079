"""What a pipeline makes of requests that are always on their way, beside replicas without stages.

    torchrun --nproc-per-node 2 benchmarks/bench_pipeline.py --pp 2 --batch 128     two GPUs
    torchrun --nproc-per-node 2 benchmarks/bench_pipeline.py --dp 2 --batch 64      the same load
    torchrun --nproc-per-node 2 benchmarks/bench_pipeline.py --model ./tiny --pp 2 --device cpu
    RANKWRIGHT_PIPELINE_AHEAD=0|1 torchrun ...        without and with the next batch decided ahead

Random weights, the real leader. `decode`: all sequences decode; `served`: `--batch` requests are
kept on their way, prompts beside tokens, and tokens are counted in the middle half of the run. On
CPUs every rank also notes when its layers begin and end a batch, by the one clock of the machine,
and the first row gives the share of time in which each stage computes, and that in which all do; on
GPUs, where launches return at once, compare the rates of `--pp 2` and `--dp 2` instead.
"""

import argparse
import os
import random
import time
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from client import Client
from rankwright.executor.engine import default_ahead
from rankwright.executor.models.decoder import DecoderStage
from replica import add_arguments, describe, name_of, run, show, start
from result import write_result

Span = tuple[float, float]


def measure(
    client: Client, batch: int, prompt: int, output: int, waves: int, chunk_tokens: int
) -> tuple[float, float, float, float]:
    """Return when all requests decoded, from and to, the tokens a second then, and when served."""
    client.run([(prompt, 8)] * batch)
    # The first sequences decode while prompts of the last are computed: those tokens come on top.
    line = client.run([(prompt, output + batch * prompt // chunk_tokens)] * batch)
    # The client notes times by another clock.
    offset = time.monotonic() - time.perf_counter()
    first = max(times[0] for times in line.tokens.values())
    last = min(times[-1] for times in line.tokens.values())
    edge = 0.1 * (last - first)
    inside = (first + edge, last - edge)
    count = sum(inside[0] < t <= inside[1] for times in line.tokens.values() for t in times)
    served = served_tokens_per_s(client, batch, prompt, output, waves)
    return inside[0] + offset, inside[1] + offset, count / (inside[1] - inside[0]), served


def served_tokens_per_s(client: Client, batch: int, prompt: int, output: int, waves: int) -> float:
    """Return the output rate while `batch` requests are on their way, of `waves` times as many.

    Lengths differ by up to a half, so that requests do not end together.
    """
    rng = random.Random(0)
    lengths = [(prompt, rng.randint(output // 2, output * 3 // 2)) for _ in range(waves * batch)]
    times = sorted(t for one in client.keep(lengths, batch).tokens.values() for t in one)
    first, last = len(times) // 4, 3 * len(times) // 4
    return (last - first) / (times[last] - times[first])


def shares(spans_of: list[list[Span]], window: Span) -> tuple[list[float], float]:
    """Return the share of `window` in which each stage computes, and that in which all do.

    >>> shares([[(0, 2), (3, 4)], [(1, 4)]], (0, 4))
    ([0.75, 0.75], 0.5)
    """
    cuts = sorted({t for spans in spans_of for span in spans for t in span} | set(window))
    cuts = [t for t in cuts if window[0] <= t <= window[1]]
    busy, together = [0.0] * len(spans_of), 0.0
    for begin, end in pairwise(cuts):
        computes = [any(a <= begin and end <= b for a, b in spans) for spans in spans_of]
        for stage, one in enumerate(computes):
            busy[stage] += (end - begin) * one
        together += (end - begin) * all(computes)
    whole = window[1] - window[0]
    return [seconds / whole for seconds in busy], together / whole


def note_spans(stage: DecoderStage, spans: list[Span]) -> None:
    """Have the stage note when its layers begin and end a batch."""
    forward = stage.forward

    def noted(*values: Any) -> torch.Tensor:
        begun_s = time.monotonic()
        out = forward(*values)
        spans.append((begun_s, time.monotonic()))
        return out

    stage.forward = noted  # type: ignore[assignment, method-assign]


def main() -> None:
    """Run this rank, and write what all of them noted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--batch", type=int, default=16, help="requests at once of one replica")
    parser.add_argument("--prompt", type=int, help="tokens; 512, on CPUs 32")
    parser.add_argument("--decoded", type=int, help="tokens; 128, on CPUs 48")
    parser.add_argument("--waves", type=int, default=4, help="requests served, in batches")
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    prompt = arguments.prompt or (32 if on_cpu else 512)
    decoded = arguments.decoded or (48 if on_cpu else 128)
    if on_cpu:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    replica = start(arguments)
    spans: list[Span] = []
    if on_cpu:
        note_spans(replica.runner.stage, spans)
    chunk_tokens = replica.plan.limits.max_batched_tokens
    found = run(replica, measure, arguments.batch, prompt, decoded, arguments.waves, chunk_tokens)
    spans_of: list[Any] = [spans] * dist.get_world_size()
    if on_cpu:  # NCCL would take memory for it
        dist.all_gather_object(spans_of, spans)
    if found is not None and replica.mesh.place.replica == 0:
        begun_s, ended_s, tokens_per_s, served = found
        ahead = default_ahead(replica.mesh, replica.runner)
        common = {"batch": arguments.batch, "prompt_tokens": prompt, "ahead": ahead}
        rows: list[dict[str, Any]] = [
            {"what": "decode", **common, "output_tokens_per_s_of_a_replica": tokens_per_s},
            {"what": "served", **common, "output_tokens_per_s_of_a_replica": served},
        ]
        if on_cpu:
            busy, together = shares(spans_of, (begun_s, ended_s))
            rows[0] |= {"share_all_compute": together, "shares": busy}
            print([round(share, 3) for share in busy], flush=True)
        for row in rows:
            show(row)
        content = {**describe(replica, arguments.model), "rows": rows}
        name = f"{name_of('pipeline', replica, arguments.model)}-ahead{ahead}"
        print(write_result(name, content, folder=arguments.output))
    del replica
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
