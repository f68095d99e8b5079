"""Matches a prefill worker with a decode worker: how many of each, and what requests then see.

    x, y      workers of prefill and of decode
    a, b      requests/s of one of each, the prefill worker at the most load that its queue bears
    served    min(x * a, y * b), and no more than arrive or than are in flight

A prompt waits for a prefill worker (M/D/x), is computed, and its cache travels: that is TTFT. The
load is kept below `MOST_LOAD`, and lower where the limit of TTFT asks for it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil, floor, inf, log

from rankwright.cost_model.collectives import Group
from rankwright.cost_model.pools import MOST_LOAD, RankCache, path_seconds, queue_wait_s, sent_bytes
from rankwright.cost_model.workload import Workload
from rankwright.planner.divide import Division
from rankwright.planner.goals import burn_per_s
from rankwright.planner.workers import Worker

_STEPS = 60  # of a bisection: all bits of a float
_ROUNDING = 1e-9
# Numbers of prefill workers that are all tried where more is not simply better.
_MOST_COUNTED = 256


@dataclass(frozen=True, slots=True)
class Match:
    """Workers of both pools, and what they do together.

    Args:
        prefill: Each of `num_prefill` workers.
        decode: Each of `num_decode` workers.
        num_prefill: Workers.
        num_decode: Workers.
        served: Requests/s.
        wait_s: Mean wait for a prefill worker.
        transfer_s: Of one prompt's cache.
        value: Of the objective.
    """

    prefill: Worker
    decode: Worker
    num_prefill: int
    num_decode: int
    served: float
    wait_s: float
    transfer_s: float
    value: float

    @property
    def num_gpus(self) -> int:
        """GPUs of both pools."""
        return self.num_prefill * self.prefill.num_gpus + self.num_decode * self.decode.num_gpus

    @property
    def ttft_s(self) -> float:
        """Mean time to first token."""
        return self.wait_s + self.prefill.latency_s + self.transfer_s

    @property
    def tpot_s(self) -> float:
        """Time per output token."""
        return self.decode.latency_s

    def request_s(self, output_tokens: int) -> float:
        """Seconds of one request."""
        return self.ttft_s + (output_tokens - 1) * self.tpot_s

    @property
    def shapes(self) -> tuple[str, str]:
        """Labels of both shapes."""
        return self.prefill.shape.label(), self.decode.shape.label()

    def label(self) -> str:
        """Return both pools in words: `3 x TP1 for prefill, 1 x TP4 at batch 64 for decode`."""
        return (
            f"{self.num_prefill} x {self.prefill.label()} for prefill, "
            f"{self.num_decode} x {self.decode.label()} for decode"
        )


class Matcher:
    """Matches workers under one workload."""

    def __init__(self, workload: Workload, path: Group | None, num_gpus: int) -> None:
        """Prepare.

        Args:
            workload: Lengths, load, limits and objective.
            path: The slowest between two GPUs, as `slowest_path` returns it.
            num_gpus: Of the cluster.
        """
        self._load = workload
        self._path = path
        self._num_gpus = num_gpus
        # The wait that a percentile stays below, in mean waits; as `Serving.ttft_at_s`.
        self._wait_factor = max(1.0, -log(1 - workload.percentile / 100))
        self._transfers: dict[tuple[RankCache, RankCache], float] = {}
        self._in_flight = workload.concurrency
        if workload.objective == "latency" and self._in_flight is None:
            self._in_flight = None if workload.request_rate is not None else 1

    def transfer_s(self, prefill: Worker, decode: Worker) -> float:
        """Return the seconds in which a prompt's cache reaches its decode worker."""
        key = prefill.cache, decode.cache
        if key not in self._transfers:
            num_bytes = sent_bytes(*key) * self._load.input_tokens
            self._transfers[key] = path_seconds(self._path, num_bytes)
        return self._transfers[key]

    def bound(self, prefill: Worker, decode: Worker) -> float | None:
        """Return what no numbers of these workers can beat; more is better. None: they break TTFT.

        As if GPUs could be shared out in any parts, and no prompt ever waited.
        """
        load = self._load
        transfer_s = self.transfer_s(prefill, decode)
        least_s = prefill.latency_s + transfer_s
        if load.ttft_limit_s is not None and least_s > load.ttft_limit_s:
            return None
        request_s = self._fixed_s(prefill, decode)
        if load.objective == "latency":
            return -request_s
        first_s = self._interval_s(prefill, decode) / MOST_LOAD
        second_s = decode.interval_s
        if load.objective == "throughput":
            spent = prefill.num_gpus * first_s + decode.num_gpus * second_s
            served = self._capped(self._num_gpus / spent, request_s)
            return served * load.output_tokens
        spent = self._burn(prefill) * first_s + self._burn(decode) * second_s
        return load.output_tokens / spent

    def least_gpus(self, prefill: Worker, decode: Worker) -> int:
        """Return the GPUs without which these workers cannot serve what arrives."""
        rate = self._load.request_rate
        if rate is None:
            return prefill.num_gpus + decode.num_gpus
        first_s = self._interval_s(prefill, decode) / MOST_LOAD
        x = max(1, ceil(rate * first_s * (1 - _ROUNDING)))
        y = max(1, ceil(rate * decode.interval_s * (1 - _ROUNDING)))
        return x * prefill.num_gpus + y * decode.num_gpus

    def best(self, prefill: Worker, decode: Worker, divisions: list[Division]) -> Match | None:
        """Return the best numbers of these workers in any of `divisions`; None: limits or rate."""
        found: Match | None = None
        for x, y in self._counts(prefill, decode, divisions):
            match = self._match(prefill, decode, x, y)
            if match is not None and (found is None or self.better(match, found)):
                found = match
        return found

    def better(self, one: Match, other: Match) -> bool:
        """Return whether `one` is better: value, then fewer GPUs, then shorter requests."""
        slack = _ROUNDING * abs(other.value)
        if abs(one.value - other.value) > slack:
            return one.value > other.value
        tokens = self._load.output_tokens
        mine = one.num_gpus, one.request_s(tokens)
        return mine < (other.num_gpus, other.request_s(tokens))

    def _counts(
        self, prefill: Worker, decode: Worker, divisions: list[Division]
    ) -> Iterator[tuple[int, int]]:
        """Yield numbers of workers among which the best ones are."""
        if not divisions:
            return
        most = divisions[-1].prefill

        def room(x: int) -> int:
            """Most decode workers beside `x` prefill workers."""
            return next(one.decode for one in divisions if one.prefill >= x)

        rate = self._prefill_rate(prefill, decode)
        fixed_s = self._fixed_s(prefill, decode)
        if most > _MOST_COUNTED and self._load.objective == "throughput":
            # What feeds all decode workers there is room for, and what is enough for the load.
            asked = self._capped(inf, fixed_s)
            feeding = _first(most, lambda x: rate(x) * decode.interval_s >= room(x))
            enough = _first(most, lambda x: rate(x) >= asked)
            numbers = sorted({max(1, feeding - 1), feeding, enough})
        else:
            numbers = list(range(1, min(most, _MOST_COUNTED) + 1))
        for x in numbers:
            flows = [rate(x)]
            if self._load.request_rate is not None:
                flows.append(self._load.request_rate)
            if self._in_flight is not None:
                interval_s = self._interval_s(prefill, decode)
                flows.append(_rate_of(self._in_flight, fixed_s, x, interval_s))
            wanted = {room(x)}
            for flow in flows:
                fed = flow * decode.interval_s
                wanted |= {floor(fed * (1 + _ROUNDING)), ceil(fed * (1 - _ROUNDING))}
            for y in wanted:
                if 1 <= y <= room(x):
                    yield x, y

    def _interval_s(self, prefill: Worker, decode: Worker) -> float:
        """Return the seconds between two prompts of a worker, which sends one cache at a time."""
        return max(prefill.interval_s, self.transfer_s(prefill, decode))

    def _fixed_s(self, prefill: Worker, decode: Worker) -> float:
        """Return the seconds of a request that does not wait."""
        least_s = prefill.latency_s + self.transfer_s(prefill, decode)
        return least_s + (self._load.output_tokens - 1) * decode.latency_s

    def _prefill_rate(self, prefill: Worker, decode: Worker) -> Callable[[int], float]:
        """Return the requests/s of so many prefill workers at the load that their queue bears."""
        interval_s = self._interval_s(prefill, decode)
        slack_s = self._slack_s(prefill.latency_s + self.transfer_s(prefill, decode))
        share = None if slack_s is None else slack_s / interval_s
        return lambda x: x * _most_load(x, share) / interval_s

    def _match(self, prefill: Worker, decode: Worker, x: int, y: int) -> Match | None:
        load = self._load
        transfer_s = self.transfer_s(prefill, decode)
        interval_s = self._interval_s(prefill, decode)
        most = min(self._prefill_rate(prefill, decode)(x), y / decode.interval_s)
        if most <= 0 or (load.request_rate or 0.0) > most * (1 + _ROUNDING):
            return None
        served = most if load.request_rate is None else min(most, load.request_rate)
        if self._in_flight is not None:
            fixed_s = self._fixed_s(prefill, decode)
            alone = _rate_of(self._in_flight, fixed_s, x, interval_s)
            if load.objective == "latency" and alone > served * (1 + _ROUNDING):
                return None  # they would queue, longer than is counted here
            served = min(served, alone)
        wait_s = 0.0
        if self._in_flight != 1:
            wait_s = queue_wait_s(x, served * interval_s / x, interval_s)
        match = Match(prefill, decode, x, y, served, wait_s, transfer_s, 0.0)
        return Match(prefill, decode, x, y, served, wait_s, transfer_s, self._value(match))

    def _value(self, match: Match) -> float:
        load = self._load
        if load.objective == "latency":
            return -match.request_s(load.output_tokens)
        tokens_per_s = match.served * load.output_tokens
        if load.objective == "throughput":
            return tokens_per_s
        burn = match.num_prefill * self._burn(match.prefill)
        return tokens_per_s / (burn + match.num_decode * self._burn(match.decode))

    def _burn(self, worker: Worker) -> float:
        return worker.num_gpus * burn_per_s(worker.home.kind.gpu, self._load.objective)

    def _capped(self, served: float, request_s: float) -> float:
        """Return the requests/s that are really finished: what arrives, or what is in flight."""
        if self._load.request_rate is not None:
            served = min(served, self._load.request_rate)
        if self._in_flight is not None:
            served = min(served, self._in_flight / request_s)
        return served

    def _slack_s(self, least_s: float) -> float | None:
        """Return how long a prompt may wait on average; None: there is no limit."""
        if self._load.ttft_limit_s is None:
            return None
        return max(0.0, self._load.ttft_limit_s - least_s) / self._wait_factor


@cache
def _most_load(x: int, share: float | None) -> float:
    """Return the most load at which `x` workers' mean wait is `share` of an interval at most."""
    if share is None or queue_wait_s(x, MOST_LOAD, 1.0) <= share:
        return MOST_LOAD
    low, high = 0.0, MOST_LOAD
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if queue_wait_s(x, middle, 1.0) <= share:
            low = middle
        else:
            high = middle
    return low


def _rate_of(in_flight: int, fixed_s: float, x: int, interval_s: float) -> float:
    """Return the requests/s at which `in_flight` requests are under way (Little's law)."""
    if in_flight == 1:
        return 1 / fixed_s  # never meets another
    low, high = 0.0, min(in_flight / fixed_s, x / interval_s)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        wait_s = queue_wait_s(x, middle * interval_s / x, interval_s)
        if middle * (fixed_s + wait_s) <= in_flight:
            low = middle
        else:
            high = middle
    return low


def _first(most: int, holds: Callable[[int], bool]) -> int:
    """Return the first of 1 to `most` from which on `holds` holds; `most` where it never does."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
