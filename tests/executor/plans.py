"""Plans for tests: any split of any small model over CPU ranks, without the planner's search."""

from collections.abc import Sequence
from typing import Literal

from rankwright.cost_model.collectives import Group
from rankwright.cost_model.layout import SlotKind
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.predict import Replicas
from rankwright.cost_model.prediction import Estimate, Prediction
from rankwright.cost_model.shards import even_range
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.planner.parts_plan import AlikePlan, PartsPlan, PartsPrediction
from rankwright.planner.placement import place_ranks
from rankwright.planner.plan import Certificate, KvCachePlan, Limits, Plan
from rankwright.topology.cluster import Cluster, Gpu, Node


def cpu_plan(
    spec: ModelSpec,
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    cp: int = 1,
    ep: int = 1,
    attention: Literal["tp", "dp"] = "tp",
    cp_exchange: Literal["gather", "ring"] = "gather",
    stage_layers: tuple[int, ...] | None = None,
    num_blocks: int = 64,
    block_tokens: int = 16,
    max_num_seqs: int = 8,
    max_batched_tokens: int = 64,
    max_model_len: int = 256,
    device: str = "cpu",
) -> Plan:
    """Return a plan of `dp` replicas of `pp` stages of `cp * tp` ranks, one node."""
    if stage_layers is None:
        stage_layers = tuple(
            stop - start for start, stop in (even_range(spec.num_layers, pp, i) for i in range(pp))
        )
    split = Split(
        tp=tp,
        pp=pp,
        dp=dp,
        cp=cp,
        ep=ep,
        attention=attention,
        cp_exchange=cp_exchange,
        stage_layers=stage_layers,
        max_batch_size=max_num_seqs,
    )
    cluster = Cluster(
        nodes=(
            Node(
                name="here",
                gpus=tuple(
                    Gpu(index=i, device=device, name=device, memory_bytes=1, total_memory_bytes=1)
                    for i in range(split.num_gpus)
                ),
            ),
        )
    )
    kind = SlotKind(
        gpus=tuple(
            tuple(range(first, first + tp * cp)) for first in range(0, split.num_gpus, tp * cp)
        ),
        nodes_per_slot=1,
        nodes=(range(1),),
        gpu=cluster.nodes[0].gpus[0],
        group=Group(tp * cp),
    )
    nothing = Estimate(value=1, low=1, high=1)
    return Plan(
        num_gpus=split.num_gpus,
        model=spec,
        workload=Workload(),
        cluster=cluster,
        cluster_fingerprint=cluster.fingerprint,
        split=split,
        ranks=place_ranks(spec, split, (Replicas((kind,) * pp, dp),)),
        kv_cache=KvCachePlan(block_tokens=block_tokens, num_blocks=num_blocks),
        limits=Limits(
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            max_model_len=max_model_len,
        ),
        prediction=Prediction(
            ttft_s=nothing,
            tpot_s=nothing,
            output_tokens_per_s=nothing,
            memory_bytes_per_gpu=nothing,
            batch_size=1,
        ),
        certificate=Certificate(
            objective="none: made by a test",
            objective_value=1,
            bound=1,
            gap=0,
            solver="none",
            status="optimal",
            solve_s=0,
            num_candidates=1,
            binding_constraint="none",
        ),
    )


def cpu_parts(*plans: Plan, tokens_per_s: Sequence[float] = ()) -> PartsPlan:
    """Return the plan of `plans` as parts on one machine, each on the CPU ranks after the last's.

    Args:
        plans: Of one model, each made by `cpu_plan`.
        tokens_per_s: Predicted of each part; empty: 1 each.
    """
    gpus = tuple(gpu for plan in plans for gpu in plan.cluster.nodes[0].gpus)
    gpus = tuple(gpu.model_copy(update={"index": index}) for index, gpu in enumerate(gpus))
    cluster = Cluster(nodes=(Node(name="here", gpus=gpus),))
    parts: list[Plan] = []
    for plan, speed in zip(plans, tokens_per_s or [1.0] * len(plans), strict=True):
        first = sum(part.num_gpus for part in parts)
        ranks = [rank.model_copy(update={"gpu": first + rank.gpu}) for rank in plan.ranks]
        rate = Estimate(value=speed, low=speed, high=speed)
        changes = {
            "cluster": cluster,
            "cluster_fingerprint": cluster.fingerprint,
            "ranks": tuple(ranks),
            "prediction": plan.prediction.model_copy(update={"output_tokens_per_s": rate}),
        }
        parts.append(plan.model_copy(update=changes))
    one = plans[0].prediction
    return PartsPlan(
        num_gpus=len(gpus),
        workload=Workload(),
        parts=tuple(parts),
        prediction=PartsPrediction(
            ttft_s=one.ttft_s,
            tpot_s=one.tpot_s,
            output_tokens_per_s=one.output_tokens_per_s,
            memory_bytes_per_gpu=one.memory_bytes_per_gpu,
        ),
        certificate=plans[0].certificate,
        alike=AlikePlan(
            label="none",
            num_gpus=1,
            batch_size=1,
            objective_value=1,
            ttft_s=1,
            tpot_s=1,
            verdict="none: made by a test",
        ),
    )


def two_nodes(plan: Plan) -> Plan:
    """The same plan with half of its ranks on a second machine."""
    value = plan.model_dump(mode="json")
    (node,) = value["cluster"]["nodes"]
    half = len(node["gpus"]) // 2
    node["gpus"], node["count"] = node["gpus"][:half], 2
    value["cluster"]["fabric"] = {
        "kind": "ethernet",
        "bytes_per_s": 1e9,
        "ports_per_node": 1,
        "latency_s": 1e-5,
    }
    for rank in value["ranks"]:
        rank["node"], rank["gpu"] = divmod(rank["rank"], half)
    cluster = type(plan.cluster).model_validate(value["cluster"])
    return Plan.model_validate({**value, "cluster_fingerprint": cluster.fingerprint})
