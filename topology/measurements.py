"""What `probe --measure` timed: copies, collectives, memory, matrix products, the way to others.

`node` counts machines as plans do; GPUs are named by their index on it.

Facts as they came from the clock. What they mean for the cluster is `apply_measurements.py`.
"""

from typing import Literal

from pydantic import Field

from rankwright.topology.value import Value

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]


class PairRate(Value):
    """Two GPUs of a machine, by index, and how fast bytes go between them."""

    node: int = Field(default=0, ge=0)
    a: int = Field(ge=0)
    b: int = Field(ge=0)
    forth_bytes_per_s: float = Field(gt=0, description="of a large copy from a to b, alone")
    back_bytes_per_s: float = Field(gt=0, description="of a large copy from b to a, alone")
    latency_s: float = Field(
        gt=0, description="one way of a small message that goes forth and back"
    )


class CollectiveTime(Value):
    """One operation over a group of GPUs, of one machine or the same ones of several.

    The size is that of the whole buffer on each rank (all_reduce, all_to_all), of the gathered
    result (all_gather, reduce_scatter), or of what each rank hands to the next (send_recv).
    """

    operation: Operation
    gpus: tuple[int, ...] = Field(min_length=1, description="of each of the machines")
    nodes: tuple[int, ...] = Field(default=(0,), min_length=1)
    size_bytes: int = Field(gt=0)
    seconds: float = Field(gt=0)

    @property
    def bus_bytes_per_s(self) -> float:
        """Bytes/s that cross each GPU's link, each way, as nccl-tests counts them."""
        size = len(self.gpus) * len(self.nodes)
        share = {"all_reduce": 2 * (size - 1) / size, "send_recv": 1.0}
        return share.get(self.operation, (size - 1) / size) * self.size_bytes / self.seconds


class MemoryRate(Value):
    """Copies within the memory of one GPU, or of one CPU rank while the others copy too."""

    node: int = Field(default=0, ge=0)
    gpu: int = Field(ge=0)
    bytes_per_s: float = Field(gt=0, description="read plus written")


class GemmRate(Value):
    """A product of an m x k by a k x n matrix on one GPU."""

    node: int = Field(default=0, ge=0)
    gpu: int = Field(ge=0)
    dtype: str
    m: int = Field(gt=0)
    n: int = Field(gt=0)
    k: int = Field(gt=0)
    flops_per_s: float = Field(gt=0)


class NodePairRate(Value):
    """Two machines, and how fast messages go from one to the other."""

    a: int = Field(ge=0)
    b: int = Field(ge=0)
    forth_bytes_per_s: float = Field(
        gt=0, description="of all GPUs of a, each to one of b, at the same time, together"
    )
    back_bytes_per_s: float = Field(gt=0, description="likewise from b to a")
    single_bytes_per_s: float = Field(gt=0, description="of the first GPU of a to that of b")
    latency_s: float = Field(gt=0, description="one way of a small message between those two")


class Measurements(Value):
    """All that was timed, and with what."""

    backend: str = Field(description="'nccl' or 'gloo'")
    software: str = Field(default="", description="versions, such as 'torch 2.11.0, NCCL 2.28.9'")
    seconds: float = Field(default=0.0, ge=0, description="that it took")
    pairs: tuple[PairRate, ...] = ()
    node_pairs: tuple[NodePairRate, ...] = ()
    collectives: tuple[CollectiveTime, ...] = ()
    memory: tuple[MemoryRate, ...] = ()
    gemms: tuple[GemmRate, ...] = ()
    transports: tuple[str, ...] = Field(
        default=(), description="that NCCL said it took, such as 'P2P/CUMEM' or 'NET/IB/GDRDMA'"
    )
    num_net_channels: int = Field(default=0, ge=0, description="of NCCL that go over a network")
    num_gpudirect_channels: int = Field(
        default=0, ge=0, description="of them, without a stop in host memory (GPUDirect RDMA)"
    )
    nccl_reasons: tuple[str, ...] = Field(
        default=(), description="that NCCL gave for not using RDMA, or not GPUDirect"
    )
    notes: tuple[str, ...] = Field(default=(), description="what could not be timed, and why")
