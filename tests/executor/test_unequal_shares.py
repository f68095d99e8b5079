"""Plans with unequal shares over unlike devices run as planned, and are right."""

import random
from typing import Any

import numpy as np
import pytest
from tests.executor.conftest import Reference
from tests.executor.ranks import Ranks

from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.shards import range_size
from rankwright.cost_model.workload import Workload
from rankwright.planner.make_plan import make_plan
from rankwright.planner.plan import Plan
from rankwright.planner.plan_shares import shares_of
from rankwright.planner.shapes import Pins
from rankwright.topology.cluster import Cluster
from rankwright.topology.shorthand import parse_cluster

CASES = "tests.executor.cases"


def cpus(*speeds: float) -> Cluster:
    """Return one machine of CPU ranks with so many MB/s and MFLOP/s of memory and arithmetic.

    So few that the weights of a tiny model take longer than all that is the same on every rank.
    """
    cluster = parse_cluster(f"{len(speeds)}xcpu")
    (node,) = cluster.nodes
    gpus = tuple(
        gpu.model_copy(
            update={
                "memory_bytes_per_s": speed * 1e6,
                "flops_per_s": {"float32": speed * 1e6, "bfloat16": speed * 1e6},
            }
        )
        for gpu, speed in zip(node.gpus, speeds, strict=True)
    )
    return cluster.model_copy(update={"nodes": (node.model_copy(update={"gpus": gpus}),)})


def planned(reference: Reference, *speeds: float) -> Plan:
    """Return the planner's plan for one TP group over CPU ranks of such speeds."""
    return make_plan(
        read_model(reference.folder),
        cpus(*speeds),
        Workload(input_tokens=40, output_tokens=60, concurrency=4),
        pins=Pins(tp=len(speeds), pp=1, ep=1, cp=1, attention="tp"),
    )


# Heads of four, of two and of one group, MQA, biases, experts; two and three ranks.
@pytest.mark.parametrize(
    ("name", "speeds"),
    [
        ("qwen3", (3.0, 1.0)),
        ("llama", (1.0, 2.0, 1.0)),
        ("llama-tied-mqa", (1.0, 3.0)),
        ("mixtral", (2.0, 1.0)),
    ],
)
def test_a_plan_with_unequal_shares_runs_and_is_right(
    references: dict[str, Reference],
    moe_references: dict[str, Reference],
    pool: Ranks,
    name: str,
    speeds: tuple[float, ...],
) -> None:
    reference = {**references, **moe_references}[name]
    plan = planned(reference, *speeds)
    assert shares_of(plan, plan.ranks[0]) is not None
    fastest, slowest = speeds.index(max(speeds)), speeds.index(min(speeds))
    for held in ("query_heads", "ffn_columns", "vocab"):
        sizes = [range_size(getattr(rank, held)) for rank in plan.ranks]
        assert sizes[fastest] > sizes[slowest], held
    rng = random.Random(7)
    texts = [[rng.randrange(3, reference.vocab_size) for _ in range(n)] for n in (1, 23, 30)]
    folder = str(reference.folder)
    ranks: dict[str, Any] = {"plan": plan.model_dump_json(), "folder": folder}
    for ours, text in zip(
        pool.run(plan.num_gpus, CASES, "logits", *ranks.values(), texts)[0], texts, strict=True
    ):
        theirs = reference.logits(text).numpy()
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    requests = [
        (f"r{i}", text, {"temperature": 0.0, "max_tokens": 24}) for i, text in enumerate(texts)
    ]
    found = pool.run(plan.num_gpus, CASES, "serve", *ranks.values(), requests)[0]
    for index, text in enumerate(texts):
        assert found[f"r{index}"] == reference.greedy(text, 24)
