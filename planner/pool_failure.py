"""Says why no pair of workers keeps the limits, and whether one pool would."""

from rankwright.planner.figures import figure
from rankwright.planner.infeasible import NoFeasiblePlanError
from rankwright.planner.plan import Plan
from rankwright.planner.pool_search import PoolSearch
from rankwright.planner.workers import Workers


def explain_pool_failure(
    pools: PoolSearch, one_pool: Plan | NoFeasiblePlanError
) -> NoFeasiblePlanError:
    """Return the error for a search of pools that found nothing."""
    constraint, change = _constraint(pools)
    if isinstance(one_pool, Plan):
        alone = f"one pool fits: {one_pool.split.label()} (without --disaggregate)"
        change = f"{change}; {alone}" if change else alone
    search = pools.search
    where = f"{search.model.name} on {search.cluster.describe()}"
    advice = change or "no plan with one pool fits either"
    return NoFeasiblePlanError(
        f"no plan with separate prefill and decode pools fits {where}: {constraint}; {advice}",
        constraint,
        change,
    )


def _constraint(pools: PoolSearch) -> tuple[str, str]:
    """Return what stands in the way, and the change that would help where one is known."""
    search, load = pools.search, pools.workload
    if not search.shapes.legal:
        reasons = "; ".join(f"{one.label}: {one.reason}" for one in search.illegal[:3])
        return f"no legal split ({reasons})", ""
    for workers, found in (
        (pools.prefill, pools.prefill_workers),
        (pools.decode, pools.decode_workers),
    ):
        if found:
            continue
        slow = workers.find(None)
        if not slow:
            return _memory(workers), ""
        best = min(slow, key=lambda worker: worker.latency_s)
        assert load.tpot_limit_s is not None, "only a limit leaves out workers that fit in memory"
        return (
            f"TPOT limit of {figure(load.tpot_limit_s * 1e3)} ms: the fastest decode worker, "
            f"{best.label()}, takes {figure(best.latency_s * 1e3)} ms a token",
            f"a TPOT limit of {figure(best.latency_s * 1.01e3)} ms",
        )
    smallest = [
        min(worker.num_gpus for worker in found)
        for found in (pools.prefill_workers, pools.decode_workers)
    ]
    if sum(smallest) > search.cluster.num_gpus:
        return (
            f"number of GPUs: the smallest prefill worker takes {smallest[0]} and the smallest "
            f"decode worker {smallest[1]}, the cluster has {search.cluster.num_gpus}",
            f"{sum(smallest)} GPUs",
        )
    if load.ttft_limit_s is not None and not pools.pairs:
        least_s = min(
            prefill.latency_s + pools.matcher.transfer_s(prefill, decode)
            for prefill in pools.prefill_workers
            for decode in pools.decode_workers
        )
        if least_s > load.ttft_limit_s:
            return (
                f"TTFT limit of {figure(load.ttft_limit_s * 1e3)} ms: the fastest prompt with its "
                f"cache's way takes {figure(least_s * 1e3)} ms",
                "",
            )
    if load.request_rate is not None:
        return (
            f"request rate of {figure(load.request_rate)}/s: no numbers of workers on "
            f"{search.cluster.num_gpus} GPUs keep up with it within the limits",
            "",
        )
    if load.concurrency is not None and load.objective == "latency":
        return f"concurrency of {load.concurrency}: no decode pool has room for so many", ""
    return (
        "no prefill worker and decode worker fit the machines together within the limits",
        "",
    )


def _memory(workers: Workers) -> str:
    if workers.tightest is None:
        return (
            f"no {workers.role} worker stands within one machine or on whole machines; see the "
            "widths of its machines"
        )
    shape, wanted, budget = workers.tightest
    return (
        f"memory: {shape.label()} is the smallest {workers.role} worker and needs about "
        f"{wanted / 1e9:.1f} GB on a GPU where {budget / 1e9:.1f} GB may be used"
    )
