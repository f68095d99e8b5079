"""Plans separate pools for prefill and decode: search, choice, placement, and comparison."""

from collections.abc import Iterator

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.pool_forms import POOL_FORMS
from rankwright.cost_model.pools import MOST_LOAD
from rankwright.cost_model.workload import Workload
from rankwright.planner.bind_pools import pool_plans, predict_match
from rankwright.planner.certify import certify
from rankwright.planner.disaggregated_plan import DisaggregatedPlan, LosingPair, PoolsPrediction
from rankwright.planner.figures import figure
from rankwright.planner.goals import GOALS
from rankwright.planner.infeasible import NoFeasiblePlanError
from rankwright.planner.make_plan import about_bfloat16, check_request
from rankwright.planner.matching import Match
from rankwright.planner.one_pool import compare, plan_one_pool
from rankwright.planner.plan import Certificate, Plan
from rankwright.planner.pool_failure import explain_pool_failure
from rankwright.planner.pool_search import Found, PoolSearch
from rankwright.planner.search import Search
from rankwright.planner.solver import TIME_LIMIT_S, Ending, NoIncumbentError
from rankwright.topology.cluster import Cluster

DEFAULT_ENGINE = "vllm"  # the executor of ours does not run pools
_SOLVER = "branch and bound over pairs of workers"


def plan_disaggregated(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    *,
    memory_budget_bytes: int | None = None,
    allow_pipeline: bool = True,
    engine: str = DEFAULT_ENGINE,
    top: int = 2,
    time_limit_s: float = TIME_LIMIT_S,
    assumptions: tuple[str, ...] = (),
) -> DisaggregatedPlan:
    """Return the best plan with separate pools for prefill and decode.

    Args:
        model: What to serve.
        cluster: The machines.
        workload: Lengths, load, limits and objective.
        memory_budget_bytes: Bytes of each GPU that the plan may use; None: what is free.
        allow_pipeline: Whether a worker may have several stages.
        engine: That shall run it: one of those that `docs/disaggregate.md` names.
        top: How many other pairs of shapes to list, each with the reason why it lost.
        time_limit_s: Of the search; then the best pair until then is returned, so marked.
        assumptions: What the caller assumed, to be recorded in the plan.

    Raises:
        NoFeasiblePlanError: No pair of workers keeps memory and limits.
        NoIncumbentError: Nothing was found when the time was over.
        ValueError: The engine does not run pools, or as `make_plan`.
    """
    if engine not in POOL_FORMS:
        raise ValueError(
            f"engine {engine!r} does not run separate pools for prefill and decode; expected one "
            f"of {', '.join(POOL_FORMS)}"
        )
    check_request(model, cluster, workload, memory_budget_bytes, max(1, top), time_limit_s)
    search = Search(
        model,
        cluster,
        workload,
        memory_budget_bytes,
        allow_pipeline=allow_pipeline,
        engine=engine,
        time_limit_s=time_limit_s,
    )
    stages = allow_pipeline and POOL_FORMS[engine].stages != "none"
    pools = PoolSearch(search.changed(allow_pipeline=stages), time_limit_s)
    found = pools.best()
    one_pool = plan_one_pool(search, assumptions)
    if found.match is None:
        if not found.is_proved:
            raise NoIncumbentError(
                f"no pair of workers was found in {time_limit_s:g} s; give more time (--time-limit)"
            )
        raise explain_pool_failure(pools, one_pool)
    notes = (
        *assumptions,
        *about_bfloat16(model, cluster),
        f"engine: planned for {engine}, with its forms and its speed; render it for {engine}",
        "waits for a prefill worker are those of a queue with random arrivals, not simulated",
    )
    return _bind(pools, found, found.match, one_pool, max(0, top), notes)


def _bind(
    pools: PoolSearch,
    found: Found,
    match: Match,
    one_pool: Plan | NoFeasiblePlanError,
    top: int,
    assumptions: tuple[str, ...],
) -> DisaggregatedPlan:
    prediction = predict_match(pools, match)
    certificate = _certificate(pools, found, match, prediction)
    prefill, decode = pool_plans(pools, match, prediction, certificate)
    return DisaggregatedPlan(
        num_gpus=match.num_gpus,
        engine=pools.search.engine,
        prefill=prefill,
        decode=decode,
        prediction=prediction,
        certificate=certificate,
        runners_up=tuple(_losers(pools, match, top)),
        one_pool=compare(pools.workload, match, one_pool),
        assumptions=assumptions,
    )


def _certificate(
    pools: PoolSearch, found: Found, match: Match, prediction: PoolsPrediction
) -> Certificate:
    status = "optimal" if found.is_proved else "time limit"
    value = abs(match.value)
    return certify(
        pools.workload.objective,
        value,
        Ending(status, value, abs(found.bound), _SOLVER, found.seconds),
        num_candidates=len(pools.pairs),
        num_illegal=len(pools.search.illegal),
        binding_constraint=_binding(pools.workload, match, prediction),
    )


def _binding(load: Workload, match: Match, prediction: PoolsPrediction) -> str:
    """Return what keeps more from being served, in numbers."""
    first = f"prefill is busy {prediction.prefill_load:.0%} of the time"
    second = f"decode has {prediction.decode_load:.0%} of its places taken"
    if load.request_rate is not None and match.served >= load.request_rate * (1 - 1e-6):
        return f"request rate of {figure(load.request_rate)}/s, which is served: {first}, {second}"
    if prediction.decode_load >= 1 - 1e-6:
        return f"decode pool: all its places are taken, {first}"
    if prediction.prefill_load >= MOST_LOAD * (1 - 1e-6):
        return f"prefill pool: {first}, the most that is planned for, and {second}"
    if load.ttft_limit_s is not None and load.concurrency is None:
        return (
            f"TTFT limit of {figure(load.ttft_limit_s * 1e3)} ms: prompts must not wait longer; "
            f"{first}, {second}"
        )
    if load.objective == "latency":
        return f"seconds of one request: no other cut is faster; {first}, {second}"
    return f"requests in flight: {first}, {second}"


def _losers(pools: PoolSearch, match: Match, count: int) -> Iterator[LosingPair]:
    """Yield the best pairs of other shapes."""
    goal = GOALS[pools.workload.objective]
    seen = {match.shapes}
    for _ in range(count):
        other = pools.best(frozenset(seen)).match
        if other is None:
            return
        seen.add(other.shapes)
        value, best = abs(other.value), abs(match.value)
        worse = abs(value - best) / max(best, 1e-12)
        figures = f"{figure(value)} against {figure(best)} {goal.unit}"
        reason = f"{worse:.1%} worse ({figures})" if worse >= 1e-3 else f"as good ({figures})"
        if other.num_gpus != match.num_gpus:
            reason += f", on {other.num_gpus} GPUs instead of {match.num_gpus}"
        yield LosingPair(label=other.label(), objective_value=value, reason=reason)
