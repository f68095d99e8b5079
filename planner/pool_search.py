"""The search over pairs of workers: branch and bound, exact on its model.

Every prefill worker is paired with every decode worker. What a pair could do at most, were GPUs
divisible, orders the pairs; each is then matched exactly, until no pair that is left can beat the
best. So the last bound is the value itself, unless the time is over first.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter

from rankwright.cost_model.pool_forms import pair_is_legal
from rankwright.cost_model.pools import slowest_path
from rankwright.cost_model.workload import Workload
from rankwright.planner.divide import Machines
from rankwright.planner.matching import Match, Matcher
from rankwright.planner.search import Search
from rankwright.planner.workers import Worker, Workers

_EQUAL = 1e-9  # bounds within this share of the best value may still win a tie


@dataclass(frozen=True, slots=True)
class Pair:
    """A prefill and a decode worker, and what they can do at most."""

    prefill: Worker
    decode: Worker
    bound: float
    least_gpus: int


@dataclass(frozen=True, slots=True)
class Found:
    """The best match, and the proof.

    Args:
        match: None: no pair keeps every limit.
        bound: No match is better than this.
        seconds: Of the search.
        is_proved: Whether every pair was matched or cut off by its bound.
    """

    match: Match | None
    bound: float
    seconds: float
    is_proved: bool


@dataclass(frozen=True)
class PoolSearch:
    """Everything that a plan of two pools depends on, and what was found.

    Args:
        search: Model, cluster, workload, budget and engine.
        time_limit_s: After which the best pair until then is taken.
    """

    search: Search
    time_limit_s: float
    machines: Machines = field(init=False)

    def __post_init__(self) -> None:
        """Find the machines."""
        object.__setattr__(self, "machines", Machines(self.search.cluster))

    @property
    def workload(self) -> Workload:
        """What is asked."""
        return self.search.workload

    @cached_property
    def prefill(self) -> Workers:
        """Finds prefill workers, which hold prompts and one token of their answers."""
        load = self.workload.model_copy(update={"output_tokens": 1})
        return Workers("prefill", replace(self.search, workload=load))

    @cached_property
    def decode(self) -> Workers:
        """Finds decode workers."""
        return Workers("decode", self.search)

    @cached_property
    def prefill_workers(self) -> list[Worker]:
        """Every prefill worker that memory holds."""
        return self.prefill.find(None)

    @cached_property
    def decode_workers(self) -> list[Worker]:
        """Every decode worker that memory holds and that keeps the limit of TPOT."""
        return self.decode.find(self.workload.tpot_limit_s)

    @cached_property
    def matcher(self) -> Matcher:
        """Matches pairs."""
        cluster = self.search.cluster
        return Matcher(self.workload, slowest_path(cluster), cluster.num_gpus)

    @cached_property
    def pairs(self) -> list[Pair]:
        """Pairs that can keep the limit of TTFT, the most promising first."""
        found: list[Pair] = []
        legal: dict[tuple[object, ...], bool] = {}
        for decode in self.decode_workers:
            for prefill in self.prefill_workers:
                forms = prefill.shape.degrees, decode.shape.degrees
                if forms not in legal:
                    splits = prefill.split(1), decode.split(1)
                    legal[forms] = pair_is_legal(self.search.engine, *splits) is None
                if not legal[forms]:
                    continue
                bound = self.matcher.bound(prefill, decode)
                if bound is not None:
                    least = self.matcher.least_gpus(prefill, decode)
                    if least <= self.search.cluster.num_gpus:
                        found.append(Pair(prefill, decode, bound, least))
        # Equal bounds differ by the last bits: the fewest GPUs come first among them.
        most = max((abs(pair.bound) for pair in found), default=1.0)
        found.sort(key=lambda pair: (-round(pair.bound / most, 9), pair.least_gpus))
        return found

    def best(self, without: frozenset[tuple[str, str]] = frozenset()) -> Found:
        """Return the best match.

        Args:
            without: Shapes of both pools, as `Match.shapes` has them, to leave out.
        """
        pairs = self.pairs
        start = perf_counter()
        best: Match | None = None
        for pair in pairs:
            if best is not None:
                slack = _EQUAL * abs(best.value)
                if pair.bound < best.value - 2 * slack:
                    break
                if pair.bound <= best.value + slack and pair.least_gpus > best.num_gpus:
                    continue
            if perf_counter() - start > self.time_limit_s:
                return Found(best, pair.bound, perf_counter() - start, is_proved=False)
            if without and (pair.prefill.shape.label(), pair.decode.shape.label()) in without:
                continue
            divisions = self.machines.divisions(pair.prefill.home, pair.decode.home)
            match = self.matcher.best(pair.prefill, pair.decode, divisions)
            if match is not None and (best is None or self.matcher.better(match, best)):
                best = match
        value = 0.0 if best is None else best.value
        return Found(best, value, perf_counter() - start, is_proved=True)
