"""`Prediction`: what a split will do, in seconds and bytes, with its parts."""

from typing import Literal

from pydantic import Field

from rankwright.topology.value import Value

Bound = Literal["compute", "memory", "link", "launch"]


class Estimate(Value):
    """A figure with the interval it should fall in (about 80 % of measurements)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Value and interval, as printed."""
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


class Part(Value):
    """One term of a step's time, summed over the layers of the slowest stage."""

    name: str
    seconds: float = Field(ge=0)
    flops: float = Field(default=0, ge=0)
    bytes: float = Field(default=0, ge=0, description="moved through device memory or the link")
    bound: Bound
    source: str = Field(description="'measured here', 'measured table' or 'analytic'")


class MemoryPart(Value):
    """One term of the bytes of the fullest rank."""

    name: str
    bytes: int = Field(ge=0)


class Prediction(Value):
    """Predicted speed and memory of one split under one workload."""

    ttft_s: Estimate
    tpot_s: Estimate
    output_tokens_per_s: Estimate = Field(description="over all replicas")
    memory_bytes_per_gpu: Estimate = Field(description="of the fullest rank")
    decode_parts: tuple[Part, ...] = Field(default=(), description="one decode step")
    prefill_parts: tuple[Part, ...] = Field(
        default=(),
        description="the steps that prefill one prompt, with the tokens of others in them",
    )
    memory_parts: tuple[MemoryPart, ...] = ()
    batch_size: int = Field(ge=1, description="sequences a replica decodes at once, steady state")
    engine: str = "rankwright"
