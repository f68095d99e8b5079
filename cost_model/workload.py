"""`Workload`: what the model will be asked to do, and how fast it must be."""

from typing import Literal

from pydantic import Field

from rankwright.topology.value import Value

Objective = Literal["throughput", "latency", "cost", "energy"]

# Of one prompt or answer: beyond any model's context, so that it must be a slip.
MOST_TOKENS = 100_000_000
MOST_REQUESTS = 1_000_000_000  # in flight; solvers take numbers from 1e20 on for infinite


class Workload(Value):
    """Requests of one kind with their limits. Tokens and seconds."""

    input_tokens: int = Field(default=1024, ge=1, le=MOST_TOKENS, description="prompt length")
    output_tokens: int = Field(
        default=128, ge=1, le=MOST_TOKENS, description="tokens generated a request"
    )
    concurrency: int | None = Field(
        default=None,
        ge=1,
        le=MOST_REQUESTS,
        description="requests in flight at most; None: as many as are best and fit",
    )
    request_rate: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="requests/s"
    )
    length_spread: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="lengths lie evenly within this share of both means, to both sides; None: as "
        "the engine's published runs had it, else all equal",
    )
    shared_prefix: float = Field(
        default=0.0, ge=0, le=1, description="share of a prompt that is already cached"
    )
    ttft_limit_s: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="time to first token"
    )
    tpot_limit_s: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="time per output token"
    )
    percentile: float = Field(default=50, gt=0, lt=100, description="at which the limits hold")
    objective: Objective = "throughput"
