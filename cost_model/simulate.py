"""Runs a workload through one replica, event by event: TTFT and TPOT of every request.

A closed loop of equal requests that starts all at once stays bunched, and a prompt that is not
mixed with decoding stops everyone else: means of a steady state cannot show either. Here requests
arrive, wait for a slot and for room in the KV cache, are prefilled in chunks beside or before the
decoding of others, and finish, and every step takes what the cost model says of its tokens. Steps
in which only decoding happens are taken together up to the next event, so that the cost grows with
the number of requests and not of tokens.

Between the engine and its clients stands one process of the host, which tokenizes requests and
hands every token on, in order. Where the engine makes tokens faster than that they pile up there:
requests then wait for the tokens of others, before their prompt is computed and after.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from rankwright.cost_model.ops import StepTokens

Policy = Literal["mixed", "prefill_first"]


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it arrives; `new_tokens` of its prompt are not in the prefix cache."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """How an engine forms its steps.

    Args:
        policy: `mixed`: prompts share steps with decoding; `prefill_first`: a step is one or the
            other, and prompts go first.
        max_batch_size: Sequences in flight at most.
        chunk_tokens: Tokens of a step at most.
        kv_tokens: Tokens that the KV cache holds.
        split_prompts: Whether a prompt may be cut into chunks; else only whole prompts enter a
            step (one longer than `chunk_tokens` enters alone).
        reserved_share: Share of a request's output that must have room before it enters. An engine
            that evicts requests when memory ends enters them with less than all of it.
        ranks: That have sequences of their own (attention DP), and each an equal part of a step.
        host_token_s: Seconds of the host for a token on its way to the client.
        host_request_s: Seconds of the host for a request on its way to the engine.
    """

    policy: Policy = "mixed"
    max_batch_size: int = 256
    chunk_tokens: int = 8192
    kv_tokens: float = float("inf")
    split_prompts: bool = True
    reserved_share: float = 1.0
    ranks: int = 1
    host_token_s: float = 0.0
    host_request_s: float = 0.0


@dataclass(slots=True)
class _Prompt:
    """A request that has reached the engine and still has prompt tokens to compute."""

    index: int
    request: Request
    left: int
    ready_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one request saw, in seconds."""

    arrival_s: float
    first_token_s: float
    last_token_s: float
    output_tokens: int

    @property
    def ttft_s(self) -> float:
        """Time to first token, waiting included."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean time of a token after the first; 0 where there is only one."""
        if self.output_tokens < 2:
            return 0.0
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)


def simulate(
    step_s: Callable[[StepTokens], float],
    schedule: Schedule,
    requests: Iterable[Request],
    *,
    concurrency: int | None = None,
) -> list[Outcome]:
    """Return what each of `requests` saw, in their order.

    Args:
        step_s: Seconds of a step with these tokens.
        schedule: How steps are formed.
        requests: By rising `arrival_s`.
        concurrency: Closed loop: that many start at once and each end lets the next one in, so that
            `arrival_s` is not looked at; None: they come when they come.
    """
    return _Replica(step_s, schedule, iter(requests), concurrency).run()


class _Replica:
    """The state of one run."""

    def __init__(
        self,
        step_s: Callable[[StepTokens], float],
        schedule: Schedule,
        source: Iterable[Request],
        concurrency: int | None,
    ) -> None:
        self._step_s = step_s
        self._schedule = schedule
        self._source = iter(source)
        self._closed = concurrency is not None
        self._now_s = 0.0
        self._host_s = 0.0  # until when the host has work
        self._queue: deque[_Prompt] = deque()
        self._prompts: list[_Prompt] = []
        # (decode steps at which it ends, index, request)
        self._ends: list[tuple[int, int, Request]] = []
        self._steps = 0  # decode steps since the start
        self._context = 0.0  # tokens that the running sequences attend to, summed
        self._held = 0.0  # KV tokens that are taken or promised
        self._count = 0
        self._arrivals: list[float] = []
        self._firsts: list[float] = []
        self._lasts: list[float] = []
        self._lengths: list[int] = []
        self._next = next(self._source, None)
        self._pending: list[float] = [0.0] * (concurrency or 0)  # arrivals of a closed loop

    def run(self) -> list[Outcome]:
        """Step until nothing is left."""
        while True:
            self._arrivals_until_now()
            self._admit()
            if not self._prompts and not self._ends:
                upcoming = self._upcoming_s()
                if upcoming is None:
                    break
                self._now_s = upcoming
                continue
            self._step()
        return [
            Outcome(*row)
            for row in zip(self._arrivals, self._firsts, self._lasts, self._lengths, strict=True)
        ]

    def _arrive(self, moment_s: float) -> None:
        request = self._next
        if request is None:
            return
        self._next = next(self._source, None)
        self._host_s = max(self._host_s, moment_s) + self._schedule.host_request_s
        new_tokens = max(1, request.new_tokens)
        self._queue.append(_Prompt(self._count, request, new_tokens, self._host_s))
        self._count += 1
        self._arrivals.append(moment_s)
        self._firsts.append(moment_s)
        self._lasts.append(moment_s)
        self._lengths.append(request.output_tokens)

    def _upcoming_s(self) -> float | None:
        """Return when the next request arrives or reaches the engine; None where no more do."""
        arrival_s = self._next_arrival_s()
        if self._queue and self._queue[0].ready_s > self._now_s:
            ready_s = self._queue[0].ready_s
            return ready_s if arrival_s is None else min(arrival_s, ready_s)
        return arrival_s

    def _next_arrival_s(self) -> float | None:
        if self._next is None:
            return None
        if not self._closed:
            return self._next.arrival_s
        return self._pending[0] if self._pending else None

    def _arrivals_until_now(self) -> None:
        while (upcoming := self._next_arrival_s()) is not None and upcoming <= self._now_s:
            if self._closed:
                heapq.heappop(self._pending)
            self._arrive(upcoming)

    def _hand_on(self, steps: int, tokens: int, step_s: float) -> float:
        """Return when the tokens of the last of `steps` equal steps that end now are handed on.

        In the middle of them; those of the steps before, and all that wait, go first.
        """
        one_s = tokens * self._schedule.host_token_s
        first_s = max(self._host_s, self._now_s - (steps - 1) * step_s)
        self._host_s = max(first_s + steps * one_s, self._now_s + one_s)
        return self._host_s - one_s / 2

    def _room(self, request: Request) -> float:
        return request.input_tokens + self._schedule.reserved_share * request.output_tokens

    def _admit(self) -> None:
        schedule = self._schedule
        while self._queue and self._queue[0].ready_s <= self._now_s:
            running = len(self._ends) + len(self._prompts)
            if running >= schedule.max_batch_size:
                return
            need = self._room(self._queue[0].request)
            if running and self._held + need > schedule.kv_tokens:
                return
            self._held += need
            self._prompts.append(self._queue.popleft())

    def _step(self) -> None:
        schedule = self._schedule
        first = schedule.policy == "prefill_first"
        decode = 0 if first and self._prompts else len(self._ends)
        taken, pairs = self._take(schedule.chunk_tokens - decode)
        if not taken:
            self._decode_until_event()
            return
        tokens = sum(count for _, count in taken)
        done = [prompt for prompt, _ in taken if prompt.left == 0]
        step_s = self._step_s(
            StepTokens(
                decode,
                self._context / decode if decode else 0.0,
                tokens,
                pairs / tokens,
                len(done),
                len(taken),
            )
        )
        self._now_s += step_s
        if decode:
            self._advance(1)
        seen_s = self._hand_on(1, decode + len(done), step_s)
        for prompt in done:
            self._firsts[prompt.index] = seen_s
            request = prompt.request
            end = self._steps + request.output_tokens - 1
            heapq.heappush(self._ends, (end, prompt.index, request))
            self._context += request.input_tokens + 1
        if done:
            self._prompts = [prompt for prompt in self._prompts if prompt.left]
        self._finish(seen_s)

    def _take(self, budget: int) -> tuple[list[tuple[_Prompt, int]], float]:
        """Return the prompts of this step with their tokens, and the pairs they attend to."""
        taken: list[tuple[_Prompt, int]] = []
        pairs = 0.0
        # A sequence is on one rank, which has its part of the step and no more.
        most = self._schedule.chunk_tokens // self._schedule.ranks
        for prompt in self._prompts:
            count = min(prompt.left, budget, most)
            if count < prompt.left and not self._schedule.split_prompts:
                if taken:
                    break
                count = prompt.left  # longer than a step may be: alone
            if count <= 0:
                break
            seen = prompt.request.input_tokens - prompt.left
            pairs += count * (seen + (count + 1) / 2)
            prompt.left -= count
            budget -= count
            taken.append((prompt, count))
        return taken, pairs

    def _decode_until_event(self) -> None:
        """Decode until a sequence ends or the next request arrives."""
        running = len(self._ends)
        steps = self._ends[0][0] - self._steps
        seen_s = self._now_s
        if steps > 0:
            mean = self._context / running + (steps - 1) / 2
            seconds = self._step_s(StepTokens(running, mean))
            upcoming = self._upcoming_s()
            if upcoming is not None and running < self._schedule.max_batch_size:
                until = upcoming - self._now_s
                if until < steps * seconds:
                    steps = max(1, min(steps, -int(-until // seconds)))
                    seconds = self._step_s(
                        StepTokens(running, self._context / running + (steps - 1) / 2)
                    )
            self._now_s += steps * seconds
            self._advance(steps)
            seen_s = self._hand_on(steps, running, seconds)
        self._finish(seen_s)

    def _advance(self, steps: int) -> None:
        self._steps += steps
        self._context += steps * len(self._ends)

    def _finish(self, seen_s: float) -> None:
        while self._ends and self._ends[0][0] <= self._steps:
            _, index, request = heapq.heappop(self._ends)
            self._lasts[index] = seen_s
            self._context -= request.input_tokens + request.output_tokens
            self._held -= self._room(request)
            if self._closed:
                heapq.heappush(self._pending, seen_s)


def closed_loop(
    input_tokens: int, output_tokens: int, new_tokens: int, count: int
) -> Iterable[Request]:
    """Yield `count` equal requests."""
    request = Request(0.0, input_tokens, output_tokens, new_tokens)
    return islice(iter(lambda: request, None), count)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that `percent` % lie at or below, between neighbours in proportion."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
