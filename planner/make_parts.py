"""Plans replicas that need not be alike, where they serve more than the best of alike ones."""

from typing import TYPE_CHECKING

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.workload import Workload
from rankwright.planner.make_plan import needs_simulation, plan_of_search, prepare
from rankwright.planner.part_bound import most_tokens_per_s
from rankwright.planner.plan import Plan
from rankwright.planner.search import Search
from rankwright.planner.shapes import Pins
from rankwright.planner.solver import TIME_LIMIT_S, NoIncumbentError
from rankwright.topology.cluster import Cluster

if TYPE_CHECKING:
    from rankwright.planner.part_columns import Columns
    from rankwright.planner.part_program import PartsChoice
    from rankwright.planner.parts_plan import PartsPlan
    from rankwright.planner.twins import Twins

# What unlike replicas must serve more than alike ones to be worth several engines and a router that
# weighs. The bar for the cost model's own error of a step is 6 % in the mean: of a smaller lead
# nobody could say that it is one.
WORTHWHILE = 0.05
# Machines of more GPUs, or whose GPUs form more kinds of sets, are planned with alike replicas: a
# kind is priced like a small cluster. Beside the search for alike replicas, that for a mix took 0.7
# to 2.1 times as long on four GPUs of one kind and four of another (24 kinds), and for 70B on eight
# and eight (80 kinds) 2.3 times, 19 CPU-s of a busy machine.
MOST_GPUS = 10
MOST_KINDS = 100


def plan_parts(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    *,
    memory_budget_bytes: int | None = None,
    top: int = 1,
    allow_pipeline: bool = True,
    time_limit_s: float = TIME_LIMIT_S,
    assumptions: tuple[str, ...] = (),
) -> "Plan | PartsPlan":
    """Return the best plan, of unlike replicas where those serve over 5 % more.

    They are looked for on one machine of up to 10 GPUs, for throughput without a request rate and
    without limits at a percentile above the 50th. Of tokens per dollar or joule no mix beats the
    better of its replicas, and of the seconds of a request none the faster.

    Args:
        model: What to serve.
        cluster: The machines.
        workload: Lengths, load, limits and objective.
        memory_budget_bytes: Bytes of each GPU that the plan may use; None: what is free.
        top: How many other shapes of alike replicas to list.
        allow_pipeline: Whether a replica may have several stages.
        time_limit_s: Of each solve.
        assumptions: What the caller assumed, to be recorded in the plan.

    Raises:
        NoFeasiblePlanError: No split keeps memory and limits.
        NoIncumbentError: The solver had no plan when its time was over.
        ValueError: As `make_plan`.
    """
    search, about_numbers = prepare(
        model,
        cluster,
        workload,
        memory_budget_bytes=memory_budget_bytes,
        pins=None,
        top=top,
        allow_pipeline=allow_pipeline,
        engine="rankwright",
        time_limit_s=time_limit_s,
    )
    plan = plan_of_search(search, top=top, assumptions=(*assumptions, *about_numbers))
    return with_parts(search, plan)


def with_parts(search: Search, plan: Plan) -> "Plan | PartsPlan":
    """Return a plan of unlike replicas if it serves over 5 % more than `plan`, else `plan`.

    Args:
        search: That found `plan`.
        plan: The best one of alike replicas.
    """
    if not _may_be_mixed(search):
        return plan
    enough = plan.certificate.objective_value * (1 + WORTHWHILE)
    most = most_tokens_per_s(search)
    if most is not None and most <= enough:
        return plan
    # Loaded here: on most machines the bound shows that there is nothing to look for.
    from rankwright.planner.bind_parts import bind_parts
    from rankwright.planner.twins import Twins

    twins = Twins(search.cluster.nodes[0])
    if twins.num_kinds > MOST_KINDS:
        return plan
    found = best_parts(search, twins)
    if found is None or found[1].value <= enough or len(found[1].columns) < 2:
        return plan
    columns, choice = found
    return bind_parts(search, twins, columns, choice, plan)


def best_parts(search: Search, twins: "Twins") -> "tuple[Columns, PartsChoice] | None":
    """Return the best mix of replicas, and the columns it is of; None where none keeps the limits.

    None, too, where the solver's time was over first: the plan of alike replicas stands then.
    """
    from rankwright.planner.part_columns import find_columns
    from rankwright.planner.part_program import choose_parts

    columns = find_columns(search, twins)
    try:
        choice = choose_parts(
            columns.best, twins, search.workload, time_limit_s=search.time_limit_s
        )
    except NoIncumbentError:
        return None
    return None if choice is None else (columns, choice)


def _may_be_mixed(search: Search) -> bool:
    """Return whether replicas of `search` may be unlike; see `plan_parts`."""
    is_free = search.engine == "rankwright" and search.pins == Pins()
    return is_free and may_mix(search.workload, search.cluster)


def may_mix(load: Workload, cluster: Cluster) -> bool:
    """Return whether unlike replicas are looked for where nothing is pinned; see `plan_parts`."""
    return (
        load.objective == "throughput"
        and load.request_rate is None
        and not needs_simulation(load, ())
        and cluster.num_nodes == 1
        and 2 <= cluster.num_gpus <= MOST_GPUS
    )
