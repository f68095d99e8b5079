"""What `/metrics` shows, in Prometheus' text format."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rankwright.executor.requests import Requests

# Seconds. Steps of about 2 from one decode step of a small model to a queue of minutes, so that a
# percentile read from the buckets is off by less than that factor.
_TOKEN_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
_REQUEST_BUCKETS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self, front_end: Requests) -> None:
        """Start at zero; gauges are read from `front_end` when asked for."""
        self._registry = CollectorRegistry()
        self._registry.register(_Replicas(front_end))
        self._first_token = Histogram(
            "rankwright_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=_REQUEST_BUCKETS_S,
            registry=self._registry,
        )
        self._output_token = Histogram(
            "rankwright_time_per_output_token_seconds",
            "Mean time between the tokens of a request after its first.",
            buckets=_TOKEN_BUCKETS_S,
            registry=self._registry,
        )
        self._request = Histogram(
            "rankwright_request_seconds",
            "From the arrival of a request to its last token.",
            buckets=_REQUEST_BUCKETS_S,
            registry=self._registry,
        )
        self._requests = Counter(
            "rankwright_requests",
            "Requests that ended, by why.",
            ["finish_reason"],
            registry=self._registry,
        )
        self._prompt_tokens = Counter(
            "rankwright_prompt_tokens", "Prompt tokens of requests.", registry=self._registry
        )
        self._output_tokens = Counter(
            "rankwright_output_tokens", "Tokens sent to clients.", registry=self._registry
        )

    def watch(self, num_prompt_tokens: int, arrived_s: float) -> "RequestTimer":
        """Return a timer for a request that came at `arrived_s` (`time.monotonic`)."""
        self._prompt_tokens.inc(num_prompt_tokens)
        return RequestTimer(self, arrived_s)

    def text(self) -> bytes:
        """Return all metrics as Prometheus reads them."""
        return generate_latest(self._registry)

    def first_token(self, seconds: float) -> None:
        """Count a time to first token."""
        self._first_token.observe(seconds)

    def tokens(self, num_tokens: int) -> None:
        """Count tokens that came."""
        self._output_tokens.inc(num_tokens)

    def end(self, reason: str, request_s: float, output_token_s: float | None) -> None:
        """Count a request that ended; only one that ran to its end has times that mean something.

        Args:
            reason: Why it ended.
            request_s: From its arrival.
            output_token_s: Mean between tokens; None with fewer than two.
        """
        self._requests.labels(reason).inc()
        if reason in ("stop", "length"):
            self._request.observe(request_s)
            if output_token_s is not None:
                self._output_token.observe(output_token_s)


class RequestTimer:
    """Times one request from its arrival."""

    def __init__(self, metrics: Metrics, arrived_s: float) -> None:
        """Start at `arrived_s`."""
        self._metrics = metrics
        self._arrived_s = arrived_s
        self._first_s: float | None = None
        self._num_tokens = 0

    def tokens(self, num_tokens: int) -> None:
        """Note tokens that came now."""
        if num_tokens and self._first_s is None:
            self._first_s = time.monotonic()
            self._metrics.first_token(self._first_s - self._arrived_s)
        self._num_tokens += num_tokens
        self._metrics.tokens(num_tokens)

    def end(self, reason: str) -> None:
        """Note that the request ended now, because of `reason`."""
        now_s = time.monotonic()
        between_s = None
        if self._first_s is not None and self._num_tokens > 1:
            between_s = (now_s - self._first_s) / (self._num_tokens - 1)
        self._metrics.end(reason, now_s - self._arrived_s, between_s)


class _Replicas(Collector):
    """What the leaders said last."""

    def __init__(self, front_end: Requests) -> None:
        self._front_end = front_end

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily(
            "rankwright_requests_running", "Sequences in the batch.", labels=["replica"]
        )
        waiting = GaugeMetricFamily(
            "rankwright_requests_waiting", "Requests not yet in the batch.", labels=["replica"]
        )
        usage = GaugeMetricFamily(
            "rankwright_kv_cache_usage_ratio", "Share of KV blocks in use.", labels=["replica"]
        )
        steps = CounterMetricFamily(
            "rankwright_engine_steps", "Forward passes of the engine.", labels=["replica"]
        )
        generated = CounterMetricFamily(
            "rankwright_engine_generated_tokens", "Tokens sampled.", labels=["replica"]
        )
        prefilled = CounterMetricFamily(
            "rankwright_engine_prompt_tokens", "Prompt tokens taken in.", labels=["replica"]
        )
        reused = CounterMetricFamily(
            "rankwright_engine_reused_tokens",
            "Tokens found in the prefix cache instead of being computed.",
            labels=["replica"],
        )
        up = GaugeMetricFamily("rankwright_replica_up", "1: it runs.", labels=["replica"])
        for number, replica in sorted(self._front_end.replicas.items()):
            label = [str(number)]
            up.add_metric(label, 0.0 if replica.lost else 1.0)
            if replica.stats is None:
                continue
            stats, blocks = replica.stats, replica.hello.num_kv_blocks
            running.add_metric(label, stats.running)
            waiting.add_metric(label, stats.waiting)
            usage.add_metric(label, 1 - stats.free_kv_blocks / blocks)
            steps.add_metric(label, stats.steps)
            generated.add_metric(label, stats.generated_tokens)
            prefilled.add_metric(label, stats.prompt_tokens)
            reused.add_metric(label, stats.reused_tokens)
        yield from (running, waiting, usage, steps, generated, prefilled, reused, up)
