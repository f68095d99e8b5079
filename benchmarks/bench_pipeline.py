"""Whether the stages of a pipeline compute at the same time, while sequences decode, on CPUs.

    torchrun --nproc-per-node 2 benchmarks/bench_pipeline.py --model ./tiny --pp 2 --device cpu
    RANKWRIGHT_PIPELINE_AHEAD=1 torchrun ...          # the next batch decided ahead

Random weights, the real leader. Every rank notes when its layers begin and end a batch, by the one
clock of the machine. Of the middle of the run, in which all sequences decode, the result gives the
share of time in which each stage computes, that in which all do, and the tokens a second. On GPUs,
where launches return at once, compare `bench_engine.py --pp 2` with `--dp 2` instead.
"""

import argparse
import os
import time
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from client import Client
from replica import add_arguments, describe, name_of, run, show, start
from result import write_result

Span = tuple[float, float]


def measure(client: Client, batch: int, prompt: int, output: int) -> tuple[float, float, float]:
    """Return when all requests decoded, from and to, and the tokens a second then."""
    line = client.run([(prompt, output)] * batch)
    # The client notes times by another clock.
    offset = time.monotonic() - time.perf_counter()
    first = max(times[0] for times in line.tokens.values())
    last = min(times[-1] for times in line.tokens.values())
    edge = 0.1 * (last - first)
    inside = (first + edge, last - edge)
    count = sum(inside[0] < t <= inside[1] for times in line.tokens.values() for t in times)
    return inside[0] + offset, inside[1] + offset, count / (inside[1] - inside[0])


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


def main() -> None:
    """Run this rank, and write what all of them noted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--decoded", type=int, default=48)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    replica = start(arguments)
    spans: list[Span] = []
    forward = replica.runner.stage.forward

    def noted(*values: Any) -> torch.Tensor:
        begun_s = time.monotonic()
        out = forward(*values)
        spans.append((begun_s, time.monotonic()))
        return out

    replica.runner.stage.forward = noted  # type: ignore[assignment, method-assign]
    found = run(replica, measure, arguments.batch, arguments.prompt, arguments.decoded)
    spans_of: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(spans_of, spans)
    if found is not None:
        begun_s, ended_s, tokens_per_s = found
        busy, together = shares(spans_of, (begun_s, ended_s))
        row = {
            "what": "decode",
            "batch": arguments.batch,
            "ahead": int(os.environ.get("RANKWRIGHT_PIPELINE_AHEAD") == "1"),
            "tokens_per_s": tokens_per_s,
            "share_all_compute": together,
            "shares": busy,
        }
        show(row)
        content = {**describe(replica, arguments.model), "rows": [row]}
        name = f"{name_of('pipeline', replica, arguments.model)}-ahead{row['ahead']}"
        print([round(share, 3) for share in busy], flush=True)
        print(write_result(name, content, folder=arguments.output))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
