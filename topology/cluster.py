"""`Cluster`: the machines, as the planner sees them.

Made by a probe, a file, or the shorthand (`topology/shorthand.py`). Holds facts only: what a link
is worth to a collective is in `topology/graph.py`, what a step costs is in `cost_model`.
"""

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from rankwright.topology import graph as links
from rankwright.topology.measurements import Measurements
from rankwright.topology.value import Value

if TYPE_CHECKING:
    import networkx

    from rankwright.topology.rings import Ring

# Of one cluster, and of one memory: catch a slip before anything counts to it.
MAX_NODES = 1_000_000
_MAX_BYTES = 10**15
# What a message over the top of a level of switches takes longer: two switches of 0.2 to 0.3 us
# more, and up to 100 m of fibre at 5 ns a metre. Assumed from data sheets, not measured.
LEVEL_LATENCY_S = 1e-6

# What a file may hold as a speed or a time: YAML knows `.inf` and `.nan`.
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

FabricKind = Literal["infiniband", "roce", "ethernet"]


class Gpu(Value):
    """One accelerator, or one CPU rank of a machine without any (`device == "cpu"`)."""

    index: int = Field(ge=0, description="index on its node, in the driver's PCI order")
    device: str = Field(description="key in topology/devices.py, such as 'h100-sxm'")
    name: str = Field(description="name as the driver prints it")
    memory_bytes: int = Field(gt=0, le=_MAX_BYTES, description="bytes that are free for us")
    total_memory_bytes: int = Field(gt=0, le=_MAX_BYTES, description="bytes the device has")
    compute_capability: tuple[int, int] | None = None
    uuid: str | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None
    nvlink_version: int | None = Field(
        default=None, description="of its active links: 4 on Hopper, 5 on Blackwell"
    )
    numa_node: int | None = None
    num_processes: int = Field(default=0, ge=0, description="other compute processes on it")
    mig: bool = False
    memory_bytes_per_s: Positive | None = Field(
        default=None, description="measured or derived here; None: the device table's"
    )
    flops_per_s: dict[str, Positive] | None = Field(
        default=None, description="dense FLOP/s by dtype; None: the device table's"
    )
    efficiency: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = Field(
        default=None,
        description="shares of peak and launch times that a calibration of this machine gave; "
        "None: the shipped ones",
    )


class Link(Value):
    """A path between two GPUs of one node, undirected."""

    a: int = Field(ge=0)
    b: int = Field(ge=0)
    kind: str = Field(description="token as nvidia-smi prints it: NV18, PIX, PXB, PHB, NODE, SYS")
    bytes_per_s: Positive = Field(description="each way")
    latency_s: Positive


class Nic(Value):
    """A network port of a node."""

    name: str
    bytes_per_s: Positive
    rdma: bool
    numa_node: int | None = None
    link_layer: Literal["infiniband", "ethernet"] | None = Field(
        default=None, description="of an RDMA port: Ethernet means RoCE"
    )
    nearest_gpus: tuple[int, ...] = Field(
        default=(), description="indices of the GPUs that share the most of its PCI path"
    )


class Node(Value):
    """A machine, or `count` machines that are alike."""

    name: str
    count: int = Field(default=1, ge=1, le=MAX_NODES)
    gpus: tuple[Gpu, ...]
    links: tuple[Link, ...] = ()
    nics: tuple[Nic, ...] = ()
    num_cpus: int = Field(default=1, ge=1, le=1_000_000)
    host_memory_bytes: int = Field(default=0, ge=0, le=_MAX_BYTES)
    driver: str | None = None

    @model_validator(mode="after")
    def _links_join_gpus(self) -> "Node":
        known = {gpu.index for gpu in self.gpus}
        if len(known) != len(self.gpus):
            raise ValueError(f"node {self.name!r}: two GPUs have the same index")
        for link in self.links:
            if link.a not in known or link.b not in known or link.a == link.b:
                raise ValueError(
                    f"node {self.name!r}: link {link.a}-{link.b} joins no two of GPUs "
                    f"{sorted(known)}"
                )
        return self


class FabricLevel(Value):
    """Switches above the machines: leaves, pods, what keeps neighbours' messages to themselves."""

    nodes: int = Field(ge=1, le=MAX_NODES, description="neighbouring machines below one of them")
    oversubscription: float = Field(
        default=1.0,
        ge=1,
        allow_inf_nan=False,
        description="bytes/s from below over bytes/s of its way up; 1 where nothing is saved",
    )
    latency_s: Positive = Field(
        default=LEVEL_LATENCY_S, description="that a message over its top takes longer"
    )


class Rack(Value):
    """Neighbouring machines whose GPUs meet in NVLink switches, as the 18 trays of an NVL72."""

    nodes: int = Field(ge=2, le=MAX_NODES)
    kind: str = Field(description="token of the link, such as NV18")
    bytes_per_s: Positive = Field(description="of one GPU to those of other machines, each way")
    latency_s: Positive


class Fabric(Value):
    """The network between nodes."""

    kind: FabricKind
    bytes_per_s: Positive = Field(description="of one port, each way, as it is sold")
    measured_bytes_per_s: Positive | None = Field(
        default=None, description="the same as a measurement has it, which plans go by; None: none"
    )
    ports_per_node: int = Field(ge=1, le=1000)
    latency_s: Positive
    separate_rails: bool = Field(
        default=False,
        description="ports of one position have switches of their own, and a slow way to others",
    )
    sharp: bool = Field(
        default=False, description="its switches sum for the GPUs, and NCCL's plugin is installed"
    )
    levels: tuple[FabricLevel, ...] = Field(
        default=(), description="from the leaves up; above the last, and without any, all meet"
    )

    @model_validator(mode="after")
    def _levels_hold_each_other(self) -> "Fabric":
        for below, above in pairwise(self.levels):
            if above.nodes % below.nodes or above.nodes == below.nodes:
                raise ValueError(
                    f"a level of {above.nodes} machines above one of {below.nodes}: expected a "
                    "multiple of it"
                )
        return self


class Cluster(Value):
    """Nodes and the fabric between them.

    Ranks and plans name a GPU by `(node, gpu)`: `node` counts machines, so a `Node` with
    `count=2` is nodes 0 and 1.
    """

    schema_version: Literal[1] = 1
    nodes: tuple[Node, ...] = Field(min_length=1)
    fabric: Fabric | None = None
    racks: Rack | None = Field(default=None, description="None: NVLink ends at each machine")
    source: str = Field(default="", description="'probe', a file, or the shorthand it came from")
    notes: tuple[str, ...] = Field(default=(), description="what the reader should know")
    measurements: Measurements | None = Field(default=None, description="of `probe --measure`")

    @model_validator(mode="after")
    def _has_gpus_and_a_fabric(self) -> "Cluster":
        if self.num_gpus == 0:
            raise ValueError("the cluster has no GPU and no CPU rank")
        if self.num_nodes > 1 and self.fabric is None:
            raise ValueError(
                f"{self.num_nodes} nodes need a fabric between them; append one to the shorthand, "
                "such as +ib400, +roce200 or +eth100"
            )
        return self

    @property
    def num_nodes(self) -> int:
        """Machines in the cluster."""
        return sum(node.count for node in self.nodes)

    @property
    def num_gpus(self) -> int:
        """GPUs (or CPU ranks) in the cluster."""
        return sum(node.count * len(node.gpus) for node in self.nodes)

    def node(self, index: int) -> Node:
        """Return machine `index` (0-based over all machines).

        Raises:
            IndexError: There are fewer machines.
        """
        for node in self.nodes:
            if index < node.count:
                return node
            index -= node.count
        raise IndexError(f"node {index} of a cluster with {self.num_nodes}")

    @cached_property
    def graph(self) -> "networkx.Graph[links.GpuId]":
        """Every GPU and link, with `bandwidth` (bytes/s each way) and `latency` (s) on the edges.

        See `topology/link_graph.py`. Its size grows with the GPUs: ask `bandwidth` about a group
        instead where that will do.
        """
        from rankwright.topology.link_graph import graph  # plans ask for bandwidths only

        return graph(self)

    @cached_property
    def islands(self) -> tuple[tuple[links.GpuId, ...], ...]:
        """Maximal sets of `(node, gpu)` joined by NVLink or by one PCIe switch; may be unequal."""
        return links.islands(self)

    def bandwidth(self, group: Iterable[links.GpuId]) -> float:
        """Bytes/s each way of a collective over a set of `(node, gpu)`; infinite for one GPU."""
        return links.bandwidth(self, group)

    def latency(self, group: Iterable[links.GpuId]) -> float:
        """Seconds one hop of a small message takes on the slowest link of a set; 0 for one GPU."""
        return links.latency(self, group)

    def best_ring(self, group: Iterable[links.GpuId]) -> "Ring":
        """Ring through a set of `(node, gpu)` with the fastest slowest hop; see `rings.py`."""
        from rankwright.topology.rings import best_ring

        return best_ring(self, group)

    def best_groups(self, size: int) -> tuple[tuple[links.GpuId, ...], ...]:
        """Groups of `size` GPUs that avoid slow links; see `groups.py`."""
        from rankwright.topology.groups import best_groups

        return best_groups(self, size)

    def facts(self) -> dict[str, object]:
        """What must be alike for a plan to fit: devices, memory size, links and fabric.

        Free memory, process counts, names and uuids may change from day to day and are left out.
        """
        return {
            "nodes": [
                {
                    "count": node.count,
                    "gpus": [
                        [gpu.index, gpu.device, round(gpu.total_memory_bytes / 2**30)]
                        for gpu in node.gpus
                    ],
                    "links": sorted([link.a, link.b, link.kind] for link in node.links),
                }
                for node in self.nodes
            ],
            "fabric": None
            if self.fabric is None
            else [self.fabric.kind, self.fabric.bytes_per_s, self.fabric.ports_per_node],
            **self._groups_of_nodes(),
        }

    def _groups_of_nodes(self) -> dict[str, object]:
        """Return racks and levels as facts; nothing where there are none."""
        facts: dict[str, object] = {}
        if self.racks is not None:
            facts["racks"] = [self.racks.nodes, self.racks.kind]
        if self.fabric is not None and self.fabric.levels:
            facts["levels"] = [
                [level.nodes, level.oversubscription] for level in self.fabric.levels
            ]
        return facts

    @property
    def fingerprint(self) -> str:
        """Short hash of `facts`; a plan made for one fingerprint refuses to run on another."""
        text = json.dumps(self.facts(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def describe(self) -> str:
        """One line: `2 x (8 x h100-sxm) + infiniband 8 x 400 Gb/s`."""
        parts: list[str] = []
        for node in self.nodes:
            kinds: dict[str, int] = {}
            for gpu in node.gpus:
                kinds[gpu.device] = kinds.get(gpu.device, 0) + 1
            text = " + ".join(f"{count} x {device}" for device, count in kinds.items())
            parts.append(text if node.count == 1 else f"{node.count} x ({text})")
        line = ", ".join(parts)
        if self.fabric is not None and self.num_nodes > 1:
            gbit = self.fabric.bytes_per_s * 8 / 1e9
            line += f" + {self.fabric.kind} {self.fabric.ports_per_node} x {gbit:.0f} Gb/s"
            for level in self.fabric.levels:
                line += f", {level.nodes} machines a switch"
                if level.oversubscription > 1:
                    line += f" {level.oversubscription:g}:1"
        if self.racks is not None:
            line += f", {self.racks.kind} within each {self.racks.nodes} machines"
        return line
