"""Binds a choice to GPUs: cache, limits, prediction and settings of the plan."""

from collections.abc import Sequence
from math import ceil, floor

from rankwright.cost_model.predict import Replicas, predict_replicas
from rankwright.cost_model.workload import Workload
from rankwright.planner.balance import cache_tokens
from rankwright.planner.environment import find_environment
from rankwright.planner.ilp import Choice
from rankwright.planner.plan import Certificate, KvCachePlan, Limits, Plan, RankPlan
from rankwright.planner.runners_up import split_of
from rankwright.planner.search import Search
from rankwright.topology.cluster import Cluster

# What the cache of a CPU rank holds at least, if memory allows: a conversation, whatever lengths
# the plan was made for. More would take memory from everything else on the machine.
_CPU_CONTEXT_TOKENS = 8192


def bind_plan(
    search: Search,
    choice: Choice,
    groups: Sequence[Replicas],
    ranks: tuple[RankPlan, ...],
    *,
    certificate: Certificate,
    assumptions: tuple[str, ...],
    cluster: Cluster | None = None,
    workload: Workload | None = None,
) -> Plan:
    """Return the plan of `choice` with its ranks where `ranks` says.

    Args:
        search: That found the choice.
        choice: Shape, batch and number of replicas.
        groups: Kinds of slot of the replicas, and how many replicas are on each.
        ranks: All of them.
        certificate: The proof.
        assumptions: What was not said and assumed.
        cluster: Whose GPUs the ranks name; None: the search's.
        workload: What these replicas serve; None: the search's.
    """
    candidate, model = choice.candidate, search.model
    cluster, workload = cluster or search.cluster, workload or search.workload
    split = split_of(choice)
    num_blocks = _num_blocks(search, choice)
    block_tokens = search.evaluator.block_tokens(split.cp)
    kv_tokens = num_blocks * block_tokens
    # Attention DP keeps a request on one rank, context parallelism spreads it.
    longest = min(model.max_context_tokens, kv_tokens * split.cp)
    return Plan(
        num_gpus=split.num_gpus,
        model=model,
        workload=workload,
        cluster=cluster,
        cluster_fingerprint=cluster.fingerprint,
        split=split,
        ranks=ranks,
        kv_cache=KvCachePlan(block_tokens=block_tokens, num_blocks=num_blocks),
        limits=Limits(
            max_num_seqs=candidate.batch_size,
            max_batched_tokens=candidate.chunk_tokens,
            max_model_len=longest,
        ),
        prediction=predict_replicas(search.evaluator.models, workload, split, groups, kv_tokens),
        certificate=certificate,
        environment=find_environment(cluster, ranks),
        assumptions=assumptions,
    )


def about_engine(engine: str) -> tuple[str, ...]:
    """Return what a reader of the plan must know where another engine shall run it."""
    if engine == "rankwright":
        return ()
    return (
        f"engine: planned for {engine}, with its forms and its speed; render it for {engine}, "
        "`rankwright launch` may run it slower or not at all",
    )


def placed(choice: Choice) -> tuple[Replicas, ...]:
    """Return the placements that got replicas, with how many."""
    return tuple(
        Replicas(group.stages, count, group.spread)
        for group, count in zip(choice.candidate.pool.replicas, choice.counts, strict=True)
        if count
    )


def _num_blocks(search: Search, choice: Choice) -> int:
    """Return the KV blocks of every rank: what is left on the rank with least room.

    A CPU rank takes what its requests need and a conversation besides, not all of the machine.
    """
    candidate, evaluator = choice.candidate, search.evaluator
    costs = evaluator.stage_costs(
        candidate.shape,
        candidate.pool,
        candidate.batch_size,
        candidate.chunk_tokens,
        candidate.serving[0].flow.mixed,
    )
    layer_bytes = evaluator.memory.layer_bytes(candidate.shape)
    tokens = cache_tokens(costs, candidate.stage_layers, *layer_bytes)
    if evaluator.is_cpu:
        wanted = evaluator.kv_tokens(candidate.shape, candidate.batch_size)
        usual = min(_CPU_CONTEXT_TOKENS, search.model.max_context_tokens)
        tokens = min(tokens, max(wanted, ceil(usual / candidate.shape.cp)))
    return max(1, floor(tokens / evaluator.block_tokens(candidate.shape.cp)))
