"""Names the constraint that keeps a plan from being better, by what would be better without it."""

from rankwright.cost_model.workload import Workload
from rankwright.planner.candidate import Candidate
from rankwright.planner.candidates import MAX_BATCH_CPU, most_sequences
from rankwright.planner.figures import figure
from rankwright.planner.goals import GOALS, ratio_of
from rankwright.planner.ilp import Choice
from rankwright.planner.search import Search

# What is better by less than this is no reason to relax anything.
WORTHWHILE = 0.01


def find_binding(search: Search, choice: Choice) -> str:
    """Return the binding constraint with the evidence, in one line.

    Looks for the candidate that is better than the choice and breaks one constraint only, by the
    least; then asks what twice the concurrency would do; what is left are the GPUs themselves.
    """
    workload = search.workload
    better: list[tuple[float, Candidate]] = []
    for candidate in search.candidates:
        if len(candidate.broken) == 1 and candidate.broken[0] != "rate":
            gain = _gain(candidate, choice, workload)
            if gain > WORTHWHILE:
                better.append((_excess(candidate, workload), candidate))
    if better:
        _, nearest = min(better, key=lambda item: item[0])
        return _evidence(nearest, choice, workload)
    return _concurrency(search, choice) or _gpus(search, choice)


def alone_value(candidate: Candidate, workload: Workload) -> float:
    """Return the objective of `candidate` with as many replicas as there is room for."""
    if workload.objective == "latency":
        return candidate.request_s(workload.output_tokens)
    if workload.objective in ("cost", "energy"):
        return ratio_of(candidate, 0, workload)
    groups, states = candidate.pool.replicas, candidate.serving
    left = candidate.replicas or candidate.max_replicas
    requests = 0.0
    for group, state in zip(groups, states, strict=True):
        count = min(left, group.count)
        requests += count * state.requests_per_s
        left -= count
    if workload.concurrency is not None:
        fastest = max(state.requests_per_s for state in states)
        requests = min(requests, workload.concurrency / candidate.batch_size * fastest)
    return requests * workload.output_tokens


def _gain(candidate: Candidate, choice: Choice, workload: Workload) -> float:
    """Return by how much `candidate` beats the choice, relative to it."""
    value = alone_value(candidate, workload)
    if workload.objective == "latency":
        return choice.value / value - 1
    return value / choice.value - 1


def _excess(candidate: Candidate, workload: Workload) -> float:
    """Return by how much `candidate` breaks its constraint, relative to the limit."""
    constraint = candidate.broken[0]
    if constraint == "memory":
        return candidate.memory_bytes / candidate.budget_bytes - 1
    if constraint == "ttft":
        assert workload.ttft_limit_s is not None
        return candidate.ttft_s / workload.ttft_limit_s - 1
    assert workload.tpot_limit_s is not None
    return candidate.tpot_s / workload.tpot_limit_s - 1


def _evidence(candidate: Candidate, choice: Choice, workload: Workload) -> str:
    goal = GOALS[workload.objective]
    value = alone_value(candidate, workload)
    would = (
        f"{candidate.label()} would give {figure(value)} {goal.unit} instead of "
        f"{figure(choice.value)}"
    )
    constraint = candidate.broken[0]
    if constraint == "memory":
        return (
            f"GPU memory: {would}, but needs {candidate.memory_bytes / 1e9:.1f} GB on a GPU where "
            f"{candidate.budget_bytes / 1e9:.1f} GB may be used"
        )
    if constraint == "ttft":
        assert workload.ttft_limit_s is not None
        return (
            f"TTFT limit of {figure(workload.ttft_limit_s * 1e3)} ms: {would}, but takes "
            f"{figure(candidate.ttft_s * 1e3)} ms to the first token"
        )
    assert workload.tpot_limit_s is not None
    return (
        f"TPOT limit of {figure(workload.tpot_limit_s * 1e3)} ms: {would}, but takes "
        f"{figure(candidate.tpot_s * 1e3)} ms a token"
    )


def _concurrency(search: Search, choice: Choice) -> str | None:
    """Return the evidence that twice the requests in flight would be better, if so."""
    workload = search.workload
    if workload.concurrency is None or workload.objective == "latency":
        return None
    doubled = workload.model_copy(update={"concurrency": 2 * workload.concurrency})
    evaluator = search.changed(workload=doubled).evaluator
    shape = choice.candidate.shape
    values = [
        (alone_value(candidate, doubled), candidate)
        for candidate in evaluator.candidates(shape)
        if not candidate.broken
    ]
    if not values:
        return None
    value, _ = max(values, key=lambda item: item[0])
    if value / choice.value - 1 <= WORTHWHILE:
        return None
    unit = GOALS[workload.objective].unit
    return (
        f"concurrency of {workload.concurrency}: with {2 * workload.concurrency} requests in "
        f"flight {shape.label()} would give {figure(value)} {unit} instead of "
        f"{figure(choice.value)}"
    )


def _gpus(search: Search, choice: Choice) -> str:
    """Return what is left: the GPUs, the batch limit, or nothing."""
    total, used = search.cluster.num_gpus, choice.num_gpus
    unit = GOALS[search.workload.objective].unit
    if search.workload.objective != "throughput":
        name = GOALS[search.workload.objective].name
        return f"number of GPUs: no legal split of {total} is better in {name}"
    each = choice.value / choice.num_replicas
    room = f"{used} of {total} GPUs are used"
    if used == total:
        room = "the only GPU is used" if total == 1 else f"all {total} GPUs are used"
    is_cpu = search.evaluator.is_cpu
    most = MAX_BATCH_CPU if is_cpu else most_sequences(choice.candidate.shape)
    if choice.candidate.batch_size >= most:
        return f"batch limit of {most} sequences a replica; {room}"
    more = choice.candidate.shape.num_gpus
    return (
        f"number of GPUs: {room}; another replica, on {more} more, would add {figure(each)} {unit}"
    )
