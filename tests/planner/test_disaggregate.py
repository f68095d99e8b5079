"""Plans with separate pools: equal to trying everything, on disjoint GPUs, and compared fairly."""

from collections.abc import Iterator
from itertools import product
from math import log
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.cost_model.pool_forms import pair_is_legal
from rankwright.cost_model.pools import MOST_LOAD, queue_wait_s
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.workload import Objective, Workload
from rankwright.planner.config import AutoParallelConfig
from rankwright.planner.disaggregate import plan_disaggregated
from rankwright.planner.disaggregated_plan import DisaggregatedPlan
from rankwright.planner.divide import Home, Machines
from rankwright.planner.goals import burn_per_s
from rankwright.planner.infeasible import NoFeasiblePlanError
from rankwright.planner.pool_search import PoolSearch
from rankwright.planner.read_plan import read_any_plan, read_plan, write_plan
from rankwright.planner.search import Search
from rankwright.planner.workers import Worker
from rankwright.topology.cluster import Cluster
from rankwright.topology.shorthand import parse_cluster

LLAMA = read_model("meta-llama/Llama-3.1-8B")
# Machines whose GPUs are all alike to each other, so that only numbers of GPUs count.
CLUSTERS = ("2xh100-sxm", "4xh100-sxm", "3xh200-sxm", "2x2xh100-sxm+ib400", "3x2xh200-sxm+ib200")
MIXED = "1x4xh100-sxm+1x2xa100-sxm-80gb+ib200"


def rooms(cluster: Cluster, prefill: Home, decode: Home) -> Iterator[tuple[int, int]]:
    """Workers of both pools that fit, for every way to deal out the GPUs of every machine."""
    mine = {node for run in prefill.kind.nodes for node in run}
    theirs = {node for run in decode.kind.nodes for node in run}
    ways: list[list[tuple[int, int, int]]] = []
    for node in range(cluster.num_nodes):
        size = len(cluster.node(node).gpus)
        ways.append(
            [
                (first, second, size)
                for first in range(size + 1 if node in mine else 1)
                for second in range(size - first + 1 if node in theirs else 1)
            ]
        )
    for dealt in product(*ways):
        counts = []
        for home, position in ((prefill, 0), (decode, 1)):
            if home.machines:
                whole = sum(one[position] == one[2] for one in dealt)
                counts.append(whole // home.machines)
            else:
                counts.append(sum(one[position] // home.num_gpus for one in dealt))
        yield counts[0], counts[1]


def served_by(pools: PoolSearch, prefill: Worker, decode: Worker, x: int, y: int) -> float:
    """Requests/s of so many workers, by bisection on what the limits say; 0: they break one."""
    load = pools.workload
    transfer_s = pools.matcher.transfer_s(prefill, decode)
    interval_s = max(prefill.interval_s, transfer_s)
    fixed_s = prefill.latency_s + transfer_s
    tail = max(1.0, -log(1 - load.percentile / 100))

    def keeps(rate: float) -> bool:
        wait_s = queue_wait_s(x, rate * interval_s / x, interval_s)
        if load.ttft_limit_s is not None and fixed_s + tail * wait_s > load.ttft_limit_s:
            return False
        request_s = fixed_s + wait_s + (load.output_tokens - 1) * decode.latency_s
        return load.concurrency is None or rate * request_s <= load.concurrency

    most = min(MOST_LOAD * x / interval_s, y / decode.interval_s)
    if load.request_rate is not None:
        if load.request_rate > most:
            return 0.0
        return load.request_rate if keeps(load.request_rate) else 0.0
    if keeps(most):
        return most
    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def value_of(pools: PoolSearch, prefill: Worker, decode: Worker, x: int, y: int) -> float | None:
    load, rate = pools.workload, served_by(pools, prefill, decode, x, y)
    if rate < 1e-9:
        return None
    if load.objective == "latency":
        transfer_s = pools.matcher.transfer_s(prefill, decode)
        interval_s = max(prefill.interval_s, transfer_s)
        wait_s = 0.0
        if load.request_rate is not None:
            wait_s = queue_wait_s(x, rate * interval_s / x, interval_s)
        tokens_s = (load.output_tokens - 1) * decode.latency_s
        return -(prefill.latency_s + transfer_s + wait_s + tokens_s)
    if load.objective == "throughput":
        return rate * load.output_tokens
    burn = sum(
        count * worker.num_gpus * burn_per_s(worker.home.kind.gpu, load.objective)
        for count, worker in ((x, prefill), (y, decode))
    )
    return rate * load.output_tokens / burn


def by_trying_everything(pools: PoolSearch) -> tuple[float, int] | None:
    """The best value and the fewest GPUs that reach it."""
    best: tuple[float, int] | None = None
    known: dict[object, set[tuple[int, int]]] = {}
    for prefill, decode in product(pools.prefill_workers, pools.decode_workers):
        if pair_is_legal(pools.search.engine, prefill.split(1), decode.split(1)):
            continue
        key = (*prefill.home.key, *decode.home.key)
        if key not in known:
            known[key] = {
                (x, y)
                for room in set(rooms(pools.search.cluster, prefill.home, decode.home))
                for x in range(1, room[0] + 1)
                for y in range(1, room[1] + 1)
            }
        for x, y in known[key]:
            value = value_of(pools, prefill, decode, x, y)
            gpus = x * prefill.num_gpus + y * decode.num_gpus
            if value is None:
                continue
            if best is None or value > best[0] + 1e-7 * abs(best[0]):
                best = value, gpus
            elif value >= best[0] - 1e-7 * abs(best[0]):
                best = max(best[0], value), min(best[1], gpus)
    return best


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from((*CLUSTERS, MIXED)),
    st.sampled_from(("vllm", "sglang", "trtllm")),
    st.sampled_from(((512, 64), (3000, 200), (6000, 20))),
    st.sampled_from(("free", "rate", "limits", "tail", "cost", "latency")),
    st.integers(0, 3),
)
def test_no_other_plan_is_better(
    cluster: str, engine: str, lengths: tuple[int, int], kind: str, level: int
) -> None:
    asked: dict[str, object] = {}
    if kind == "rate":
        asked = {"request_rate": 0.7 * 3**level}
    if kind in ("limits", "tail"):
        asked = {"ttft_limit_s": 0.05 * 3**level, "tpot_limit_s": 0.007 * 1.6**level}
        asked["percentile"] = 95 if kind == "tail" else 50
    objective: Objective = "cost" if kind == "cost" else "throughput"
    if kind == "latency":
        objective, asked = "latency", {"request_rate": 0.5 * 2**level}
    load = Workload(
        input_tokens=lengths[0], output_tokens=lengths[1], objective=objective
    ).model_copy(update=asked)
    pools = PoolSearch(Search(LLAMA, parse_cluster(cluster), load, engine=engine), 600.0)
    found, expected = pools.best(), by_trying_everything(pools)
    assert found.is_proved
    if expected is None:
        assert found.match is None
        return
    assert found.match is not None
    assert found.match.value == pytest.approx(expected[0], rel=1e-6)
    if objective == "throughput":
        assert found.match.num_gpus == expected[1]


@given(st.sampled_from(CLUSTERS), st.data())
@settings(max_examples=30, deadline=None)
def test_machines_are_divided_as_well_as_they_can_be(cluster: str, data: st.DataObject) -> None:
    search = Search(LLAMA, parse_cluster(cluster), Workload(), engine="trtllm")
    workers = PoolSearch(search, 600.0).decode_workers
    homes = {(w.home.stage_gpus, w.home.pp): w.home for w in workers}
    prefill, decode = (data.draw(st.sampled_from(list(homes.values()))) for _ in range(2))
    found = Machines(search.cluster).divisions(prefill, decode)
    front = {(one.prefill, one.decode) for one in found}
    every = set(rooms(search.cluster, prefill, decode))
    best = {
        room
        for room in every
        if room[0]
        and room[1]
        and not any(o != room and o[0] >= room[0] and o[1] >= room[1] for o in every)
    }
    assert front == best


def made(cluster: str = "8xh100-sxm", **asked: object) -> DisaggregatedPlan:
    load = Workload(input_tokens=4000, output_tokens=200).model_copy(update=asked)
    return plan_disaggregated(LLAMA, parse_cluster(cluster), load, top=1)


def test_pools_are_disjoint_and_their_figures_agree() -> None:
    plan = made(tpot_limit_s=0.015, ttft_limit_s=0.5)
    used = [(rank.node, rank.gpu) for pool in plan.pools.values() for rank in pool.ranks]
    assert len(set(used)) == len(used) == plan.num_gpus
    assert plan.prediction.tpot_s.value <= 0.015
    assert plan.prediction.ttft_s.value <= 0.5
    assert plan.certificate.gap == 0
    one = plan.prediction
    assert one.ttft_s.value == pytest.approx(one.wait_s + one.prompt_s + one.transfer_s)
    for pool in plan.pools.values():
        smallest = min(gpu.memory_bytes for gpu in pool.cluster.node(0).gpus)
        assert pool.prediction.memory_bytes_per_gpu.value <= smallest
        tokens = pool.kv_cache.num_tokens
        assert tokens >= pool.limits.max_num_seqs * 4000
    assert plan.decode.limits.max_num_seqs * plan.decode.split.dp >= (
        one.requests_per_s * 199 * one.tpot_s.value * (1 - 1e-9)
    )


def test_one_pool_is_said_to_be_better_where_it_is() -> None:
    free = made()
    assert free.one_pool.is_better
    assert "ONE POOL IS BETTER" in free.one_pool.verdict
    assert free.one_pool.objective_value is not None
    assert free.one_pool.objective_value > free.certificate.objective_value
    tight = made(tpot_limit_s=0.012, ttft_limit_s=0.5)
    assert not tight.one_pool.is_better
    assert tight.one_pool.objective_value is not None
    assert tight.one_pool.objective_value < tight.certificate.objective_value


@pytest.mark.parametrize(
    ("cluster", "asked", "words"),
    [
        ("1xh100-sxm", {}, "the cluster has 1"),
        ("4xh100-sxm", {"tpot_limit_s": 1e-4}, "TPOT limit of 0.1 ms: the fastest decode worker"),
        ("4xh100-sxm", {"ttft_limit_s": 1e-3}, "TTFT limit of 1 ms: the fastest prompt"),
        ("4xh100-sxm", {"request_rate": 1e4}, "request rate of 10,000/s"),
    ],
)
def test_what_cannot_be_is_said_with_numbers(
    cluster: str, asked: dict[str, object], words: str
) -> None:
    with pytest.raises(NoFeasiblePlanError, match=words):
        made(cluster, **asked)


def test_pools_that_fit_no_memory_name_the_pool() -> None:
    model = read_model("meta-llama/Llama-3.1-405B")
    with pytest.raises(NoFeasiblePlanError, match="smallest prefill worker and needs about"):
        plan_disaggregated(model, parse_cluster("8xh100-sxm"), Workload())


def test_plans_of_pools_are_read_back_and_refused_where_one_pool_is_run(tmp_path: Path) -> None:
    plan = made(tpot_limit_s=0.015)
    file = tmp_path / "pools.json"
    write_plan(plan, file)
    assert read_any_plan(file) == plan
    with pytest.raises(ValueError, match=r"does not run; `rankwright render .* --target vllm`"):
        read_plan(file)
    fields = plan.model_dump()
    fields["decode"] = fields["prefill"]
    with pytest.raises(ValueError, match="is in both pools"):
        DisaggregatedPlan.model_validate(fields | {"num_gpus": 2 * plan.prefill.num_gpus})


def test_the_configuration_plans_pools_too() -> None:
    config = AutoParallelConfig(world_size=4, gpus_per_node=4, gpu="h100-sxm", tpot_limit_s=0.02)
    plan = config.plan_disaggregated(engine="sglang")
    assert plan.num_gpus <= 4
    assert plan.engine == "sglang"
    assert "Pool for decode" in plan.explain()
    assert plan.one_pool.verdict in plan.explain()
    with pytest.raises(ValueError, match="tp=2 is pinned"):
        config.model_copy(update={"tp": 2}).plan_disaggregated()
    with pytest.raises(ValueError, match="'rankwright' does not run separate pools"):
        config.plan_disaggregated(engine="rankwright")
