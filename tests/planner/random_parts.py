"""Small machines of unlike cards at random, and the best mix of replicas on them by trying all."""

from dataclasses import replace
from functools import cache
from itertools import combinations
from random import Random

from tests.planner.exhaustive import whole_replicas
from tests.planner.random_cases import Case, random_case

from rankwright.planner.part_columns import MOST_SHARING
from rankwright.planner.twins import part_of
from rankwright.topology.cluster import Cluster, Link
from rankwright.topology.shorthand import parse_cluster

_MACHINES = (
    *("2xl4", "3xl40s", "4xa100-pcie", "1xl40s+1xl4", "2xl40s+1xl4", "2xrtx4090+2xrtx3090"),
    *("3xl4+1xa100-pcie", "2xa100-pcie+1xl40s+1xl4", "1xa100-pcie+2xl4", "4xl40s"),
)
_LINKS = (
    Link(a=0, b=1, kind="NV4", bytes_per_s=1e11, latency_s=1e-6),
    Link(a=0, b=1, kind="PIX", bytes_per_s=2.6e10, latency_s=1.5e-6),
    Link(a=0, b=1, kind="SYS", bytes_per_s=1.6e10, latency_s=2e-6),
)


def random_parts_case(seed: int) -> Case:
    """Return the problem of number `seed`: up to 4 GPUs of one machine, joined at random."""
    rng = Random(seed)
    case = random_case(rng.randrange(10**6))
    cluster = parse_cluster(rng.choice(_MACHINES))
    (node,) = cluster.nodes
    links = tuple(
        rng.choice(_LINKS).model_copy(update={"a": a.index, "b": b.index})
        for a, b in combinations(node.gpus, 2)
    )
    if rng.random() < 0.6:
        cluster = Cluster(nodes=(node.model_copy(update={"links": links}),))
    runs = case.model.layer_runs
    model = case.model.model_copy(
        update={"layer_runs": tuple(run.model_copy(update={"count": 1}) for run in runs)}
        if rng.random() < 0.3
        else {}
    )
    load = case.workload.model_copy(update={"objective": "throughput"})
    return replace(case, model=model, cluster=cluster, workload=load)


def best_mix(case: Case) -> float:
    """Return the tokens/s of the best replicas on disjoint sets of GPUs; 0 where none keeps limits.

    Every way to deal out the GPUs is tried, those that leave some idle included; no two sets are
    taken to be alike.
    """
    (node,) = case.cluster.nodes
    gpus = tuple(gpu.index for gpu in node.gpus)
    rates: dict[tuple[int, ...], dict[int, float]] = {}
    for size in range(1, len(gpus) + 1):
        for chosen in combinations(gpus, size):
            part = part_of(case.cluster, chosen)
            alone = replace(case, cluster=part, num_sharing=MOST_SHARING)
            best: dict[int, float] = {}
            for batch, state in whole_replicas(alone):
                best[batch] = max(best.get(batch, 0.0), state.requests_per_s)
            rates[chosen] = best

    @cache
    def most(free: tuple[int, ...], in_flight: int | None) -> float:
        if not free:
            return 0.0
        first, *others = free
        values = [most(tuple(others), in_flight)]  # the first one is idle
        for size in range(len(free)):
            for more in combinations(others, size):
                left = tuple(gpu for gpu in others if gpu not in more)
                for batch, rate in rates[(first, *more)].items():
                    if in_flight is None:
                        values.append(rate + most(left, None))
                    elif batch <= in_flight:
                        values.append(rate + most(left, in_flight - batch))
        return max(values)

    return most(gpus, case.workload.concurrency) * case.workload.output_tokens
