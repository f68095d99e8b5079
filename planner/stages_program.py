"""The cut of layers into stages as an integer program, to which `balance.py` is held."""

from collections.abc import Sequence
from itertools import accumulate

import pulp

from rankwright.planner.balance import StageCosts
from rankwright.planner.solver import solve


def solve_stages(stages: Sequence[StageCosts]) -> tuple[int, ...] | None:
    """Return the layers of each stage, from the integer program that `balance_layers` searches.

        e[s, l]  1 if stage s ends before layer l
        minimise  T + a little of the largest stage's layer count
        end[s] = sum_l l * e[s, l],   end[s - 1] < end[s],   end[last] = number of layers
        T >= seconds of layers end[s - 1] to end[s] on stage s, and what the stage costs besides
        memory likewise below the budget of each stage

    Seconds and bytes up to a layer are looked up by the one-hot `e`, so that uneven layers and
    stages on different GPUs stay linear.
    """
    num_layers = len(stages[0].layer_s)
    problem = pulp.LpProblem("stages", pulp.LpMinimize)
    add = problem.add_variable
    slowest, widest = add("T", 0), add("widest", 0)
    layers = list(range(num_layers + 1))
    ends = [
        [add(f"e{stage}_{layer}", cat=pulp.LpBinary) for layer in layers]
        for stage in range(len(stages))
    ]
    scale = max(sum(stage.layer_s) + stage.extra_s for stage in stages)
    problem += slowest + 1e-7 * widest
    for index, (stage, end) in enumerate(zip(stages, ends, strict=True)):
        problem += pulp.lpSum(end) == 1
        seconds = [total / scale for total in (0.0, *accumulate(stage.layer_s))]
        sizes = [total / stage.budget_bytes for total in (0.0, *accumulate(stage.layer_bytes))]
        before = ends[index - 1] if index else None
        count, time, size = (
            pulp.lpDot(values, end) - (pulp.lpDot(values, before) if before else 0)
            for values in (layers, seconds, sizes)
        )
        problem += count >= 1
        problem += widest >= count
        problem += slowest >= time + stage.extra_s / scale
        problem += size <= 1 - stage.extra_bytes / stage.budget_bytes
    problem += ends[-1][num_layers] == 1
    if solve(problem) is None:
        return None
    stops = [next(layer for layer in layers if end[layer].value() > 0.5) for end in ends]
    return tuple(stop - start for start, stop in zip([0, *stops[:-1]], stops, strict=True))
