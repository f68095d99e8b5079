"""TTFT, TPOT and throughput of one replica from a simulated run, at any percentile.

The planner asks for the last few candidates, `predict` for engines whose scheduling is known. Runs
are reproducible: lengths and arrivals come from a generator with a fixed seed.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.serving import micro_batches_of
from rankwright.cost_model.simulate import Outcome, Request, Schedule, percentile, simulate
from rankwright.cost_model.step import Pipeline
from rankwright.cost_model.trace import TraceRow
from rankwright.cost_model.workload import Workload


@dataclass(frozen=True)
class Percentiles:
    """What the requests of one run saw."""

    outcomes: Sequence[Outcome]

    def ttft_s(self, percent: float | None = None) -> float:
        """Return the TTFT that `percent` % of requests stay below; None: the mean."""
        return _reduce([one.ttft_s for one in self.outcomes], percent)

    def tpot_s(self, percent: float | None = None) -> float:
        """Return the TPOT that `percent` % of requests stay below; None: the mean."""
        return _reduce([one.tpot_s for one in self.outcomes if one.output_tokens > 1], percent)

    @cached_property
    def requests_per_s(self) -> float:
        """Requests finished a second, from the first arrival to the last token."""
        start_s = min(one.arrival_s for one in self.outcomes)
        return len(self.outcomes) / (max(one.last_token_s for one in self.outcomes) - start_s)

    @cached_property
    def output_tokens_per_s(self) -> float:
        """Tokens generated a second, from the first arrival to the last token."""
        mean = sum(one.output_tokens for one in self.outcomes) / len(self.outcomes)
        return self.requests_per_s * mean


def simulate_pipeline(
    pipeline: Pipeline,
    workload: Workload,
    schedule: Schedule,
    *,
    requests: int,
    length_spread: float = 0.0,
    request_s: float = 0.0,
) -> Percentiles:
    """Return what `requests` requests see on one replica.

    With a request rate they arrive at random times (that rate is taken to be this replica's);
    without one, as many as the workload's concurrency says are always in flight, those past
    `schedule.max_batch_size` waiting; where it says nothing, `schedule.max_batch_size`.

    Args:
        pipeline: The replica.
        workload: Lengths, shared prefix, rate or concurrency, of this replica alone.
        schedule: How its engine forms steps.
        requests: How many.
        length_spread: Lengths lie evenly within this share of the workload's, to both sides.
        request_s: Added to the TTFT of each, for what happens outside of steps.
    """
    concurrency = None
    if workload.request_rate is None:
        concurrency = workload.concurrency or schedule.max_batch_size
    outcomes = simulate(
        _timer(pipeline, schedule),
        schedule,
        _requests(workload, requests, length_spread),
        concurrency=concurrency,
    )
    return Percentiles(_later(outcomes, request_s))


def simulate_trace(
    pipeline: Pipeline,
    trace: Sequence[TraceRow],
    schedule: Schedule,
    *,
    request_s: float = 0.0,
) -> Percentiles:
    """Return what the requests of a trace see on one replica, in its order.

    Args:
        pipeline: The replica.
        trace: By arrival, as `read_trace` gives it; of several replicas, this one's share.
        schedule: How its engine forms steps.
        request_s: Added to the TTFT of each, for what happens outside of steps.
    """
    requests = [
        Request(
            row.arrival_s,
            row.input_tokens,
            row.output_tokens,
            max(1, row.input_tokens - row.cached_tokens),
        )
        for row in trace
    ]
    outcomes = simulate(_timer(pipeline, schedule), schedule, requests)
    return Percentiles(_later(outcomes, request_s))


def _timer(pipeline: Pipeline, schedule: Schedule) -> Callable[[StepTokens], float]:
    """Return what times a round of the replica that computes these tokens."""
    micro_batches = micro_batches_of(len(pipeline.stages), schedule.max_batch_size)
    if micro_batches == 1:
        return pipeline.round_s

    def round_s(tokens: StepTokens) -> float:
        # Fewer sequences than stages cannot be in as many batches: one alone passes all stages.
        sequences = max(1, int(tokens.decode))
        parts = micro_batches if tokens.prefill else min(micro_batches, sequences)
        part = StepTokens(
            tokens.decode / parts,
            tokens.decode_context,
            tokens.prefill / parts,
            tokens.prefill_context,
            tokens.prompts / parts,
            tokens.sequences / parts,
        )
        return pipeline.round_s(part, parts)

    return round_s


def _later(outcomes: Sequence[Outcome], seconds: float) -> Sequence[Outcome]:
    """Return the outcomes with every token `seconds` later."""
    if not seconds:
        return outcomes
    return [
        replace(
            one,
            first_token_s=one.first_token_s + seconds,
            last_token_s=one.last_token_s + seconds,
        )
        for one in outcomes
    ]


def _requests(workload: Workload, count: int, spread: float) -> Iterator[Request]:
    source = random.Random(count)
    moment_s = 0.0
    for _ in range(count):
        if workload.request_rate is not None:
            moment_s += source.expovariate(workload.request_rate)
        inputs, outputs = workload.input_tokens, workload.output_tokens
        if spread:
            inputs = max(1, round(inputs * source.uniform(1 - spread, 1 + spread)))
            outputs = max(1, round(outputs * source.uniform(1 - spread, 1 + spread)))
        new = max(1, round(inputs * (1 - workload.shared_prefix)))
        yield Request(moment_s, inputs, outputs, new)


def _reduce(values: Sequence[float], percent: float | None) -> float:
    if not values:
        return 0.0
    return sum(values) / len(values) if percent is None else percentile(values, percent)
