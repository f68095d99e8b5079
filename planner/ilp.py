"""The integer program: which shape, at which batch level, how many replicas, and where.

    z[c]     1 if candidate c (shape, batch, chunk, pool) is chosen
    n[c, p]  replicas of c on placement p of its pool (a kind of slot; 2,048 equal nodes are one)
    t[c]     output tokens/s of c, where the requests in flight limit them

    sum z = 1                                        one shape for all replicas
    z[c] <= sum_p n[c, p],   n[c, p] <= room[c, p] * z[c]
    sum_c memory[c] / budget[c] * z[c] <= 1          likewise TTFT and TPOT over their limits
    t[c] <= sum_p rate[c, p] * n[c, p]               and what the requests in flight allow
    maximise  sum t   |   minimise  sum request_s * z   |   maximise  sum tokens_per_dollar * z

Equal objectives are settled by a second solve: fewest GPUs, then the shortest request.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import pulp

from rankwright.cost_model.workload import Objective, Workload
from rankwright.planner.balance import StageCosts
from rankwright.planner.candidates import Candidate
from rankwright.planner.solver import TIME_LIMIT_S, Ending, NoIncumbentError, solve
from rankwright.topology.cluster import Gpu
from rankwright.topology.devices import device_of

# The largest objective, in the unit that the solver sees: its tolerances are absolute, about 1e-6,
# while seconds of a request are small and tokens of 16,384 GPUs many.
_LARGEST = 1e4
# Candidates this much worse than the best in the objective count as equal to it.
_TIE = 1e-6


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


@dataclass(frozen=True, slots=True)
class Goal:
    """An objective: its name with unit, its direction, and how it reads."""

    name: str
    unit: str
    sense: int


GOALS: dict[Objective, Goal] = {
    "throughput": Goal("output tokens per second", "tokens/s", pulp.LpMaximize),
    "latency": Goal("seconds of one request", "s", pulp.LpMinimize),
    "cost": Goal("output tokens per dollar", "tokens/$", pulp.LpMaximize),
    "energy": Goal("output tokens per joule", "tokens/J", pulp.LpMaximize),
}


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
    columns = prune(candidates, workload)
    if not columns:
        return None
    return _Program(columns, workload, replicas, time_limit_s).solve(settle=settle)


def prune(candidates: Sequence[Candidate], workload: Workload) -> list[Candidate]:
    """Return the candidates without those that another of their shape and pool beats in all.

    What another equals in what the objective counts, in how far it breaks each limit and, under a
    concurrency, in batch, can never be needed: a few of a hundred columns are left.
    """
    by_home: dict[tuple[object, ...], list[Candidate]] = {}
    for candidate in candidates:
        if "rate" in candidate.broken or (
            workload.objective in ("cost", "energy") and len(candidate.pool.replicas) > 1
        ):
            continue  # a ratio is never better over two kinds of GPU than over the better one
        shape, placements = candidate.shape, candidate.pool.replicas
        home = (
            *(*shape.degrees, candidate.replicas),
            *((group.count, group.spread, *map(id, group.stages)) for group in placements),
            candidate.batch_size if workload.concurrency is not None else None,
        )
        by_home.setdefault(home, []).append(candidate)
    kept: list[Candidate] = []
    for members in by_home.values():
        # Shortest requests first: of two that are equal in all that counts, the first one stays.
        members.sort(key=lambda member: member.request_s(workload.output_tokens))
        front: list[tuple[tuple[float, ...], Candidate]] = []
        for member in members:
            merits = _merits(member, workload)
            if any(_covers(other, merits) for other, _ in front):
                continue
            front = [entry for entry in front if not _covers(merits, entry[0])]
            front.append((merits, member))
        kept += [member for _, member in front]
    return kept


def _merits(candidate: Candidate, workload: Workload) -> tuple[float, ...]:
    """Return what counts in the program, each with more being worse."""
    merits = [-state.requests_per_s for state in candidate.serving]
    # Inside a limit it does not matter how far.
    merits += [max(1.0, part) for part in limit_shares(candidate, workload)]
    if workload.objective == "latency":
        merits.append(candidate.request_s(workload.output_tokens))
    return tuple(merits)


def limit_shares(candidate: Candidate, workload: Workload) -> list[float]:
    """Return memory, TTFT and TPOT as shares of what may be; those without a limit are left out."""
    shares = [candidate.memory_bytes / candidate.budget_bytes]
    if workload.ttft_limit_s is not None:
        shares.append(candidate.ttft_s / workload.ttft_limit_s)
    if workload.tpot_limit_s is not None:
        shares.append(candidate.tpot_s / workload.tpot_limit_s)
    return shares


def _covers(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


def ratio_of(candidate: Candidate, placement: int, workload: Workload) -> float:
    """Return tokens per dollar or per joule of a replica on one placement of its pool."""
    per_second = sum(
        candidate.shape.gpus_per_stage * burn_per_s(kind.gpu, workload.objective)
        for kind in candidate.pool.replicas[placement].stages
    )
    requests = candidate.serving[placement].requests_per_s
    if candidate.replicas is not None and workload.request_rate is not None:
        requests = min(requests, workload.request_rate / candidate.replicas)
    return requests * workload.output_tokens / per_second


def burn_per_s(gpu: Gpu, objective: Objective) -> float:
    """Return the dollars or joules that `gpu` takes in a second.

    Energy is the board's rated power: an upper bound that ranks GPUs, not a meter. A device without
    a listed price or power counts one, so that the fewest GPUs win.
    """
    device = device_of(gpu)
    if objective == "energy":
        return device.tdp_w if device is not None else 1.0
    if device is None or device.usd_per_hour is None:
        return 1.0
    return sum(device.usd_per_hour) / len(device.usd_per_hour) / 3600


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
        self._token_unit = most * workload.output_tokens / _LARGEST
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
            return _LARGEST
        return max(ratio_of(one, 0, workload) for one in self._columns) / self._unit

    def _settle(
        self, primary: "pulp.LpAffineExpression", ending: Ending
    ) -> tuple[int, tuple[int, ...]] | None:
        """Return what a second solve, for the tie-break, chooses among what equals the best.

        None where its time was over: any of them is as good in what was asked for.
        """
        slack = _TIE * abs(ending.value)
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
        self._unit = max(values) / _LARGEST
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
            per_token = 1000 / _LARGEST
            worse = pulp.lpDot(times, self._chosen) - per_token * pulp.lpSum(self._tokens)
        return worse if sense == pulp.LpMinimize else -worse


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
