"""A client that keeps an OpenAI-compatible server busy, and times what comes back.

Closed loop (`concurrency` requests always in flight), open loop (Poisson arrivals at a rate), or
the requests of a trace at their times. Prompts are random token ids, so that no prefix repeats but
what a trace says was cached, and every answer has its full length.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from rankwright.cli.errors import RunError
from rankwright.cli.load_values import Load, Measured, Spread


@dataclass(frozen=True, slots=True)
class Timing:
    """One answer: seconds from the request to its first and last token."""

    first_s: float
    last_s: float
    num_tokens: int


def measure(url: str, load: Load) -> Measured:
    """Return what the server at `url` did under `load`.

    Raises:
        RunError: The server cannot be reached, or no request succeeded.
    """
    return asyncio.run(_measure(url.rstrip("/"), load))


async def _measure(url: str, load: Load) -> Measured:
    # A request may wait long in the server's queue; only connecting is bounded.
    timeout = httpx.Timeout(None, connect=10)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits) as client:
        try:
            answer = await client.get("/v1/models")
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise RunError(f"no server at {url}: {error}") from None
        model = answer.json()["data"][0]["id"]
        choose = random.Random(load.seed)
        started_s = time.perf_counter()
        if load.trace:
            outcomes = await _send_trace(client, model, load, choose)
        else:
            prompts = [
                _random_tokens(choose, load, load.input_tokens) for _ in range(load.num_requests)
            ]
            started_s = time.perf_counter()
            outcomes = await _send(client, model, prompts, load, choose)
        duration_s = time.perf_counter() - started_s
    timings = [outcome for outcome in outcomes if isinstance(outcome, Timing)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if not timings:
        raise RunError(f"no request to {url} succeeded; the first failed with {failures[0]}")
    tpots_s = [
        (timing.last_s - timing.first_s) / (timing.num_tokens - 1)
        for timing in timings
        if timing.num_tokens > 1
    ]
    return Measured(
        ttft_s=spread([timing.first_s for timing in timings]),
        tpot_s=spread(tpots_s) if tpots_s else None,
        output_tokens_per_s=sum(timing.num_tokens for timing in timings) / duration_s,
        requests_per_s=len(timings) / duration_s,
        num_requests=len(timings),
        num_failed=len(failures),
        first_failure=failures[0] if failures else None,
        duration_s=duration_s,
    )


async def _send(
    client: httpx.AsyncClient,
    model: str,
    prompts: list[list[int]],
    load: Load,
    choose: random.Random,
) -> list[Timing | str]:
    if load.concurrency is not None:
        slots = asyncio.Semaphore(load.concurrency)

        async def in_turn(prompt: list[int]) -> Timing | str:
            async with slots:
                return await _request(client, model, prompt, load.output_tokens)

        return await asyncio.gather(*(in_turn(prompt) for prompt in prompts))
    assert load.request_rate is not None
    tasks: list[asyncio.Task[Timing | str]] = []
    for prompt in prompts:
        request = _request(client, model, prompt, load.output_tokens)
        tasks.append(asyncio.create_task(request))
        await asyncio.sleep(choose.expovariate(load.request_rate))
    return await asyncio.gather(*tasks)


async def _send_trace(
    client: httpx.AsyncClient, model: str, load: Load, choose: random.Random
) -> list[Timing | str]:
    """Send each request of the trace when its time has come, answered or not."""
    loop = asyncio.get_running_loop()
    start_s = loop.time() - load.trace[0].arrival_s
    tasks: list[asyncio.Task[Timing | str]] = []
    # A prompt is drawn just before its time: all of a long trace would not fit in memory.
    for row, prompt in zip(load.trace, trace_prompts(load, choose), strict=True):
        await asyncio.sleep(max(0.0, start_s + row.arrival_s - loop.time()))
        request = _request(client, model, prompt, row.output_tokens)
        tasks.append(asyncio.create_task(request))
    return await asyncio.gather(*tasks)


def trace_prompts(load: Load, choose: random.Random) -> Iterator[list[int]]:
    """Yield the prompt of each request of the trace.

    What the trace says was cached begins alike in all of them; the first that has it computes it.
    """
    common = _random_tokens(choose, load, max(row.cached_tokens for row in load.trace))
    for row in load.trace:
        own = _random_tokens(choose, load, row.input_tokens - row.cached_tokens)
        yield common[: row.cached_tokens] + own


def _random_tokens(choose: random.Random, load: Load, count: int) -> list[int]:
    low = min(100, load.vocab_size // 2)  # past the special tokens of most vocabularies
    return choose.choices(range(low, load.vocab_size), k=count)


async def _request(
    client: httpx.AsyncClient, model: str, prompt: list[int], output_tokens: int
) -> Timing | str:
    """Return the timing of one request, or why it failed."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started_s = time.perf_counter()
    first_s = last_s = 0.0
    num_tokens = 0
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return f"HTTP {response.status_code}: {text[:200]}"
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    return str(chunk["error"].get("message", chunk["error"]))
                if chunk["choices"]:
                    last_s = time.perf_counter() - started_s
                    first_s = first_s or last_s
                if chunk.get("usage"):
                    num_tokens = chunk["usage"]["completion_tokens"]
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"
    if not num_tokens:
        return "the stream ended without its token count"
    return Timing(first_s=first_s, last_s=last_s, num_tokens=num_tokens)


def spread(values: list[float]) -> Spread:
    """Return mean and percentiles (nearest rank) of `values`.

    >>> spread([1.0, 2.0, 3.0, 4.0]).p50
    2.0
    """
    ordered = sorted(values)

    def at(percentile: int) -> float:
        return ordered[max(0, -(-percentile * len(ordered) // 100) - 1)]

    return Spread(mean=statistics.fmean(ordered), p50=at(50), p90=at(90), p99=at(99))
