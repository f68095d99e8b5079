"""What readers find of a machine, before it becomes `Gpu` and `Link` values."""

from dataclasses import dataclass

from rankwright.topology.cluster import Nic


@dataclass(frozen=True, slots=True)
class FoundGpu:
    """What a driver says about one GPU; None where it does not say."""

    index: int
    name: str
    total_memory_bytes: int
    free_memory_bytes: int
    uuid: str | None = None
    bus_id: str | None = None
    compute_capability: tuple[int, int] | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    numa_node: int | None = None
    num_processes: int = 0
    mig: bool = False
    cuda_cores: int | None = None
    sm_clock_hz: float | None = None
    memory_clock_hz: float | None = None
    memory_bus_bits: int | None = None
    pcie_width_now: int | None = None
    power_limit_w: float | None = None
    default_power_limit_w: float | None = None
    set_clock_hz: float | None = None  # of the matrix units, by `nvidia-smi -ac`
    default_clock_hz: float | None = None
    nvlink_version: int | None = None


@dataclass(frozen=True, slots=True)
class FoundMachine:
    """GPUs in order, the link kind of each pair (indices, smaller first), driver and ports."""

    gpus: tuple[FoundGpu, ...]
    kinds: dict[tuple[int, int], str]
    driver: str | None
    notes: tuple[str, ...]
    nics: tuple[Nic, ...] = ()
