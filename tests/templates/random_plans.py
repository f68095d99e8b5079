"""Plans of every sort from a seed: dense and MoE, one node and several, even and uneven, mixed."""

import random
from typing import Any

from tests.templates.plans import GIB, NCCL, cluster, cpu_plan, moe_spec, plan, spec

from rankwright.planner.plan import KvCachePlan, Limits, Plan
from rankwright.topology.cluster import Cluster

DEVICES = ("h100-sxm", "a100-sxm-80gb", "l4")
TYPES = tuple(device.replace("-", "_") for device in DEVICES)  # what a Slurm may call them


def random_plan(seed: int) -> Plan:
    """The plan of `seed`."""
    draw = random.Random(seed)
    if draw.random() < 0.1:
        return cpu_plan([draw.randint(1, 4) for _ in range(draw.randint(1, 3))])
    per_node = draw.choice([1, 2, 4, 8])
    tp = draw.choice([size for size in (1, 2, 4, 8) if size <= per_node])
    num_nodes = draw.choice([1, 1, 2, 2, 4])
    pp = draw.choice([size for size in (1, 2, 4) if (per_node * num_nodes) % (tp * size) == 0])
    counts = [per_node] * num_nodes
    if draw.random() < 0.2 and pp == 1 and per_node > tp:
        counts[-1] = tp  # the last node has fewer
    num_layers = draw.choice([24, 32, 61])
    dense_layers = draw.choice([0, 3])
    is_moe = draw.random() < 0.5
    model = moe_spec(num_layers, dense_layers) if is_moe else spec(num_layers=num_layers)
    model = model.model_copy(update={"kv_dtype": draw.choice(["bfloat16", "bfloat16", "float8"])})
    made = plan(
        counts,
        tp=tp,
        pp=pp,
        machines=_machines(draw, counts),
        model=model,
        environment=tuple(draw.sample(NCCL, draw.randint(0, 3))),
        memory_bytes_per_gpu=draw.uniform(1, 80) * GIB,
    )
    split: dict[str, Any] = {"micro_batches": draw.choice([1, pp])}
    if is_moe:
        split["ep"] = draw.choice([size for size in (1, 2, 4, 8) if tp % size == 0])
        split["attention"] = draw.choice(["tp", "dp"])
    return made.model_copy(
        update={
            "split": made.split.model_copy(update=split),
            "kv_cache": KvCachePlan(
                block_tokens=draw.choice([16, 64]), num_blocks=draw.randint(1, 9999)
            ),
            "limits": Limits(
                max_num_seqs=draw.randint(1, 1024),
                max_batched_tokens=draw.randint(64, 16384),
                max_model_len=draw.randint(16, 131072),
            ),
        }
    )


def _machines(draw: random.Random, counts: list[int]) -> Cluster:
    sizes = [draw.choice([count, 8]) for count in counts]
    one = cluster(sizes, draw.choice(DEVICES))
    if len(counts) == 1 or draw.random() < 0.7:
        return one
    other = cluster(sizes, draw.choice(DEVICES))
    half = len(counts) // 2
    return one.model_copy(update={"nodes": one.nodes[:half] + other.nodes[half:]})


def gpu_types(made: Plan) -> str:
    """A name for each kind of GPU of `made`, as `gpu_types` takes them."""
    kinds = {
        gpu.device
        for rank in made.ranks
        for gpu in made.cluster.node(rank.node).gpus
        if gpu.index == rank.gpu
    }
    return ",".join(f"{kind}={TYPES[DEVICES.index(kind)]}" for kind in sorted(kinds))
