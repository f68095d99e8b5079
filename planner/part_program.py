"""The integer program over replicas that need not be alike.

    x[j]   replicas of column j, each on a set of GPUs of its own

    sum_j counts[j, k] * x[j] <= GPUs of class k        for every class of twins
    sum_j batch[j] * x[j] <= requests in flight         where the load has a concurrency
    maximise  sum_j tokens_per_s[j] * x[j]

Sets of several sizes cut from one island are columns over the same rows, and twins are counted
instead of listed. Equal objectives are settled by a second solve: fewest GPUs, then fewest parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pulp

from rankwright.cost_model.workload import Workload
from rankwright.planner.part_columns import Column
from rankwright.planner.solver import LARGEST, TIE, TIME_LIMIT_S, Ending, NoIncumbentError, solve
from rankwright.planner.twins import Twins


@dataclass(frozen=True, slots=True)
class PartsChoice:
    """What the program chose.

    Args:
        columns: Those with replicas, the fastest part first.
        counts: Replicas of each.
        ending: How the solver ended; its value and bound are output tokens/s.
    """

    columns: tuple[Column, ...]
    counts: tuple[int, ...]
    ending: Ending

    @property
    def value(self) -> float:
        """Output tokens/s of all parts."""
        return self.ending.value


def choose_parts(
    columns: Sequence[Column],
    twins: Twins,
    workload: Workload,
    *,
    settle: bool = True,
    time_limit_s: float = TIME_LIMIT_S,
) -> PartsChoice | None:
    """Return the replicas that together serve most; None where no column keeps the limits.

    Args:
        columns: Of the machine that `twins` are of.
        twins: Its GPUs.
        workload: Of the objective `throughput`, without a request rate.
        settle: Whether to choose well among equals, which takes a second solve.
        time_limit_s: Of each solve.

    Raises:
        NoIncumbentError: The time was over before anything was found.
    """
    if not columns:
        return None
    rates = [column.requests_per_s * workload.output_tokens for column in columns]
    num_gpus = sum(map(len, twins.classes))
    most = num_gpus * max(
        rate / column.num_gpus for rate, column in zip(rates, columns, strict=True)
    )
    unit = most / LARGEST
    problem = pulp.LpProblem("parts", pulp.LpMaximize)
    rooms = [
        min(
            len(twin) // count
            for twin, count in zip(twins.classes, one.counts, strict=True)
            if count
        )
        for one in columns
    ]
    numbers = [
        problem.add_variable(f"x{index}", 0, room, pulp.LpInteger)
        for index, room in enumerate(rooms)
    ]
    for place, members in enumerate(twins.classes):
        problem += pulp.lpDot([one.counts[place] for one in columns], numbers) <= len(members)
    if workload.concurrency is not None:
        batches = [one.candidate.batch_size for one in columns]
        problem += pulp.lpDot(batches, numbers) <= workload.concurrency
    tokens = pulp.lpDot([rate / unit for rate in rates], numbers)
    problem.setObjective(tokens)
    ending = solve(problem, time_limit_s, LARGEST)
    if ending is None or ending.value <= 0:
        return None  # fewer requests in flight than any batch
    found = [round(number.value()) for number in numbers]
    if settle and ending.status == "optimal":
        problem += tokens >= ending.value * (1 - TIE)
        found = _settled(problem, columns, rooms, numbers, time_limit_s) or found
    ending = replace(ending, value=ending.value * unit, bound=ending.bound * unit)
    used = sorted(
        (index for index, count in enumerate(found) if count),
        key=lambda index: -rates[index] * found[index],
    )
    return PartsChoice(
        tuple(columns[index] for index in used), tuple(found[index] for index in used), ending
    )


def _settled(
    problem: "pulp.LpProblem",
    columns: Sequence[Column],
    rooms: Sequence[int],
    numbers: "Sequence[pulp.LpVariable]",
    time_limit_s: float,
) -> list[int] | None:
    """Return the counts with the fewest GPUs, then the fewest parts; None where time was over."""
    used = [problem.add_variable(f"y{index}", cat=pulp.LpBinary) for index in range(len(columns))]
    for number, is_used, room in zip(numbers, used, rooms, strict=True):
        problem += number <= room * is_used
    gpus = pulp.lpDot([column.num_gpus for column in columns], numbers)
    # All parts together weigh less than one GPU.
    problem.setObjective(-gpus - 1 / (1 + sum(rooms)) * pulp.lpSum(used))
    try:
        settled = solve(problem, time_limit_s, 0.0)
    except NoIncumbentError:
        return None
    assert settled is not None, "the first solution satisfies the second program"
    return [round(number.value()) for number in numbers]
