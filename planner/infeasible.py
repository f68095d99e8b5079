"""Says why no plan fits, and the nearest change with which one does.

A change is only suggested after a search with it has found a plan.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, floor, log10
from operator import attrgetter

from rankwright.planner.candidate import Candidate
from rankwright.planner.figures import figure
from rankwright.planner.search import Search
from rankwright.planner.shapes import Pins
from rankwright.topology.cluster import Cluster, Fabric
from rankwright.topology.shorthand import FABRIC_LATENCY_S, parse_cluster

_NUM_SUGGESTIONS = 2
# Searches for another suggestion once one is found: each is a whole plan's work.
_MORE_TRIES = 3


class NoFeasiblePlanError(Exception):
    """No plan keeps every limit.

    Attributes:
        constraint: What stands in the way, with numbers.
        change: The nearest change that was found to help; empty if none was.
    """

    def __init__(self, message: str, constraint: str, change: str) -> None:
        """Store the message and its two halves."""
        super().__init__(message)
        self.constraint = constraint
        self.change = change


def explain_failure(search: Search) -> NoFeasiblePlanError:
    """Return the error for a search that found nothing."""
    constraint = _constraint(search)
    changes: list[str] = []
    more_tries = _MORE_TRIES
    for text, changed in _changes(search):
        if changed.best(settle=False) is not None:
            changes.append(text)
            if changed.cluster is not search.cluster:  # still more GPUs are no news
                break
        if changes:
            more_tries -= 1
        if len(changes) == _NUM_SUGGESTIONS or more_tries == 0:
            break
    change = ", or ".join(changes)
    advice = (
        f"nearest change that fits: {change}"
        if change
        else "no single change of limits, weights or number of GPUs was found to fit"
    )
    where = f"{search.model.name} on {search.cluster.describe()}"
    return NoFeasiblePlanError(f"no plan fits {where}: {constraint}; {advice}", constraint, change)


def _constraint(search: Search) -> str:
    """Return what stands in the way of the candidate that comes closest."""
    if not search.candidates:
        pinned = search.pins.describe()
        reasons = "; ".join(f"{illegal.label}: {illegal.reason}" for illegal in search.illegal[:3])
        return f"no legal split{f' with {pinned} pinned' if pinned else ''} ({reasons})"
    fitting = [one for one in search.candidates if "memory" not in one.broken]
    if not fitting:
        return _memory(search)
    workload = search.workload
    if workload.request_rate is not None and all("rate" in one.broken for one in fitting):
        most = max(_capacity(one) for one in fitting)
        return (
            f"request rate: at most {figure(most, 3)} requests/s can be served, "
            f"{figure(workload.request_rate, 3)} arrive"
        )
    fitting = [one for one in fitting if "rate" not in one.broken]
    if workload.tpot_limit_s is not None and all("tpot" in one.broken for one in fitting):
        best = min(fitting, key=lambda one: one.tpot_s)
        return (
            f"TPOT limit of {figure(workload.tpot_limit_s * 1e3)} ms: the fastest split, "
            f"{best.label()}, takes {figure(best.tpot_s * 1e3)} ms a token"
        )
    if workload.ttft_limit_s is not None and all("ttft" in one.broken for one in fitting):
        best = min(fitting, key=lambda one: one.ttft_s)
        return (
            f"TTFT limit of {figure(workload.ttft_limit_s * 1e3)} ms: the fastest split, "
            f"{best.label()}, takes {figure(best.ttft_s * 1e3)} ms to the first token"
        )
    if workload.tpot_limit_s is not None and workload.ttft_limit_s is not None:
        return (
            f"TTFT limit of {figure(workload.ttft_limit_s * 1e3)} ms and TPOT limit of "
            f"{figure(workload.tpot_limit_s * 1e3)} ms: each can be kept, no split keeps both"
        )
    if workload.concurrency is not None and workload.objective == "latency":
        return f"concurrency of {workload.concurrency}: the caches do not hold so many requests"
    return f"pinned {search.pins.describe()}: no room for so many replicas"


def _memory(search: Search) -> str:
    best = min(search.candidates, key=lambda one: one.memory_bytes / one.budget_bytes)
    weights, _ = search.evaluator.memory.layer_bytes(best.shape)
    in_layers = sum(weights) * best.shape.tp
    return (
        f"memory: {best.label()} is the smallest and needs {best.memory_bytes / 1e9:.1f} GB on a "
        f"GPU where {best.budget_bytes / 1e9:.1f} GB may be used "
        f"({in_layers / 1e9:.0f} GB of layer weights a replica)"
    )


def _capacity(candidate: Candidate) -> float:
    return sum(
        group.count * state.requests_per_s
        for group, state in zip(candidate.pool.replicas, candidate.serving, strict=True)
    )


def _changes(search: Search) -> Iterator[tuple[str, Search]]:
    """Yield changes from small to large, each with the search to verify it."""
    yield from _looser_limits(search)
    if not search.allow_pipeline:
        yield "allow pipeline parallelism", search.changed(allow_pipeline=True)
    if search.pins != Pins():
        free = replace(Pins(), cp=search.pins.cp)
        yield f"unpin {search.pins.describe()}", search.changed(pins=free)
    largest = max(gpu.memory_bytes for node in search.cluster.nodes for gpu in node.gpus)
    budget = search.memory_budget_bytes
    if budget is not None and budget < largest:
        needed = _needed_budget(search)
        if needed is not None and needed < largest:
            text = f"a memory budget of {ceil(needed / 1e9)} GB a GPU"
            yield text, search.changed(memory_budget_bytes=ceil(needed / 1e9) * 10**9)
        text = f"the whole {largest / 1e9:.0f} GB of each GPU as memory budget"
        yield text, search.changed(memory_budget_bytes=None)
    if search.stored is not None:
        kept = search.stored.weight_dtypes.feed_forward
        text = f"--engine vllm, which keeps the weights as stored ({kept})"
        yield text, search.changed(model=search.stored, stored=None, engine="vllm")
    weights = search.model.weight_dtypes
    if search.stored is None and weights.feed_forward in ("bfloat16", "float16", "float32"):
        smaller = weights.model_copy(update={"attention": "float8", "feed_forward": "float8"})
        model = search.model.model_copy(update={"weight_dtypes": smaller})
        if search.engine == "rankwright":  # widens what it loads
            text = "FP8 weights on an engine that computes with them (--engine vllm)"
            yield text, search.changed(model=model, engine="vllm")
        else:
            yield "FP8 weights", search.changed(model=model)
    for text, cluster in _larger_clusters(search.cluster):
        yield text, search.changed(cluster=cluster)


def _looser_limits(search: Search) -> Iterator[tuple[str, Search]]:
    workload = search.workload
    fitting = [one for one in search.candidates if "memory" not in one.broken]
    if workload.request_rate is not None and fitting:
        most = _round_down(0.95 * max(_capacity(one) for one in fitting))
        if most < workload.request_rate:
            slower = workload.model_copy(update={"request_rate": most})
            yield f"{figure(most)} requests/s", search.changed(workload=slower)
    fitting = [one for one in fitting if "rate" not in one.broken]
    for name, field, of, limit in (
        ("TPOT", "tpot_limit_s", attrgetter("tpot_s"), workload.tpot_limit_s),
        ("TTFT", "ttft_limit_s", attrgetter("ttft_s"), workload.ttft_limit_s),
    ):
        others = [one for one in fitting if set(one.broken) <= {name.lower()}]
        if limit is None or not others:
            continue
        needed_s = _round_up(min(of(one) for one in others) * 1e3) / 1e3
        if needed_s > limit:
            looser = workload.model_copy(update={field: needed_s})
            yield f"a {name} limit of {figure(needed_s * 1e3)} ms", search.changed(workload=looser)


def _needed_budget(search: Search) -> float | None:
    """Return the least bytes of a GPU with which some candidate fits, its other limits kept."""
    sizes = [one.memory_bytes for one in search.candidates if set(one.broken) <= {"memory"}]
    return min(sizes, default=None)


def _larger_clusters(cluster: Cluster) -> Iterator[tuple[str, Cluster]]:
    """Yield clusters of the same machines: more GPUs in one, then more machines."""
    node = cluster.nodes[0]
    if len(cluster.nodes) > 1 or len({gpu.device for gpu in node.gpus}) > 1:
        return
    size, device = len(node.gpus), node.gpus[0].device
    if cluster.num_nodes == 1:
        for count in range(size + 1, 9):
            try:
                larger = parse_cluster(f"{count}x{device}")
            except ValueError:  # no machine has so many, or the device is not in the table
                break
            yield f"{count} x {device}", larger
    fabric = cluster.fabric or Fabric(
        kind="infiniband",
        bytes_per_s=50e9,
        ports_per_node=size,
        latency_s=FABRIC_LATENCY_S["infiniband"],
    )
    joined = "" if cluster.fabric else f" joined by {size} x 400 Gb/s InfiniBand"
    for factor in (2, 3, 4, 8):
        count = cluster.num_nodes * factor
        nodes = (node.model_copy(update={"count": count}),)
        larger = cluster.model_copy(update={"nodes": nodes, "fabric": fabric})
        yield f"{count} x ({size} x {device}){joined}", larger


def _round_up(value: float) -> float:
    """Return `value` rounded up to two digits, and a little more than itself.

    >>> _round_up(4.813)
    4.9
    """
    step = 10.0 ** (floor(log10(value)) - 1)
    return round(ceil(value / step + 1e-9) * step, 12)


def _round_down(value: float) -> float:
    step = 10.0 ** (floor(log10(value)) - 1)
    return round(floor(value / step) * step, 12)
