"""Makes a plan: search, choice, placement, and the certificate that goes with it."""

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

from rankwright.cost_model.held_weights import about_weights, held_by
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.workload import Workload
from rankwright.planner.bind import about_engine, bind_plan, placed
from rankwright.planner.binding import find_binding
from rankwright.planner.certify import certify
from rankwright.planner.ilp import Choice
from rankwright.planner.infeasible import NoFeasiblePlanError, explain_failure
from rankwright.planner.pareto import find_front
from rankwright.planner.placement import place_ranks
from rankwright.planner.plan import Plan
from rankwright.planner.runners_up import find_runners_up, split_of
from rankwright.planner.search import Search
from rankwright.planner.shapes import Pins
from rankwright.planner.solver import TIME_LIMIT_S
from rankwright.topology.cluster import Cluster

if TYPE_CHECKING:
    from rankwright.cost_model.trace import TraceRow

__all__ = ["NoFeasiblePlanError", "Pins", "make_plan"]

_USUAL_PERCENTILE = 50  # up to which the steady state's mean is what is asked for
_BFLOAT16_SINCE = (8, 0)  # Ampere
_MIN_RUNNERS_UP = 2  # a plan without a comparison explains nothing


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
    search, about_numbers = prepare(
        model,
        cluster,
        workload,
        memory_budget_bytes=memory_budget_bytes,
        pins=pins,
        top=top,
        allow_pipeline=allow_pipeline,
        engine=engine,
        time_limit_s=time_limit_s,
    )
    plan = plan_of_search(search, top=top, trace=trace, assumptions=(*assumptions, *about_numbers))
    return plan.model_copy(update={"pareto": find_front(search)}) if pareto else plan


def prepare(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    *,
    memory_budget_bytes: int | None,
    pins: Pins | None,
    top: int,
    allow_pipeline: bool,
    engine: str,
    time_limit_s: float,
) -> tuple[Search, tuple[str, ...]]:
    """Return the search of a sound request, and what to know of numbers; as `make_plan`."""
    check_request(model, cluster, workload, memory_budget_bytes, top, time_limit_s)
    held = held_by(model, engine)
    search = Search(
        held,
        cluster,
        workload,
        memory_budget_bytes,
        pins or Pins(),
        allow_pipeline,
        engine,
        time_limit_s=time_limit_s,
        stored=None if held == model else model,
    )
    return search, (*about_weights(model, engine), *about_bfloat16(held, cluster))


def about_bfloat16(model: ModelSpec, cluster: Cluster) -> tuple[str, ...]:
    """Return a warning where a GPU is too old for the format of the activations."""
    if model.dtype != "bfloat16":
        return ()
    capabilities = {
        gpu.device: gpu.compute_capability for node in cluster.nodes for gpu in node.gpus
    }
    old = [name for name, one in capabilities.items() if one is not None and one < _BFLOAT16_SINCE]
    if not old:
        return ()
    return (f"{', '.join(old)} does not compute in bfloat16; plan with --dtype float16",)


def plan_of_search(
    search: Search,
    *,
    top: int,
    trace: Sequence["TraceRow"] = (),
    assumptions: tuple[str, ...] = (),
) -> Plan:
    """Return the best plan that `search` finds; see `make_plan`."""
    choice = search.best()
    if choice is None:
        raise explain_failure(search)
    if needs_simulation(search.workload, trace):
        from rankwright.planner.settle import settle  # the simulation: most plans do without

        settled = settle(search, choice, trace)
        choice, assumptions = settled.choice, (*assumptions, settled.note)
    return _bind(search, choice, max(top, _MIN_RUNNERS_UP), assumptions)


def needs_simulation(workload: Workload, trace: Sequence["TraceRow"]) -> bool:
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
    groups = placed(choice)
    return bind_plan(
        search,
        choice,
        groups,
        place_ranks(search.model, split_of(choice), groups),
        certificate=certify(
            search.workload.objective,
            choice.value,
            choice.ending,
            num_candidates=len(search.candidates),
            num_illegal=len(search.illegal),
            binding_constraint=find_binding(search, choice),
            runners_up=find_runners_up(search, choice, top),
        ),
        assumptions=(*assumptions, *about_engine(search.engine)),
    )
