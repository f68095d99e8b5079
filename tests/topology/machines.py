"""Machines that people have, wired as their documentation says; shared by tests."""

from collections.abc import Callable, Mapping
from itertools import combinations

from rankwright.topology.cluster import Cluster, Fabric, Gpu, Link, Nic, Node
from rankwright.topology.link_kinds import link_bytes_per_s, link_latency_s

Pair = tuple[int, int]

GIB = 2**30
GBIT_PER_S = 1e9 / 8


def make_node(
    device: str,
    numa_of: Mapping[int, int],
    kind_of: Callable[[int, int], str | None],
    *,
    name: str = "node0",
    memory_gib: int = 80,
    compute_capability: tuple[int, int] = (8, 0),
    pcie_generation: int = 4,
    nics: tuple[Nic, ...] = (),
    count: int = 1,
) -> Node:
    """A node with GPUs on the sockets of `numa_of`; `kind_of(a, b)` is their link, `None`: none."""
    gpus = tuple(
        Gpu(
            index=index,
            device=device,
            name=device,
            memory_bytes=memory_gib * GIB,
            total_memory_bytes=memory_gib * GIB,
            compute_capability=compute_capability,
            pcie_generation=pcie_generation,
            pcie_width=16,
            numa_node=numa,
        )
        for index, numa in numa_of.items()
    )
    links = tuple(
        Link(
            a=a.index,
            b=b.index,
            kind=kind,
            bytes_per_s=link_bytes_per_s(kind, a, b),
            latency_s=link_latency_s(kind),
        )
        for a, b in combinations(gpus, 2)
        if (kind := kind_of(a.index, b.index)) is not None
    )
    return Node(name=name, count=count, gpus=gpus, links=links, nics=nics)


def ports(count: int, gbit: float, numa_of_port: Callable[[int], int]) -> tuple[Nic, ...]:
    return tuple(
        Nic(name=f"mlx5_{at}", bytes_per_s=gbit * GBIT_PER_S, rdma=True, numa_node=numa_of_port(at))
        for at in range(count)
    )


# "NVIDIA DGX-1 With Tesla V100 System Architecture" (WP-08437-002), figure 4: a cube whose edges
# and two diagonals are NVLinks; the eight that the ring 0-3-2-1-5-6-7-4 uses are doubled. Printed
# by `nvidia-smi topo -m` in the same way on DGX-1 (rapidsai/ucx-py, docs/source/ucx-debug.rst) and
# p3.16xlarge. Four 100 Gb/s ports, two a socket.
DGX1_DOUBLE = {(0, 3), (2, 3), (1, 2), (1, 5), (5, 6), (6, 7), (4, 7), (0, 4)}
DGX1_SINGLE = {(0, 1), (0, 2), (1, 3), (2, 6), (3, 7), (4, 5), (4, 6), (5, 7)}


def dgx1_v100() -> Node:
    def kind(a: int, b: int) -> str:
        return "NV2" if (a, b) in DGX1_DOUBLE else "NV1" if (a, b) in DGX1_SINGLE else "SYS"

    return make_node(
        "v100-sxm2-32gb",
        {gpu: gpu // 4 for gpu in range(8)},
        kind,
        name="dgx-1",
        memory_gib=32,
        compute_capability=(7, 0),
        pcie_generation=3,
        nics=ports(4, 100, lambda port: port // 2),
    )


# "NVIDIA DGX-2/DGX-2H System User Guide": sixteen V100 on two boards of six NVSwitches, every pair
# at the rate of all six links; eight 100 Gb/s ports.
def dgx2() -> Node:
    return make_node(
        "v100-sxm3-32gb",
        {gpu: gpu // 8 for gpu in range(16)},
        lambda a, b: "NV6",
        name="dgx-2",
        memory_gib=32,
        compute_capability=(7, 0),
        pcie_generation=3,
        nics=ports(8, 100, lambda port: port // 4),
    )


# "NVIDIA DGX A100 User Guide", "Hardware overview" and table "Network ports": six NVSwitches
# and twelve links a GPU; eight 200 Gb/s ports. Its two EPYC run as eight NUMA domains, of which the
# pairs of GPUs sit on 3, 1, 7 and 5.
def dgx_a100() -> Node:
    domains = (3, 3, 1, 1, 7, 7, 5, 5)
    return make_node(
        "a100-sxm-80gb",
        dict(enumerate(domains)),
        lambda a, b: "NV12",
        name="dgx-a100",
        nics=ports(8, 200, lambda port: domains[port]),
    )


# "NVIDIA DGX H100/H200 User Guide": four NVSwitches and eighteen links a GPU; a 400 Gb/s port for
# each GPU. With `count` such machines and a switch for each port index, eight rails
# ("NVIDIA DGX SuperPOD: DGX H100 reference architecture", RA-11333, figure 6).
def hgx_h100(count: int = 1) -> Node:
    return make_node(
        "h100-sxm",
        {gpu: gpu // 4 for gpu in range(8)},
        lambda a, b: "NV18",
        name="hgx-h100",
        compute_capability=(9, 0),
        pcie_generation=5,
        nics=ports(8, 400, lambda port: port // 4),
        count=count,
    )


def h100_rails(num_nodes: int = 16) -> Cluster:
    fabric = Fabric(
        kind="infiniband", bytes_per_s=400 * GBIT_PER_S, ports_per_node=8, latency_s=12e-6
    )
    return Cluster(nodes=(hgx_h100(num_nodes),), fabric=fabric)


# Two sockets with two PCIe switches each and two A10 below each switch, as `nvidia-smi topo -m`
# prints it in sgl-project/sglang issue 7158.
def a10_two_sockets() -> Node:
    def kind(a: int, b: int) -> str:
        return "PIX" if a // 2 == b // 2 else "NODE" if a // 4 == b // 4 else "SYS"

    return make_node(
        "a10",
        {gpu: gpu // 4 for gpu in range(8)},
        kind,
        name="a10-server",
        memory_gib=24,
        compute_capability=(8, 6),
    )


# RTX A6000 take an NVLink bridge over two cards, four links of 14.0625 GB/s each way ("NVIDIA RTX
# A6000" data sheet: 112.5 GB/s both ways). The bridges cross, 0 to 3 and 1 to 2, as `nvidia-smi
# topo -m` prints it in vllm-project/vllm issue 8158.
def a6000_bridged_pairs() -> Node:
    return make_node(
        "rtx-a6000",
        dict.fromkeys(range(4), 0),
        lambda a, b: "NV4" if a + b == 3 else "PHB",
        name="workstation",
        memory_gib=48,
        compute_capability=(8, 6),
    )
