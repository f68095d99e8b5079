"""Which expert is in which slot of which rank, so that the busiest rank has as little as can be.

In wide expert parallelism every rank has a fixed number of expert slots, and hot experts get
several: their tokens are dealt evenly to their replicas. Placing them is a small integer program

    y[e, k]     1 if expert e has k replicas
    w[e, k, r]  1 if it has k and one of them is on rank r
    sum_k y[e, k] = 1,   sum_r w[e, k, r] = k * y[e, k],   w[e, k, r] <= y[e, k]
    sum_e,k w[e, k, r] = slots
    minimise T,   T >= sum_e,k load[e] / k * w[e, k, r]   for every rank r

which starts from a greedy placement: its value bounds T, and where it meets the least that any
placement can have, or the program is too large for its time, it is what is returned.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from math import isfinite

import pulp

from rankwright.planner.solver import SolverError, solve

# Binaries up to which HiGHS 1.15 closes the program, or nearly, in a second of one core. Larger
# ones (256 experts over 16 ranks have 69,000) would spend it on their first relaxation.
_MOST_BINARIES = 4000
_CLOSE = 1e-9  # relative: a placement this near the bound is at it
_MOST_SWAPS = 2000  # each makes the busiest rank lighter; 256 experts over 32 ranks take some 50

Slots = tuple[tuple[int, ...], ...]


def place_experts(
    loads: Sequence[float], num_ranks: int, slots_per_rank: int, *, time_limit_s: float = 1.0
) -> Slots:
    """Return the experts in the slots of each rank, ascending, with the least load on the busiest.

    Every expert gets a slot and every slot an expert. An expert with `k` slots brings `1 / k` of
    its load to each. No rank holds an expert twice, unless it has more slots than there are
    experts.

    >>> place_experts([8.0, 1.0, 1.0, 2.0], num_ranks=2, slots_per_rank=3)
    ((0, 1, 3), (0, 2, 3))

    Args:
        loads: Of each expert, in any unit: tokens counted, or expected.
        num_ranks: Ranks that share the experts.
        slots_per_rank: Experts that each holds.
        time_limit_s: For the integer program; the greedy placement takes milliseconds.

    Raises:
        ValueError: A load is negative or no number, or there are fewer slots than experts.
    """
    _check(loads, num_ranks, slots_per_rank, time_limit_s)
    num_experts = len(loads)
    if slots_per_rank >= num_experts:
        # Each rank holds every expert, and all ranks the same ones twice: loads are equal.
        once = tuple(sorted(slot % num_experts for slot in range(slots_per_rank)))
        return (once,) * num_ranks
    greedy = _improve(loads, _greedy(loads, num_ranks, slots_per_rank))
    peak = peak_load(loads, greedy)
    if peak <= _least_peak(loads, num_ranks) * (1 + _CLOSE):
        return greedy
    return _solve(loads, num_ranks, slots_per_rank, peak, time_limit_s) or greedy


def rank_loads(loads: Sequence[float], slots: Slots) -> tuple[float, ...]:
    """Return what each rank carries, in the unit of `loads`.

    >>> rank_loads([8.0, 1.0, 1.0, 2.0], ((0, 1, 3), (0, 2, 3)))
    (6.0, 6.0)
    """
    replicas = Counter(expert for held in slots for expert in held)
    return tuple(sum(loads[expert] / replicas[expert] for expert in held) for held in slots)


def peak_load(loads: Sequence[float], slots: Slots) -> float:
    """Return what the busiest rank carries, in the unit of `loads`."""
    return max(rank_loads(loads, slots))


def _check(
    loads: Sequence[float], num_ranks: int, slots_per_rank: int, time_limit_s: float
) -> None:
    if not loads:
        raise ValueError("no loads: expected one for each expert")
    for expert, load in enumerate(loads):
        if not (isfinite(load) and load >= 0):
            raise ValueError(f"load {load} of expert {expert}: expected a number of 0 or more")
    if num_ranks < 1 or slots_per_rank < 1:
        raise ValueError(
            f"{num_ranks} ranks of {slots_per_rank} expert slots: expected 1 or more of each"
        )
    if num_ranks * slots_per_rank < len(loads):
        need = -(-len(loads) // num_ranks)
        raise ValueError(
            f"{num_ranks} ranks of {slots_per_rank} slots cannot hold {len(loads)} experts; give "
            f"each rank {need} slots or more"
        )
    if time_limit_s <= 0:
        raise ValueError(f"time_limit_s={time_limit_s}: expected more than 0")


def _least_peak(loads: Sequence[float], num_ranks: int) -> float:
    """Return a load that some rank has in any placement: the mean, or a part of the hottest."""
    return max(sum(loads) / num_ranks, max(loads) / num_ranks)


def _greedy(loads: Sequence[float], num_ranks: int, slots_per_rank: int) -> list[list[int]]:
    """Return a placement: the next replica to the expert with most load on each, largest first."""
    replicas = [1] * len(loads)
    heap = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(num_ranks * slots_per_rank - len(loads)):
        _, expert = heapq.heappop(heap)
        replicas[expert] += 1
        if replicas[expert] < num_ranks:
            heapq.heappush(heap, (-loads[expert] / replicas[expert], expert))
    parts = [load / count for load, count in zip(loads, replicas, strict=True)]
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    carried = [0.0] * num_ranks
    for expert in sorted(range(len(loads)), key=lambda one: -parts[one]):
        for _ in range(replicas[expert]):
            rank = _rank_for(expert, held, carried, slots_per_rank, parts)
            held[rank].append(expert)
            carried[rank] += parts[expert]
    return held


def _rank_for(
    expert: int,
    held: list[list[int]],
    carried: list[float],
    slots_per_rank: int,
    parts: Sequence[float],
) -> int:
    """Return the rank with the least load that can take `expert`; makes room where none can."""
    ranks = range(len(held))
    free = [rank for rank in ranks if len(held[rank]) < slots_per_rank]
    able = [rank for rank in free if expert not in held[rank]]
    if able:
        return min(able, key=carried.__getitem__)
    # All ranks with room hold it. A full one without it has an expert that they lack: move that.
    spare = free[0]
    full = next(rank for rank in ranks if expert not in held[rank])
    moved = next(one for one in held[full] if one not in held[spare])
    held[full].remove(moved)
    held[spare].append(moved)
    carried[full] -= parts[moved]
    carried[spare] += parts[moved]
    return full


def _improve(loads: Sequence[float], held: list[list[int]]) -> Slots:
    """Return the placement after swaps that make the busiest rank lighter, until none does."""
    replicas = Counter(expert for experts in held for expert in experts)
    parts = [load / replicas[expert] for expert, load in enumerate(loads)]
    carried = [sum(parts[expert] for expert in experts) for experts in held]
    for _ in range(_MOST_SWAPS):
        busiest = max(range(len(held)), key=carried.__getitem__)
        swap = min(_swaps(busiest, held, carried, parts), default=None)
        if swap is None or swap[0] >= carried[busiest] * (1 - _CLOSE):
            break
        _, rank, given, taken = swap
        held[busiest][held[busiest].index(given)] = taken
        held[rank][held[rank].index(taken)] = given
        carried[busiest] += parts[taken] - parts[given]
        carried[rank] += parts[given] - parts[taken]
    return tuple(tuple(sorted(experts)) for experts in held)


def _swaps(
    busiest: int, held: list[list[int]], carried: Sequence[float], parts: Sequence[float]
) -> Iterator[tuple[float, int, int, int]]:
    """Yield the swaps of two experts: the heavier rank's load after it, the rank, and the two."""
    for rank in range(len(held)):
        mine, theirs = set(held[busiest]), set(held[rank])
        for given in mine - theirs:
            for taken in theirs - mine:
                moved = parts[given] - parts[taken]
                if moved > 0:
                    yield max(carried[busiest] - moved, carried[rank] + moved), rank, given, taken


def _solve(
    loads: Sequence[float], num_ranks: int, slots_per_rank: int, peak: float, time_limit_s: float
) -> Slots | None:
    """Return what the integer program finds; None where it is too large or finds nothing."""
    num_experts = len(loads)
    most = min(num_ranks, num_ranks * slots_per_rank - num_experts + 1)
    if num_experts * most * (num_ranks + 1) > _MOST_BINARIES:
        return None
    problem = pulp.LpProblem("experts", pulp.LpMinimize)
    add = problem.add_variable
    # In units of the greedy peak, which need not be exceeded.
    busiest = add("T", 0, 1)
    problem += busiest
    on_rank: list[list[pulp.LpVariable]] = [[] for _ in range(num_ranks)]
    work: list[list[pulp.LpAffineExpression]] = [[] for _ in range(num_ranks)]
    experts: list[list[list[pulp.LpVariable]]] = []
    for expert, load in enumerate(loads):
        has = [add(f"y{expert}_{count}", cat=pulp.LpBinary) for count in range(1, most + 1)]
        problem += pulp.lpSum(has) == 1
        experts.append([])
        for count, chosen in enumerate(has, start=1):
            where = [
                add(f"w{expert}_{count}_{rank}", cat=pulp.LpBinary) for rank in range(num_ranks)
            ]
            problem += pulp.lpSum(where) == count * chosen
            for rank, one in enumerate(where):
                problem += one <= chosen
                on_rank[rank].append(one)
                work[rank].append(load / count / peak * one)
            experts[-1].append(where)
    for slots, parts in zip(on_rank, work, strict=True):
        problem += pulp.lpSum(slots) == slots_per_rank
        problem += pulp.lpSum(parts) <= busiest
    try:
        ending = solve(problem, time_limit_s)
    except SolverError:
        return None  # out of time without a solution: the greedy one stands
    if ending is None or ending.value > 1 - _CLOSE:
        return None
    return tuple(
        tuple(
            expert
            for expert in range(num_experts)
            if any(where[rank].value() > 0.5 for where in experts[expert])
        )
        for rank in range(num_ranks)
    )
