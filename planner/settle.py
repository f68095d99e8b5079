"""Holds the chosen plan to its limits by simulation, request by request.

The program knows steady states: means, and a guess of how waits spread. Where a limit holds at a
percentile, or the requests of a trace come in bursts, a run of the scheduler decides: the choice
stands if its simulated requests keep the limits, else the next best one is tried.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rankwright.cost_model.percentiles import Percentiles, simulate_pipeline, simulate_trace
from rankwright.cost_model.predict import Replicas
from rankwright.cost_model.simulate import Schedule
from rankwright.cost_model.trace import TraceRow
from rankwright.planner.ilp import Choice
from rankwright.planner.infeasible import NoFeasiblePlanError
from rankwright.planner.search import Search

# Choices that are simulated at most: each takes a few hundred steps' time of this process.
_MOST_CHOICES = 6
_REQUESTS = 400  # of a run without a trace: the 99th percentile is the fourth largest


@dataclass(frozen=True, slots=True)
class Settled:
    """A choice that keeps its limits in simulation, and what the simulation said."""

    choice: Choice
    note: str


def settle(search: Search, choice: Choice, trace: Sequence[TraceRow]) -> Settled:
    """Return `choice`, or the next best one, that keeps the limits when it is simulated.

    Raises:
        NoFeasiblePlanError: None of the best few does; names the one that comes closest.
    """
    nearest: tuple[float, Choice, Percentiles] | None = None
    barred: set[tuple[object, ...]] = set()
    tried: Choice | None = choice
    for _ in range(_MOST_CHOICES):
        if tried is None:
            break
        seen = _simulate(search, tried, trace)
        excess = _excess(search, seen)
        if excess <= 1:
            return Settled(tried, _note(search, tried, seen, trace))
        if nearest is None or excess < nearest[0]:
            nearest = excess, tried, seen
        barred.add(tried.candidate.identity)
        tried = search.best(barred=frozenset(barred))
    assert nearest is not None, "the first choice was simulated"
    raise _failure(search, *nearest[1:])


def _simulate(search: Search, choice: Choice, trace: Sequence[TraceRow]) -> Percentiles:
    """Return what the requests of one replica see, on the slowest placement that is used."""
    candidate, load = choice.candidate, search.workload
    used = [
        (state.request_s(load.output_tokens), index)
        for index, (state, count) in enumerate(zip(candidate.serving, choice.counts, strict=True))
        if count
    ]
    group = candidate.pool.replicas[max(used)[1]]
    pipeline = search.evaluator.pipeline(
        Replicas(group.stages, 1, group.spread), candidate.stage_layers, candidate.shape
    )
    schedule = Schedule(max_batch_size=candidate.batch_size, chunk_tokens=candidate.chunk_tokens)
    replicas = choice.num_replicas
    if trace:
        return simulate_trace(pipeline, trace[::replicas], schedule)
    alone: dict[str, float | None] = {"concurrency": None, "request_rate": None}
    if load.request_rate is not None:
        alone["request_rate"] = load.request_rate / replicas
    elif load.concurrency is not None:
        alone["concurrency"] = -(-load.concurrency // replicas)
    return simulate_pipeline(pipeline, load.model_copy(update=alone), schedule, requests=_REQUESTS)


def _excess(search: Search, seen: Percentiles) -> float:
    """Return the simulated figure that is largest relative to its limit."""
    load = search.workload
    shares = [0.0]
    if load.ttft_limit_s is not None:
        shares.append(seen.ttft_s(load.percentile) / load.ttft_limit_s)
    if load.tpot_limit_s is not None:
        shares.append(seen.tpot_s(load.percentile) / load.tpot_limit_s)
    return max(shares)


def _figures(search: Search, seen: Percentiles) -> str:
    percent = search.workload.percentile
    return (
        f"TTFT {seen.ttft_s(percent) * 1e3:,.4g} ms and TPOT {seen.tpot_s(percent) * 1e3:,.4g} ms "
        f"at the {percent:g}th percentile"
    )


def _note(search: Search, choice: Choice, seen: Percentiles, trace: Sequence[TraceRow]) -> str:
    source = f"of the trace's {len(trace)}" if trace else "drawn at random"
    return (
        f"simulated: {len(seen.outcomes)} requests of one replica, {source}, with "
        f"{choice.candidate.label()}: {_figures(search, seen)}"
    )


def _failure(search: Search, choice: Choice, seen: Percentiles) -> NoFeasiblePlanError:
    load = search.workload
    constraint = (
        f"limits at the {load.percentile:g}th percentile: simulated, {choice.candidate.label()} "
        f"comes closest with {_figures(search, seen)}"
    )
    changes: list[str] = []
    for name, figure, limit in (
        ("TTFT", seen.ttft_s(load.percentile), load.ttft_limit_s),
        ("TPOT", seen.tpot_s(load.percentile), load.tpot_limit_s),
    ):
        if limit is not None and figure > limit:
            changes.append(f"a {name} limit of {figure * 1.01 * 1e3:.4g} ms")
    change = " and ".join(changes)
    where = f"{search.model.name} on {search.cluster.describe()}"
    return NoFeasiblePlanError(
        f"no plan fits {where}: {constraint}; that one fits with {change}", constraint, change
    )
