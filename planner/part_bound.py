"""About what a machine of one kind of GPU can serve at most, however it is cut.

Most machines are such, and their best plan of alike replicas is mostly within a few percent of
this, so that no mix has to be looked for.
"""

from rankwright.planner.search import Search
from rankwright.planner.twins import gpu_facts

_STEPS = 40  # of a search over a convex function: to 1e-8 of where it began


def most_tokens_per_s(search: Search) -> float | None:
    """Return about the most output tokens/s of any mix of replicas; None where the GPUs differ.

    Each GPU is taken to do as well as in the best replica that the search knows. Without a
    concurrency no mix exceeds that where all GPUs are joined alike; where they are not, sets that
    the search did not look at are taken to be no better joined than those it prefers. With one, the
    search knows fewer batches than the program over parts, which may serve some 0.5 % more.

    With `c` requests in flight, replicas of `g` GPUs with `b` requests at a rate of `r` serve at
    most `c * y + n * max((r - b * y) / g)` on `n` GPUs, for any price `y >= 0` of a request: the
    dual of the program with both rows.
    """
    (node,) = search.cluster.nodes
    if len({gpu_facts(gpu) for gpu in node.gpus}) > 1:
        return None
    replicas = _fronts(search)
    if not replicas:
        return None
    num_gpus, in_flight = len(node.gpus), search.workload.concurrency

    def bound(price: float) -> float:
        best = max((rate - batch * price) / gpus for gpus, batch, rate in replicas)
        return num_gpus * max(0.0, best) + price * (in_flight or 0)

    low = 0.0
    if in_flight is not None:
        high = max(rate / batch for _, batch, rate in replicas)
        for _ in range(_STEPS):
            third = (high - low) / 3
            if bound(low + third) <= bound(high - third):
                high -= third
            else:
                low += third
    return bound(low) * search.workload.output_tokens


def _fronts(search: Search) -> list[tuple[int, int, float]]:
    """Return GPUs, batch and requests/s of replicas that keep every limit, the fastest of each."""
    best: dict[tuple[int, int], float] = {}
    for candidate in search.candidates:
        if not candidate.broken:
            key = candidate.shape.num_gpus, candidate.batch_size
            fastest = max(state.requests_per_s for state in candidate.serving)
            best[key] = max(best.get(key, 0.0), fastest)
    return [(*key, rate) for key, rate in best.items()]
