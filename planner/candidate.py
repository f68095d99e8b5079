"""`Candidate`: a column of the integer program."""

from dataclasses import dataclass
from typing import Literal

from rankwright.cost_model.serving import Serving
from rankwright.planner.pools import Pool
from rankwright.planner.shapes import Shape

Constraint = Literal["memory", "ttft", "tpot", "rate"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One shape at one batch level in one pool, with what it does there.

    Args:
        shape: Its degrees.
        pool: Where its replicas may go.
        batch_size: Slots of one replica.
        chunk_tokens: Tokens of one step.
        stage_layers: Layers of each stage; the same for all replicas.
        serving: Steady state on each placement of the pool.
        memory_bytes: Of the fullest rank, as a share of `budget_bytes` of its GPU.
        budget_bytes: What may be used of the GPU of that rank.
        replicas: Fixed number of replicas, where the figures depend on it; else None.
        broken: Constraints that it breaks.
        percentile: Of TTFT, at which its limit holds.
    """

    shape: Shape
    pool: Pool
    batch_size: int
    chunk_tokens: int
    stage_layers: tuple[int, ...]
    serving: tuple[Serving, ...]
    memory_bytes: int
    budget_bytes: int
    replicas: int | None = None
    broken: tuple[Constraint, ...] = ()
    percentile: float = 50

    @property
    def ttft_s(self) -> float:
        """Time to first token on the slowest placement, at the percentile of the limits."""
        return max(state.ttft_at_s(self.percentile) for state in self.serving)

    @property
    def tpot_s(self) -> float:
        """Time per output token on the slowest placement."""
        return max(state.tpot_s for state in self.serving)

    def request_s(self, output_tokens: int) -> float:
        """Seconds of one request on the slowest placement."""
        return max(state.request_s(output_tokens) for state in self.serving)

    @property
    def max_replicas(self) -> int:
        """Replicas that the pool has room for."""
        return sum(group.count for group in self.pool.replicas)

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells candidates apart, wherever they are placed."""
        return (*self.shape.degrees, self.batch_size, self.chunk_tokens, self.stage_layers)

    def label(self) -> str:
        """Return shape, batch and chunk for messages."""
        return f"{self.shape.label()} at batch {self.batch_size}"
