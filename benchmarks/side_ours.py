"""The load on our engine, under torchrun: `torchrun side_ours.py --model M --json FILE ...`.

Random weights, the real leader, requests over its socket; `bench_side_by_side.py` runs this.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from client import Client
from replica import add_arguments, describe, run, start
from side_load import LOADS, Lengths, append_to, chosen, measure

_BEGUN_S = time.perf_counter()


def measure_ours(client: Client, load: str, wanted: str, path: Path) -> list[dict[str, Any]]:
    """Return the rows `wanted` of the load called `load`; each also goes to `path` as it comes."""

    def answered_s(lengths: Lengths) -> float:
        line = client.run(lengths)
        return max(times[-1] for times in line.tokens.values()) - line.begun_s

    return measure(answered_s, LOADS[load], chosen(LOADS[load], wanted), append_to(path))


def main() -> None:
    """Start this rank; the leader writes what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--load", choices=tuple(LOADS), default="full")
    parser.add_argument("--rows", default="*")
    arguments = parser.parse_args()
    lines = arguments.json.with_suffix(".jsonl")
    replica = start(arguments)
    start_s = time.perf_counter() - _BEGUN_S
    rows = run(replica, measure_ours, arguments.load, arguments.rows, lines)
    if rows is not None and replica.mesh.place.replica == 0:
        limits = replica.plan.limits.model_dump(mode="json")
        described = describe(replica, arguments.model)
        content = {**described, "limits": limits, "start_s": start_s, "rows": rows}
        arguments.json.write_text(json.dumps(content), encoding="utf-8")
    del replica
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
