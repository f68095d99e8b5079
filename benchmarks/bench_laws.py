"""Asks many predictions for what physics says of all of them; see `laws.py`.

    PYTHONPATH=src:. python benchmarks/bench_laws.py [--cases 1000] [--seed 0] [--engine vllm]

Draws a model, its format, a GPU, a split, a batch, lengths, and for each asks all laws. Prints what
breaks one and exits with 1 if anything does.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from laws import (
    Point,
    faster_is_not_slower,
    figures_are_sound,
    halves_compute_no_slower,
    hardware_is_not_exceeded,
    more_work_takes_longer,
    shorter_weights_are_not_slower,
)
from rankwright.cli.options import with_dtypes
from rankwright.cost_model.dtypes import BITS
from rankwright.cost_model.legality import cut_is_legal, has_experts
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import AttentionSplit
from rankwright.topology.shorthand import parse_cluster
from result import write_result

MODELS = (
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B",
    "Qwen/Qwen3-32B",
    "Qwen/Qwen3-30B-A3B",
    "mistralai/Mixtral-8x7B-v0.1",
    "openai/gpt-oss-20b",
    "deepseek-ai/DeepSeek-V3",
)
GPUS = ("h100-sxm", "h200-sxm", "a100-sxm", "b200-sxm", "l40s", "rtx4090", "h100-pcie")
_DRAWS = 100  # of a split, until one is legal


def draw(random_: random.Random, engine: str) -> Point:
    """Return one point whose split is legal."""
    model = read_model(random_.choice(MODELS))
    machines = random_.choice(("8x{}", "2x8x{}+ib400"))
    cluster = parse_cluster(machines.format(random_.choice(GPUS)))
    for _ in range(_DRAWS):
        tp, pp = random_.choice((1, 2, 4, 8)), random_.choice((1, 1, 2, 3))
        is_shared = has_experts(model) and tp > 1
        ep = random_.choice([n for n in (1, 2, 4, 8) if tp % n == 0]) if is_shared else 1
        attention: AttentionSplit = random_.choice(("tp", "dp")) if is_shared else "tp"
        room = cluster.num_gpus // (tp * pp)
        reason = cut_is_legal(model, tp=tp, ep=ep, cp=1, attention=attention, engine=engine)
        if reason is None and room:
            break
    degrees = {"tp": tp, "pp": pp, "ep": ep, "dp": random_.randint(1, room)}
    return Point(
        model,
        cluster,
        tuple(degrees.items()),
        attention,
        random_.choice((1, 2, 5, 16, 64, 200, 256)),
        random_.choice((16, 128, 1000, 2048, 6000, 20000)),
        random_.choice((2, 16, 128, 1000)),
        engine,
    )


def broken(point: Point, random_: random.Random) -> Iterator[tuple[str, str]]:
    """Yield the name of every law that `point` breaks, with what breaks it."""
    batches = sorted(random_.sample(range(1, 300), 3))
    contexts = sorted(random_.sample(range(1, 20000), 3))
    asked = {
        "figures are sound": figures_are_sound(point),
        "hardware is not exceeded": hardware_is_not_exceeded(point),
        "more work takes longer": more_work_takes_longer(point, batches, contexts),
        "faster is not slower": faster_is_not_slower(point, random_.choice((1.02, 1.5, 4.0))),
    }
    if all(size == 1 for _, size in point.degrees):
        asked["two compute no slower than one"] = halves_compute_no_slower(point)
    has_float8 = point.cluster.nodes[0].gpus[0].device in ("h100-sxm", "h200-sxm", "b200-sxm")
    if has_float8 and BITS[point.model.weight_dtypes.feed_forward] > BITS["float8"]:
        short = with_dtypes(point.model, "float8", None)
        asked["short weights are not slower"] = shorter_weights_are_not_slower(point, short)
    for name, lines in asked.items():
        yield from ((name, line) for line in lines)


def main() -> None:
    """Ask, print and write what breaks a law."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="rankwright")
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    rows: list[dict[str, str]] = []
    for case in range(arguments.cases):
        random_ = random.Random(f"{arguments.seed} {case}")
        for name, line in broken(draw(random_, arguments.engine), random_):
            print(f"{name}: {line}", flush=True)
            rows.append({"law": name, "broken_by": line})
    content = {
        "cases": arguments.cases,
        "seed": arguments.seed,
        "engine": arguments.engine,
        "broken": len(rows),
        "by_law": Counter(row["law"] for row in rows),
        "rows": rows[:100],
    }
    print(write_result(f"laws-{arguments.engine}", content, folder=arguments.output))
    sys.exit(1 if rows else 0)


if __name__ == "__main__":
    main()
