"""What `rankwright bench` sends, and what came of it."""

from dataclasses import dataclass

from rankwright.cost_model.trace import TraceRow
from rankwright.topology.value import Value


@dataclass(frozen=True, slots=True)
class Load:
    """What to send."""

    input_tokens: int
    output_tokens: int
    num_requests: int
    concurrency: int | None  # None: open loop
    request_rate: float | None
    vocab_size: int
    seed: int = 0
    trace: tuple[TraceRow, ...] = ()  # sent as it is; the lengths above are its means


class Spread(Value):
    """Seconds of many requests."""

    mean: float
    p50: float
    p90: float
    p99: float


class Measured(Value):
    """What the server did under the load."""

    ttft_s: Spread
    tpot_s: Spread | None
    output_tokens_per_s: float
    requests_per_s: float
    num_requests: int
    num_failed: int
    first_failure: str | None
    duration_s: float
