"""What the ranks of a plan hold, read from its ranges: unequal shares, and the memory they take."""

from rankwright.cost_model.efficiency import device_class
from rankwright.cost_model.fullest import memory_class
from rankwright.cost_model.legality import shares_are_legal
from rankwright.cost_model.memory import rank_memory
from rankwright.cost_model.prediction import MemoryPart
from rankwright.cost_model.shards import Shares, column_range, head_ranges, range_size
from rankwright.planner.plan import Plan, RankPlan
from rankwright.topology.cluster import Gpu


def shares_of(plan: Plan, rank: RankPlan) -> Shares | None:
    """Return the shares of the TP group of `rank`; None where they are the equal ones."""
    split, model = plan.split, plan.model
    if split.tp == 1 or shares_are_legal(
        model, ep=split.ep, cp=split.cp, attention=split.attention
    ):
        return None
    first = rank.rank - rank.tp_rank
    group = plan.ranks[first : first + split.tp]
    layer = model.layer_runs[0].layer
    width = layer.feed_forward.intermediate_size
    if all(
        one.query_heads == head_ranges(layer.attention, split.tp, one.tp_rank)[0]
        and one.ffn_columns == column_range(width, split.tp, one.tp_rank)
        and one.vocab == column_range(model.vocab_size, split.tp, one.tp_rank)
        for one in group
    ):
        return None
    return Shares(
        tuple(range_size(one.query_heads) for one in group),
        tuple(range_size(one.ffn_columns) for one in group),
        tuple(range_size(one.vocab) for one in group),
    )


def has_unequal_shares(plan: Plan) -> bool:
    """Return whether ranks of any TP group hold unequal parts of the model."""
    heads = (rank for rank in plan.ranks if rank.tp_rank == 0)
    return any(shares_of(plan, rank) is not None for rank in heads)


def gpu_of(plan: Plan, rank: RankPlan) -> Gpu:
    """Return the GPU that `rank` is on."""
    node = plan.cluster.node(rank.node)
    return next(gpu for gpu in node.gpus if gpu.index == rank.gpu)


def memory_of(plan: Plan, rank: RankPlan) -> tuple[MemoryPart, ...]:
    """Return what `rank` takes, by what it is for."""
    gpu = gpu_of(plan, rank)
    return rank_memory(
        plan.model,
        plan.split,
        stage=rank.stage,
        kv_tokens=plan.kv_cache.num_tokens,
        max_batched_tokens=plan.limits.max_batched_tokens,
        max_num_seqs=plan.limits.max_num_seqs,
        device=memory_class(gpu.device, device_class(gpu)),
        tp_rank=rank.tp_rank,
        shares=shares_of(plan, rank),
    )
