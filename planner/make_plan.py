"""Makes a plan: search, choice, placement, and the certificate that goes with it."""

from collections.abc import Sequence
from math import ceil, floor, inf
from typing import TYPE_CHECKING

from rankwright.cost_model.held_weights import held_by
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.predict import Replicas, predict_replicas
from rankwright.cost_model.workload import Workload
from rankwright.planner.balance import cache_tokens
from rankwright.planner.binding import find_binding
from rankwright.planner.environment import find_environment
from rankwright.planner.goals import GOALS
from rankwright.planner.ilp import Choice
from rankwright.planner.infeasible import NoFeasiblePlanError, explain_failure
from rankwright.planner.pareto import find_front
from rankwright.planner.placement import place_ranks
from rankwright.planner.plan import Certificate, KvCachePlan, Limits, Plan
from rankwright.planner.runners_up import find_runners_up, split_of
from rankwright.planner.search import Search
from rankwright.planner.shapes import Pins
from rankwright.planner.solver import TIME_LIMIT_S
from rankwright.topology.cluster import Cluster

if TYPE_CHECKING:
    from rankwright.cost_model.trace import TraceRow

__all__ = ["NoFeasiblePlanError", "Pins", "make_plan"]

_USUAL_PERCENTILE = 50  # up to which the steady state's mean is what is asked for
_MIN_RUNNERS_UP = 2  # a plan without a comparison explains nothing

# What the cache of a CPU rank holds at least, if memory allows: a conversation, whatever lengths
# the plan was made for. More would take memory from everything else on the machine.
_CPU_CONTEXT_TOKENS = 8192


def make_plan(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    *,
    memory_budget_bytes: int | None = None,
    pins: Pins | None = None,
    top: int = 1,
    allow_pipeline: bool = True,
    engine: str = "rankwright",
    pareto: bool = False,
    time_limit_s: float = TIME_LIMIT_S,
    trace: Sequence["TraceRow"] = (),
    assumptions: tuple[str, ...] = (),
) -> Plan:
    """Return the best plan to serve `workload` with `model` on `cluster`.

    Args:
        model: What to serve.
        cluster: The machines.
        workload: Lengths, load, limits and objective.
        memory_budget_bytes: Bytes of each GPU that the plan may use; None: what is free.
        pins: Degrees to keep.
        top: How many other shapes to list, each with the reason why it lost; two at least.
        allow_pipeline: Whether a replica may have several stages.
        engine: Whose efficiency constants to predict with.
        pareto: Whether to find the front of tokens/s of a GPU against tokens/s of a user too.
        time_limit_s: Of the solver; then the best plan until then is returned, and its certificate
            says `time limit` and how far from the bound it may be.
        trace: Requests as they came, with whose means `workload` was made: the plan is held to its
            limits by simulating them.
        assumptions: What the caller assumed, to be recorded in the plan.

    Raises:
        NoFeasiblePlanError: No split keeps memory and limits; the message names what binds and the
            nearest change that was verified to help.
        NoIncumbentError: The solver had no plan when its time was over.
        ValueError: The request exceeds the model's context, the budget the GPUs' memory, or a pin
            or a limit is out of range.
    """
    check_request(model, cluster, workload, memory_budget_bytes, top, time_limit_s)
    held = held_by(model, engine)
    if held != model:
        stored, wide = model.weight_dtypes, held.weight_dtypes.feed_forward
        assumptions = (
            *assumptions,
            f"weights: stored as {stored.feed_forward} ({stored.method}), and widened to {wide} as "
            "they load; other engines keep them as stored (--engine)",
        )
    search = Search(
        held,
        cluster,
        workload,
        memory_budget_bytes,
        pins or Pins(),
        allow_pipeline,
        engine,
        time_limit_s=time_limit_s,
    )
    choice = search.best()
    if choice is None:
        raise explain_failure(search)
    if _needs_simulation(workload, trace):
        from rankwright.planner.settle import settle  # the simulation: most plans do without

        settled = settle(search, choice, trace)
        choice, assumptions = settled.choice, (*assumptions, settled.note)
    plan = _bind(search, choice, max(top, _MIN_RUNNERS_UP), assumptions)
    return plan.model_copy(update={"pareto": find_front(search)}) if pareto else plan


def _needs_simulation(workload: Workload, trace: Sequence["TraceRow"]) -> bool:
    """Return whether steady states cannot decide: a trace, or a limit at a high percentile."""
    limited = workload.ttft_limit_s is not None or workload.tpot_limit_s is not None
    return bool(trace) or (limited and workload.percentile > _USUAL_PERCENTILE)


def check_request(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    budget: int | None,
    top: int,
    time_limit_s: float,
) -> None:
    """Raise ValueError for a request that no plan can be made for."""
    tokens = workload.input_tokens + workload.output_tokens
    if tokens > model.max_context_tokens:
        raise ValueError(
            f"a request of {workload.input_tokens} + {workload.output_tokens} tokens exceeds the "
            f"context of {model.name}, {model.max_context_tokens} tokens; use shorter lengths"
        )
    if budget is not None and budget <= 0:
        raise ValueError(f"memory budget of {budget} bytes: expected more than 0")
    most = max(gpu.total_memory_bytes for node in cluster.nodes for gpu in node.gpus)
    if budget is not None and budget > most:
        raise ValueError(
            f"memory budget of {budget / 1e9:.4g} GB a GPU: the largest GPU of "
            f"{cluster.describe()} has {most / 1e9:.4g} GB"
        )
    if top < 1:
        raise ValueError(f"top={top}: expected 1 or more")
    if not 0 < time_limit_s < inf:
        raise ValueError(f"time_limit_s={time_limit_s:g}: expected more than 0, and finite")


def _bind(search: Search, choice: Choice, top: int, assumptions: tuple[str, ...]) -> Plan:
    candidate, model, workload = choice.candidate, search.model, search.workload
    groups = _placed(choice)
    split = split_of(choice)
    num_blocks = _num_blocks(search, choice)
    block_tokens = search.evaluator.block_tokens(split.cp)
    kv_tokens = num_blocks * block_tokens
    # Attention DP keeps a request on one rank, context parallelism spreads it.
    longest = min(model.max_context_tokens, kv_tokens * split.cp)
    prediction = predict_replicas(search.evaluator.models, workload, split, groups, kv_tokens)
    ranks = place_ranks(model, split, groups)
    return Plan(
        num_gpus=split.num_gpus,
        model=model,
        workload=workload,
        cluster=search.cluster,
        cluster_fingerprint=search.cluster.fingerprint,
        split=split,
        ranks=ranks,
        kv_cache=KvCachePlan(block_tokens=block_tokens, num_blocks=num_blocks),
        limits=Limits(
            max_num_seqs=candidate.batch_size,
            max_batched_tokens=candidate.chunk_tokens,
            max_model_len=longest,
        ),
        prediction=prediction,
        certificate=_certificate(search, choice, top),
        environment=find_environment(search.cluster, ranks),
        assumptions=(*assumptions, *_about_engine(search.engine)),
    )


def _about_engine(engine: str) -> tuple[str, ...]:
    """Return what a reader of the plan must know where another engine shall run it."""
    if engine == "rankwright":
        return ()
    return (
        f"engine: planned for {engine}, with its forms and its speed; render it for {engine}, "
        "`rankwright launch` may run it slower or not at all",
    )


def _placed(choice: Choice) -> tuple[Replicas, ...]:
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


def _certificate(search: Search, choice: Choice, top: int) -> Certificate:
    goal, ending = GOALS[search.workload.objective], choice.ending
    return Certificate(
        objective=f"{goal.name} ({goal.unit})",
        objective_value=choice.value,
        bound=ending.bound,
        gap=ending.gap,
        solver=ending.solver,
        status=ending.status,
        solve_s=ending.seconds,
        num_candidates=len(search.candidates),
        num_illegal=len(search.illegal),
        binding_constraint=find_binding(search, choice),
        runners_up=find_runners_up(search, choice, top),
    )
