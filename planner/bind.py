"""Binds a choice to GPUs: cache, limits, prediction and settings of the plan."""

from collections.abc import Sequence
from math import ceil, floor

from rankwright.cost_model.predict import Replicas, predict_replicas
from rankwright.cost_model.prediction import Prediction
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.planner.balance import cache_tokens
from rankwright.planner.candidates import Evaluator
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
    candidate, split = choice.candidate, split_of(choice)
    workload = workload or search.workload
    cache = kv_cache_of(search.evaluator, split.cp, _cache_tokens(search, choice))
    return assemble_plan(
        search,
        cluster or search.cluster,
        workload,
        split,
        ranks,
        cache,
        batch_size=candidate.batch_size,
        chunk_tokens=candidate.chunk_tokens,
        prediction=predict_replicas(
            search.evaluator.models, workload, split, groups, cache.num_tokens
        ),
        certificate=certificate,
        assumptions=assumptions,
    )


def assemble_plan(
    search: Search,
    cluster: Cluster,
    workload: Workload,
    split: Split,
    ranks: tuple[RankPlan, ...],
    kv_cache: KvCachePlan,
    *,
    batch_size: int,
    chunk_tokens: int,
    prediction: Prediction,
    certificate: Certificate,
    assumptions: tuple[str, ...],
) -> Plan:
    """Return the plan with what follows from these: limits and settings.

    Args:
        search: Whose model is served.
        cluster: Whose GPUs the ranks name.
        workload: What is served.
        split: Of the ranks.
        ranks: All of them.
        kv_cache: Of each rank.
        batch_size: Sequences that run at once in a replica.
        chunk_tokens: Of one step at most.
        prediction: What it will do.
        certificate: The proof.
        assumptions: What was not said and assumed.
    """
    # Attention DP keeps a request on one rank, context parallelism spreads it.
    longest = min(search.model.max_context_tokens, kv_cache.num_tokens * split.cp)
    return Plan(
        num_gpus=split.num_gpus,
        model=search.model,
        workload=workload,
        cluster=cluster,
        cluster_fingerprint=cluster.fingerprint,
        split=split,
        ranks=ranks,
        kv_cache=kv_cache,
        limits=Limits(
            max_num_seqs=batch_size, max_batched_tokens=chunk_tokens, max_model_len=longest
        ),
        prediction=prediction,
        certificate=certificate,
        environment=find_environment(cluster, ranks),
        assumptions=assumptions,
    )


def kv_cache_of(evaluator: Evaluator, cp: int, tokens: float) -> KvCachePlan:
    """Return the cache of a rank with room for `tokens`, in whole blocks, one at least."""
    block_tokens = evaluator.block_tokens(cp)
    return KvCachePlan(block_tokens=block_tokens, num_blocks=max(1, floor(tokens / block_tokens)))


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


def _cache_tokens(search: Search, choice: Choice) -> float:
    """Return the tokens of cache of every rank: what is left on the rank with least room.

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
    return tokens
