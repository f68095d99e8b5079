"""What `probe --measure` timed: copies, collectives, memory and matrix products of one machine.

Facts as they came from the clock. What they mean for the cluster is `apply_measurements.py`.
"""

from typing import Literal

from pydantic import Field

from rankwright.topology.value import Value

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]


class PairRate(Value):
    """Two GPUs of the machine, by index, and how fast bytes go between them."""

    a: int = Field(ge=0)
    b: int = Field(ge=0)
    forth_bytes_per_s: float = Field(gt=0, description="of a large copy from a to b, alone")
    back_bytes_per_s: float = Field(gt=0, description="of a large copy from b to a, alone")
    latency_s: float = Field(
        gt=0, description="one way of a small message that goes forth and back"
    )


class CollectiveTime(Value):
    """One operation over a group of GPUs.

    The size is that of the whole buffer on each rank (all_reduce, all_to_all), of the gathered
    result (all_gather, reduce_scatter), or of what each rank hands to the next (send_recv).
    """

    operation: Operation
    gpus: tuple[int, ...] = Field(min_length=2)
    size_bytes: int = Field(gt=0)
    seconds: float = Field(gt=0)

    @property
    def bus_bytes_per_s(self) -> float:
        """Bytes/s that cross each GPU's link, each way, as nccl-tests counts them."""
        size = len(self.gpus)
        share = {"all_reduce": 2 * (size - 1) / size, "send_recv": 1.0}
        return share.get(self.operation, (size - 1) / size) * self.size_bytes / self.seconds


class MemoryRate(Value):
    """Copies within the memory of one GPU, or of one CPU rank while the others copy too."""

    gpu: int = Field(ge=0)
    bytes_per_s: float = Field(gt=0, description="read plus written")


class GemmRate(Value):
    """A product of an m x k by a k x n matrix on one GPU."""

    gpu: int = Field(ge=0)
    dtype: str
    m: int = Field(gt=0)
    n: int = Field(gt=0)
    k: int = Field(gt=0)
    flops_per_s: float = Field(gt=0)


class Measurements(Value):
    """All that was timed on one machine, and with what."""

    backend: str = Field(description="'nccl' or 'gloo'")
    software: str = Field(default="", description="versions, such as 'torch 2.11.0, NCCL 2.28.9'")
    seconds: float = Field(default=0.0, ge=0, description="that it took")
    pairs: tuple[PairRate, ...] = ()
    collectives: tuple[CollectiveTime, ...] = ()
    memory: tuple[MemoryRate, ...] = ()
    gemms: tuple[GemmRate, ...] = ()
    transports: tuple[str, ...] = Field(
        default=(), description="that NCCL said it took, such as 'P2P/CUMEM' or 'NET/IB/GDRDMA'"
    )
    notes: tuple[str, ...] = Field(default=(), description="what could not be timed, and why")
