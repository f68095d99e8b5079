"""The best plan without separate pools, beside the one with them."""

from rankwright.cost_model.workload import Workload
from rankwright.planner.disaggregated_plan import OnePool
from rankwright.planner.figures import figure
from rankwright.planner.goals import GOALS
from rankwright.planner.infeasible import NoFeasiblePlanError
from rankwright.planner.make_plan import make_plan
from rankwright.planner.matching import Match
from rankwright.planner.plan import Plan
from rankwright.planner.search import Search
from rankwright.planner.solver import NoIncumbentError

# Figures that differ by less are called equal: no model is so exact.
_EQUAL = 1e-3


def plan_one_pool(search: Search, assumptions: tuple[str, ...]) -> Plan | NoFeasiblePlanError:
    """Return the best plan without pools, or why there is none."""
    try:
        return make_plan(
            search.model,
            search.cluster,
            search.workload,
            memory_budget_bytes=search.memory_budget_bytes,
            allow_pipeline=search.allow_pipeline,
            engine=search.engine,
            time_limit_s=search.time_limit_s,
            assumptions=assumptions,
        )
    except (NoFeasiblePlanError, NoIncumbentError) as error:
        if isinstance(error, NoFeasiblePlanError):
            return error
        return NoFeasiblePlanError(str(error), str(error), "")


def compare(load: Workload, match: Match, one_pool: Plan | NoFeasiblePlanError) -> OnePool:
    """Return the comparison of `match` with the best plan of one pool."""
    if not isinstance(one_pool, Plan):
        return OnePool(is_better=False, verdict=f"one pool: {one_pool.constraint}")
    goal, certificate = GOALS[load.objective], one_pool.certificate
    theirs, mine = certificate.objective_value, abs(match.value)
    lower = load.objective == "latency"
    gain = (theirs / mine if lower else mine / theirs) - 1
    is_better = gain < -_EQUAL
    split = one_pool.split
    label = f"{split.dp} x {split.model_copy(update={'dp': 1}).label()}"
    figures = (
        f"{figure(mine)} {goal.unit} on {match.num_gpus} GPUs against {figure(theirs)} on "
        f"{one_pool.num_gpus} of {label} at batch {one_pool.limits.max_num_seqs}"
    )
    if abs(gain) <= _EQUAL:
        verdict = f"separate pools are as good as one: {figures}"
    elif is_better:
        verdict = f"ONE POOL IS BETTER, separate pools lose {_share(gain)}: {figures}"
    else:
        verdict = f"separate pools are {_share(gain)} better than one: {figures}"
    prediction = one_pool.prediction
    return OnePool(
        label=label,
        num_gpus=one_pool.num_gpus,
        batch_size=one_pool.limits.max_num_seqs,
        objective_value=theirs,
        ttft_s=prediction.ttft_s.value,
        tpot_s=prediction.tpot_s.value,
        output_tokens_per_s=prediction.output_tokens_per_s.value,
        is_better=is_better,
        verdict=verdict,
    )


def _share(gain: float) -> str:
    return f"{abs(gain):.1%}" if abs(gain) < 1 else f"{1 + gain:.3g} times"
