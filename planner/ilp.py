"""The integer program: which shape, at which batch level, how many replicas, and where.

    z[c]     1 if candidate c (shape, batch, chunk, pool) is chosen
    n[c, p]  replicas of c on placement p of its pool (a kind of slot; 2,048 equal nodes are one)
    t[c]     output tokens/s of c, where the requests in flight limit them

    sum z = 1                                        one shape for all replicas
    z[c] <= sum_p n[c, p],   n[c, p] <= room[c, p] * z[c]
    sum_c memory[c] / budget[c] * z[c] <= 1          likewise TTFT and TPOT over their limits
    t[c] <= sum_p rate[c, p] * n[c, p]               and what the requests in flight allow
    maximise  sum t   |   minimise  sum request_s * z   |   maximise  sum tokens_per_dollar * z

Columns that cannot be the answer are left out before (`prune.py`). Equal objectives are settled by
a second solve: fewest GPUs, then the shortest request.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pulp

from rankwright.cost_model.workload import Workload
from rankwright.planner.candidate import Candidate
from rankwright.planner.goals import GOALS, ratio_of
from rankwright.planner.prune import contenders, limit_shares, prune
from rankwright.planner.solver import LARGEST, TIE, TIME_LIMIT_S, Ending, NoIncumbentError, solve


@dataclass(frozen=True, slots=True)
class Choice:
    """What the program chose.

    Args:
        candidate: Shape, batch and pool.
        counts: Replicas on each placement of the pool.
        value: Of the objective.
        ending: How the solver ended, its bound included.
    """

    candidate: Candidate
    counts: tuple[int, ...]
    value: float
    ending: Ending

    @property
    def num_replicas(self) -> int:
        """Replicas in all."""
        return sum(self.counts)

    @property
    def num_gpus(self) -> int:
        """GPUs that they take."""
        return self.num_replicas * self.candidate.shape.num_gpus


def choose(
    candidates: Sequence[Candidate],
    workload: Workload,
    replicas: int | None = None,
    *,
    settle: bool = True,
    time_limit_s: float = TIME_LIMIT_S,
) -> Choice | None:
    """Return the best candidate that keeps every limit; None when none does.

    Args:
        candidates: Columns; those that break a limit may be among them.
        workload: Objective, limits and load.
        replicas: Number of replicas, if pinned.
        settle: Whether to choose well among equals, which takes a second solve.
        time_limit_s: Of each solve.

    Raises:
        NoIncumbentError: The time was over before any plan was found.
    """
    columns = contenders(prune(candidates, workload), workload, replicas)
    if not columns:
        return None
    return _Program(columns, workload, replicas, time_limit_s).solve(settle=settle)


class _Program:
    """The program over one set of columns."""

    def __init__(
        self,
        columns: Sequence[Candidate],
        workload: Workload,
        replicas: int | None,
        time_limit_s: float,
    ) -> None:
        self._columns = columns
        self._time_limit_s = time_limit_s
        self._workload = workload
        self._goal = GOALS[workload.objective]
        most = max(
            sum(
                group.count * state.requests_per_s
                for group, state in zip(column.pool.replicas, column.serving, strict=True)
            )
            for column in columns
        )
        self._token_unit = most * workload.output_tokens / LARGEST
        self._unit = self._token_unit
        self._problem = pulp.LpProblem("plan", self._goal.sense)
        add = self._problem.add_variable
        self._chosen = [add(f"z{index}", cat=pulp.LpBinary) for index in range(len(columns))]
        self._counts = [
            [
                add(f"n{index}_{place}", 0, group.count, pulp.LpInteger)
                for place, group in enumerate(column.pool.replicas)
            ]
            for index, column in enumerate(columns)
        ]
        self._tokens: list[pulp.LpAffineExpression | pulp.LpVariable] = []
        self._problem += pulp.lpSum(self._chosen) == 1
        for index in range(len(columns)):
            self._add_column(index, replicas)
        self._add_limits()

    def solve(self, *, settle: bool) -> Choice | None:
        """Return the best plan; ties go to the fewest GPUs, then to the shortest request."""
        primary = self._objective()
        self._problem.setObjective(primary)
        ending = solve(self._problem, self._time_limit_s, self._bound())
        if ending is None:
            return None
        found = self._found()
        if settle and ending.status == "optimal":
            found = self._settle(primary, ending) or found
        unit = self._unit
        ending = replace(ending, value=ending.value * unit, bound=ending.bound * unit)
        index, counts = found
        return Choice(self._columns[index], counts, ending.value, ending)

    def _found(self) -> tuple[int, tuple[int, ...]]:
        """Return the column that the last solve chose, and its replicas."""
        index = max(range(len(self._columns)), key=lambda column: self._chosen[column].value())
        return index, tuple(round(count.value()) for count in self._counts[index])

    def _bound(self) -> float:
        """Return what no choice can beat, from the columns alone, in the unit of the objective."""
        workload = self._workload
        if workload.objective == "latency":
            return min(one.request_s(workload.output_tokens) for one in self._columns) / self._unit
        if workload.objective == "throughput":
            return LARGEST
        return max(ratio_of(one, 0, workload) for one in self._columns) / self._unit

    def _settle(
        self, primary: "pulp.LpAffineExpression", ending: Ending
    ) -> tuple[int, tuple[int, ...]] | None:
        """Return what a second solve, for the tie-break, chooses among what equals the best.

        None where its time was over: any of them is as good in what was asked for.
        """
        slack = TIE * abs(ending.value)
        if self._goal.sense == pulp.LpMaximize:
            self._problem += primary >= ending.value - slack
        else:
            self._problem += primary <= ending.value + slack
        self._problem.setObjective(self._tie_break())
        try:
            settled = solve(self._problem, self._time_limit_s, 0.0)
        except NoIncumbentError:
            return None
        assert settled is not None, "the first solution satisfies the second program"
        return self._found()

    def _add_column(self, index: int, replicas: int | None) -> None:
        column, workload, problem = self._columns[index], self._workload, self._problem
        chosen, counts = self._chosen[index], self._counts[index]
        number = pulp.lpSum(counts)
        for count, group in zip(counts, column.pool.replicas, strict=True):
            problem += count <= group.count * chosen
        problem += number >= chosen
        fixed = replicas or column.replicas
        if fixed is not None:
            problem += number == fixed * chosen
        rates = [
            state.requests_per_s * workload.output_tokens / self._token_unit
            for state in column.serving
        ]
        served = pulp.lpDot(rates, counts)
        if workload.concurrency is None:
            self._tokens.append(served)
            return
        tokens = problem.add_variable(f"t{index}", 0)
        self._tokens.append(tokens)
        problem += tokens <= served
        in_flight = workload.concurrency
        # No more than are in flight can be served at the rate of a full batch.
        problem += tokens <= in_flight / column.batch_size * max(rates) * chosen
        if replicas is None and column.batch_size == 1:
            problem += number <= in_flight * chosen
        elif replicas is None:
            # A replica more than the requests fill would run at a smaller batch: another column.
            problem += (column.batch_size - 1) * number <= (in_flight - 1) * chosen
        if workload.objective == "latency":
            problem += column.batch_size * number >= in_flight * chosen

    def _add_limits(self) -> None:
        shares = [limit_shares(column, self._workload) for column in self._columns]
        for used in zip(*shares, strict=True):
            # A column over a limit by less than the solver's tolerance (1e-6) must not slip in.
            row = [max(part, 1.001) if part > 1 else part for part in used]
            self._problem += pulp.lpDot(row, self._chosen) <= 1

    def _objective(self) -> "pulp.LpAffineExpression":
        workload = self._workload
        if workload.objective == "throughput":
            self._unit = self._token_unit
            return pulp.lpSum(self._tokens)
        if workload.objective == "latency":
            values = [column.request_s(workload.output_tokens) for column in self._columns]
        else:
            values = [ratio_of(column, 0, workload) for column in self._columns]
        self._unit = max(values) / LARGEST
        return pulp.lpDot([value / self._unit for value in values], self._chosen)

    def _tie_break(self) -> "pulp.LpAffineExpression":
        """Return what settles ties, to be optimised in the direction of the objective.

        Throughput is given, so the fewest GPUs win. Where the objective says nothing about how many
        replicas there are (latency, ratios), as many tokens as possible come first. A request's
        time settles the rest; it weighs less than one GPU or a thousandth of the tokens.
        """
        workload, sense = self._workload, self._goal.sense
        longest_s = max(column.request_s(workload.output_tokens) for column in self._columns)
        times = [
            0.5 * column.request_s(workload.output_tokens) / longest_s for column in self._columns
        ]
        gpus = pulp.lpSum(
            column.shape.num_gpus * count
            for column, counts in zip(self._columns, self._counts, strict=True)
            for count in counts
        )
        worse = gpus + pulp.lpDot(times, self._chosen)
        if workload.objective != "throughput" and workload.request_rate is None:
            per_token = 1000 / LARGEST
            worse = pulp.lpDot(times, self._chosen) - per_token * pulp.lpSum(self._tokens)
        return worse if sense == pulp.LpMinimize else -worse
