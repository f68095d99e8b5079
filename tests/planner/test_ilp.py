from itertools import product

import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.cost_model.collectives import Group
from rankwright.cost_model.layout import SlotKind
from rankwright.cost_model.predict import Replicas
from rankwright.cost_model.serving import Serving, find_flow
from rankwright.cost_model.workload import Workload
from rankwright.planner.candidate import Candidate
from rankwright.planner.goals import burn_per_s
from rankwright.planner.ilp import choose
from rankwright.planner.pools import Pool
from rankwright.planner.shapes import Shape
from rankwright.planner.solver import solve
from rankwright.topology.shorthand import parse_cluster

OUTPUT_TOKENS = 11
FLOW = find_flow(Workload(input_tokens=10, output_tokens=OUTPUT_TOKENS), 1, 512)


def slot_kind(device: str) -> SlotKind:
    gpu = parse_cluster(f"1x{device}").nodes[0].gpus[0]
    return SlotKind(((0,),), 1, (range(8),), gpu, Group(1))


KINDS = [slot_kind("h100-sxm"), slot_kind("l4")]


@st.composite
def candidates(draw: st.DrawFn) -> Candidate:
    pp = draw(st.sampled_from([1, 2]))
    kinds = draw(st.sampled_from([KINDS[:1], KINDS[1:], KINDS]))
    pool = Pool(tuple(Replicas((kind,) * pp, draw(st.integers(1, 3))) for kind in kinds))
    batch = draw(st.sampled_from([1, 2, 4, 8]))
    serving = tuple(
        Serving(
            ttft_s=draw(st.sampled_from([0.1, 0.2, 0.4])),
            wait_s=0.0,
            tpot_s=draw(st.sampled_from([0.01, 0.02, 0.05])),
            requests_per_s=draw(st.sampled_from([1.0, 1.5, 2.0, 3.0])),
            batch_size=batch,
            flow=FLOW,
        )
        for _ in kinds
    )
    shape = Shape(draw(st.sampled_from([1, 2, 4])), pp, 1, tuple(kinds))
    memory = draw(st.sampled_from([50, 100, 100, 101]))
    return Candidate(shape, pool, batch, 512, (1,) * pp, serving, memory, 100)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    return Workload(
        input_tokens=10,
        output_tokens=OUTPUT_TOKENS,
        concurrency=draw(st.sampled_from([None, 1, 3, 8])),
        ttft_limit_s=draw(st.sampled_from([None, 0.2])),
        tpot_limit_s=draw(st.sampled_from([None, 0.02])),
        objective=draw(st.sampled_from(["throughput", "latency", "cost", "energy"])),
    )


def value_of(
    candidate: Candidate, counts: tuple[int, ...], workload: Workload, pinned: int | None
) -> float | None:
    """The objective of one choice, or None where it breaks something: the problem, restated."""
    number, in_flight = sum(counts), workload.concurrency
    slowest_ttft_s = max(state.ttft_s for state in candidate.serving)
    slowest_tpot_s = max(state.tpot_s for state in candidate.serving)
    if number < 1 or candidate.memory_bytes > candidate.budget_bytes:
        return None
    if workload.ttft_limit_s is not None and slowest_ttft_s > workload.ttft_limit_s:
        return None
    if workload.tpot_limit_s is not None and slowest_tpot_s > workload.tpot_limit_s:
        return None
    if pinned is not None and number != pinned:
        return None
    if in_flight is not None:
        # A replica more than the requests fill would run at a smaller batch: another column.
        spare = candidate.batch_size - 1
        most = (in_flight - 1) // spare if spare else in_flight
        if pinned is None and number > most:
            return None
        if workload.objective == "latency" and candidate.batch_size * number < in_flight:
            return None
    rates = [state.requests_per_s for state in candidate.serving]
    if workload.objective == "throughput":
        total = sum(count * rate for count, rate in zip(counts, rates, strict=True))
        if in_flight is not None:
            total = min(total, in_flight / candidate.batch_size * max(rates))
        return total * OUTPUT_TOKENS
    if workload.objective == "latency":
        return max(state.ttft_s + (OUTPUT_TOKENS - 1) * state.tpot_s for state in candidate.serving)
    if len(rates) > 1:
        return None  # the better kind alone is never worse
    gpus = candidate.shape.tp * candidate.shape.pp
    gpu = candidate.pool.replicas[0].stages[0].gpu
    return rates[0] * OUTPUT_TOKENS / (gpus * burn_per_s(gpu, workload.objective))


def brute_force(columns: list[Candidate], workload: Workload, pinned: int | None) -> float | None:
    values = [
        value
        for column in columns
        for counts in product(*(range(group.count + 1) for group in column.pool.replicas))
        if (value := value_of(column, counts, workload, pinned)) is not None
    ]
    if not values:
        return None
    return min(values) if workload.objective == "latency" else max(values)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(candidates(), min_size=1, max_size=4),
    workloads(),
    st.sampled_from([None, None, None, 1, 2]),
)
def test_the_program_equals_brute_force(
    columns: list[Candidate], workload: Workload, pinned: int | None
) -> None:
    choice, best = choose(columns, workload, pinned), brute_force(columns, workload, pinned)
    assert (choice is None) == (best is None)
    if choice is not None and best is not None:
        assert choice.value == pytest.approx(best)
        assert choice.ending.status == "optimal"
        assert choice.ending.bound == pytest.approx(best)
        # What was chosen really has that value, and no rounding broke a limit.
        chosen = value_of(choice.candidate, choice.counts, workload, pinned)
        assert chosen == pytest.approx(best, rel=1e-5)


def test_equal_throughput_goes_to_the_fewest_gpus() -> None:
    kind = KINDS[0]
    state = Serving(0.1, 0.0, 0.01, 2.0, 1, FLOW)

    def one(tp: int) -> Candidate:
        pool = Pool((Replicas((kind,), 1),))
        return Candidate(Shape(tp, 1, 1, (kind,)), pool, 1, 512, (1,), (state,), 50, 100)

    choice = choose([one(4), one(2)], Workload(input_tokens=10, output_tokens=OUTPUT_TOKENS))
    assert choice is not None
    assert choice.num_gpus == 2


def test_a_limit_missed_by_a_hair_is_missed() -> None:
    kind = KINDS[0]
    state = Serving(0.1, 0.0, 0.02 * (1 + 1e-9), 2.0, 1, FLOW)
    pool = Pool((Replicas((kind,), 1),))
    column = Candidate(Shape(1, 1, 1, (kind,)), pool, 1, 512, (1,), (state,), 50, 100)
    load = Workload(input_tokens=10, output_tokens=OUTPUT_TOKENS, tpot_limit_s=0.02)
    assert choose([column], load) is None


def test_highs_is_asked_without_its_presolve() -> None:
    # With presolve, HiGHS 1.15.1 ends this at 0.0157 tokens/J, on an H100, and calls it optimal.
    def one(kind: SlotKind, count: int) -> Candidate:
        state = Serving(0.1, 0.0, 0.01, 1.0, 1, FLOW)
        pool = Pool((Replicas((kind,), count),))
        return Candidate(Shape(1, 1, 1, (kind,)), pool, 1, 512, (1,), (state,), 50, 100)

    load = Workload(input_tokens=10, output_tokens=OUTPUT_TOKENS, concurrency=3, objective="energy")
    choice = choose([one(KINDS[0], 2), one(KINDS[0], 3), one(KINDS[1], 2)], load)
    assert choice is not None
    assert choice.value == pytest.approx(OUTPUT_TOKENS / 72)  # an L4 is rated 72 W


def test_cbc_takes_over_where_highs_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwright.planner.solver.find_spec", lambda name: None)
    problem = pulp.LpProblem("fallback", pulp.LpMaximize)
    x = problem.add_variable("x", 0, 7, cat=pulp.LpInteger)
    problem += 3 * x
    problem += 2 * x <= 11
    ending = solve(problem)
    assert ending is not None
    assert (ending.solver, ending.status, ending.value, ending.bound) == ("CBC", "optimal", 15, 15)


def test_an_infeasible_program_has_no_ending() -> None:
    problem = pulp.LpProblem("none", pulp.LpMaximize)
    x = problem.add_variable("x", cat=pulp.LpBinary)
    problem += x
    problem += x >= 2
    assert solve(problem) is None


@pytest.mark.parametrize("sense", [pulp.LpMaximize, pulp.LpMinimize])
def test_the_bound_is_on_the_side_of_the_objective(sense: int) -> None:
    problem = pulp.LpProblem("bound", sense)
    x = problem.add_variable("x", 1, 7, cat=pulp.LpInteger)
    problem += 3 * x
    problem += 2 * x <= 11
    problem += 2 * x >= 3
    ending = solve(problem)
    assert ending is not None
    assert ending.value == (15 if sense == pulp.LpMaximize else 6)
    assert ending.bound == pytest.approx(ending.value)
    assert ending.gap == 0
    assert ending.solver.startswith("HiGHS")
