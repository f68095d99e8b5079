"""Plans with separate pools from a seed: shared nodes and several, mixed GPUs, experts."""

import random

from tests.templates.plans import GIB, NCCL, cluster, moe_spec, plan, spec

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.prediction import Estimate
from rankwright.planner.disaggregated_plan import DisaggregatedPlan, OnePool, PoolsPrediction
from rankwright.planner.plan import KvCachePlan, Limits, Plan
from rankwright.topology.cluster import Cluster

Places = list[tuple[int, int]]


def pools(
    prefill: tuple[int, int, int] = (1, 1, 2),
    decode: tuple[int, int, int] = (4, 1, 1),
    *,
    gpus_per_node: int = 8,
    machines: Cluster | None = None,
    moe: bool = False,
    own_nodes: bool = False,
) -> DisaggregatedPlan:
    """Pools of `(tp, pp, workers)`, packed into nodes one worker after another.

    Args:
        prefill: Of the prefill pool.
        decode: Of the decode pool.
        gpus_per_node: Of every machine.
        machines: Whose they are; None: as many as needed, of one kind.
        moe: Whether the model has experts.
        own_nodes: Whether decode starts on a node of its own.
    """
    used, nodes = 0, 0
    found: list[Places] = []
    for role, (tp, pp, workers) in enumerate((prefill, decode)):
        places: Places = []
        if role and own_nodes and used:
            nodes, used = nodes + 1, 0
        for _ in range(workers):
            if used and used + tp * pp > gpus_per_node:
                nodes, used = nodes + 1, 0
            for _ in range(tp * pp):
                if used == gpus_per_node:
                    nodes, used = nodes + 1, 0
                places.append((nodes, used))
                used += 1
        found.append(places)
    made = machines or cluster([gpus_per_node] * (nodes + 1))
    model = moe_spec(24, 0) if moe else spec(num_layers=24)
    both = [
        _pool(tp, pp, places, made, model.model_copy(update={"name": "meta-llama/Llama-3.1-405B"}))
        for (tp, pp, _), places in zip((prefill, decode), found, strict=True)
    ]
    figure = Estimate(value=0.5, low=0.4, high=0.7)
    return DisaggregatedPlan(
        num_gpus=both[0].num_gpus + both[1].num_gpus,
        engine="vllm",
        prefill=both[0],
        decode=both[1],
        prediction=PoolsPrediction(
            ttft_s=figure,
            tpot_s=figure,
            output_tokens_per_s=figure,
            requests_per_s=1,
            wait_s=0.1,
            prompt_s=0.3,
            transfer_s=0.1,
            transfer_bytes=10**6,
            prefill_load=0.5,
            decode_load=0.9,
        ),
        certificate=both[0].certificate,
        one_pool=OnePool(is_better=False, verdict="one pool: none"),
    )


def _pool(tp: int, pp: int, places: Places, machines: Cluster, model: ModelSpec) -> Plan:
    made = plan(
        [len(places)], tp=tp, pp=pp, machines=cluster([len(places)]), model=model, environment=()
    )
    ranks = tuple(
        rank.model_copy(update={"node": node, "gpu": gpu})
        for rank, (node, gpu) in zip(made.ranks, places, strict=True)
    )
    changed = made.model_dump() | {
        "cluster": machines,
        "cluster_fingerprint": machines.fingerprint,
        "ranks": ranks,
    }
    return Plan.model_validate(changed)


def random_pools(seed: int) -> DisaggregatedPlan:
    """The plan of `seed`."""
    draw = random.Random(seed)
    per_node = draw.choice([4, 8])
    sizes = [size for size in (1, 2, 4, 8) if size <= per_node]
    shapes: list[tuple[int, int, int]] = []
    for _ in range(2):
        tp = draw.choice(sizes)
        pp = draw.choice([1, 1, 1, 2]) if 2 * tp <= per_node or tp == per_node else 1
        shapes.append((tp, pp, draw.randint(1, 4)))
    made = pools(
        shapes[0],
        shapes[1],
        gpus_per_node=per_node,
        moe=draw.random() < 0.4,
        own_nodes=draw.random() < 0.4,
    )
    if draw.random() < 0.4:
        made = _mixed(made)
    changed: dict[str, Plan] = {}
    for role, pool in made.pools.items():
        split: dict[str, object] = {}
        if _has_experts(pool):
            split["ep"] = draw.choice([1, pool.split.tp])
        if _has_experts(pool) and draw.random() < 0.5:
            split["attention"] = "dp"
        changed[role] = pool.model_copy(
            update={
                "split": pool.split.model_copy(update=split),
                "kv_cache": KvCachePlan(block_tokens=64, num_blocks=draw.randint(1, 9999)),
                "environment": tuple(draw.sample(NCCL, draw.randint(0, 2))),
                "limits": Limits(
                    max_num_seqs=draw.randint(1, 1024),
                    max_batched_tokens=draw.randint(64, 16384),
                    max_model_len=draw.randint(16, 131072),
                ),
                "prediction": pool.prediction.model_copy(
                    update={"memory_bytes_per_gpu": _bytes(draw.uniform(1, 80) * GIB)}
                ),
            }
        )
    return made.model_copy(update=changed)


def _bytes(high: float) -> Estimate:
    return Estimate(value=high / 1.05, low=high / 1.2, high=high)


def _has_experts(pool: Plan) -> bool:
    return any(run.layer.feed_forward.num_experts > 0 for run in pool.model.layer_runs)


def _mixed(made: DisaggregatedPlan) -> DisaggregatedPlan:
    """`made` with other GPUs in the nodes that only decode is on."""
    shared = {rank.node for rank in made.prefill.ranks}
    nodes = tuple(
        node
        if index in shared
        else node.model_copy(
            update={
                "gpus": tuple(
                    gpu.model_copy(update={"device": "a100-sxm-80gb", "name": "a100"})
                    for gpu in node.gpus
                )
            }
        )
        for index, node in enumerate(made.cluster.nodes)
    )
    machines = made.cluster.model_copy(update={"nodes": nodes})
    update = {"cluster": machines, "cluster_fingerprint": machines.fingerprint}
    return made.model_copy(
        update={role: pool.model_copy(update=update) for role, pool in made.pools.items()}
    )
