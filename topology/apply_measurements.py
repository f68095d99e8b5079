"""Turns what was timed into the rates that the planner reads, and says what is out of line.

The planner's rates are peaks, of which a kernel reaches a share that its efficiency table knows. A
measured rate is such a reach: it is written as the peak that a sound device of the kind would have
to have, so that a machine like those that the shares come from keeps the data sheet's figures.
"""

import statistics
from collections.abc import Mapping, Sequence

from rankwright.topology.cluster import Cluster, Gpu, Link, Node
from rankwright.topology.link_kinds import is_direct, link_bytes_per_s, nvlink_count
from rankwright.topology.measurements import GemmRate, Measurements

# Share of the data sheet that a large copy between two GPUs reaches: 376 of 450 GB/s on HGX H100
# (p2pBandwidthLatencyTest, NVIDIA/nccl issue 1264); 26 of 32 GB/s behind a PCIe 4.0 switch alike.
_LINK_SHARE = 0.84
# A copy in memory: 4.12 to 4.24 of 4.8 TB/s on H200, 2.93 to 3.0 of 3.35 on H100 (1 GiB, torch
# 2.11).
_MEMORY_SHARE = 0.875
# The best of large matrix products on H200: 690 to 785 of 989 TFLOP/s in 16 bits, 1,240 to 1,360 of
# 1,979 in FP8, by shape and by how warm the board is; the middle.
_GEMM_SHARES: Mapping[str, float] = {"bfloat16": 0.75, "float16": 0.75, "float8": 0.66}
# Ranks of a CPU are timed with the kernels that the engine runs: nothing to scale.
_CPU_SHARE = 1.0
# Devices of one kind within this of their median are taken to be equal: clocks and the clock that
# timed them vary by some percent, and equal devices plan better than almost equal ones.
_SAME = 0.10
# A link or memory below this part of what it should do is broken, not unlucky.
_FAR_BELOW = 0.5


def apply_measurements(cluster: Cluster, measured: Measurements) -> Cluster:
    """Return the cluster with measured rates, what was measured, and notes on what is out of line.

    Links, devices and the fingerprint stay as they were.

    Raises:
        ValueError: The cluster has more than one machine, or others' GPUs were measured.
    """
    if cluster.num_nodes != 1:
        raise ValueError(
            f"measurements are of one machine and the cluster has {cluster.num_nodes}; measure "
            "each by itself, with --gather none"
        )
    node = cluster.nodes[0]
    known = {gpu.index for gpu in node.gpus}
    named = {index for pair in measured.pairs for index in (pair.a, pair.b)}
    named |= {row.gpu for row in measured.memory} | {row.gpu for row in measured.gemms}
    if named - known:
        raise ValueError(
            f"GPUs {sorted(named - known)} were measured; the cluster has {sorted(known)}"
        )
    gpus, gpu_notes = _gpus(node, measured)
    links, link_notes = _links(node, measured)
    node = node.model_copy(update={"gpus": gpus, "links": links})
    notes = (*cluster.notes, *gpu_notes, *link_notes, *_transport_notes(node, measured))
    return cluster.model_copy(
        update={
            "nodes": (node,),
            "measurements": measured,
            "notes": tuple(dict.fromkeys((*notes, *measured.notes))),
        }
    )


def _gpus(node: Node, measured: Measurements) -> tuple[tuple[Gpu, ...], list[str]]:
    copies = {row.gpu: row.bytes_per_s for row in measured.memory}
    best = _best_gemms(measured.gemms)
    gpus: list[Gpu] = []
    notes: list[str] = []
    for gpu in node.gpus:
        alike = [other.index for other in node.gpus if other.device == gpu.device]
        cpu = gpu.device == "cpu"
        same = 1.0 if cpu else _SAME  # ranks share one CPU: what differs between them is chance
        update: dict[str, object] = {}
        if gpu.index in copies:
            of_all = [copies[index] for index in alike if index in copies]
            rate = _settled(copies[gpu.index], of_all, same)
            update["memory_bytes_per_s"] = rate / (_CPU_SHARE if cpu else _MEMORY_SHARE)
            if rate < _FAR_BELOW * max(of_all):
                notes.append(
                    f"GPU{gpu.index} copies its memory at {_percent(rate / max(of_all))} of the "
                    "best of its kind: check clocks, power limit and other processes"
                )
        flops = dict(gpu.flops_per_s or {})
        for dtype, rates in best.items():
            if gpu.index in rates:
                of_all = [rates[index] for index in alike if index in rates]
                share = _CPU_SHARE if cpu else _GEMM_SHARES.get(dtype, _GEMM_SHARES["bfloat16"])
                flops[dtype] = _settled(rates[gpu.index], of_all, same) / share
        if flops:
            update["flops_per_s"] = flops
        gpus.append(gpu.model_copy(update=update))
    return tuple(gpus), notes


def _best_gemms(rows: Sequence[GemmRate]) -> dict[str, dict[int, float]]:
    """Return the best rate of each dtype and GPU."""
    best: dict[str, dict[int, float]] = {}
    for row in rows:
        of_dtype = best.setdefault(row.dtype, {})
        of_dtype[row.gpu] = max(of_dtype.get(row.gpu, 0.0), row.flops_per_s)
    return best


def _links(node: Node, measured: Measurements) -> tuple[tuple[Link, ...], list[str]]:
    rates = {
        frozenset((pair.a, pair.b)): min(pair.forth_bytes_per_s, pair.back_bytes_per_s)
        for pair in measured.pairs
    }
    by_index = {gpu.index: gpu for gpu in node.gpus}
    links: list[Link] = []
    notes: list[str] = []
    for link in node.links:
        rate = rates.get(frozenset((link.a, link.b)))
        if rate is None:
            links.append(link)
            continue
        alike = [
            rates[frozenset((other.a, other.b))]
            for other in node.links
            if other.kind == link.kind and frozenset((other.a, other.b)) in rates
        ]
        shared = link.kind == "SHM"
        rate = _settled(rate, alike, 1.0 if shared else _SAME)
        share = _CPU_SHARE if shared else _LINK_SHARE
        links.append(link.model_copy(update={"bytes_per_s": rate / share}))
        # What memory shared by CPU ranks should do is in no data sheet.
        due = max(alike)
        if not shared:
            due = _LINK_SHARE * link_bytes_per_s(link.kind, by_index[link.a], by_index[link.b])
        if rate < _FAR_BELOW * due:
            notes.append(
                f"GPU{link.a}-GPU{link.b} runs at {_percent(rate / due)} of {link.kind} "
                f"({rate / 1e9:.3g} of {due / 1e9:.3g} GB/s): {_remedy(link.kind)}"
            )
    return tuple(links), notes


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _remedy(kind: str) -> str:
    if nvlink_count(kind):
        return "check the bridge or `nvidia-smi nvlink --status`"
    if is_direct(kind):
        return "check its links"
    return "check the slots' PCIe width, and whether ACS or the IOMMU keeps GPUs from each other"


def _settled(rate: float, alike: Sequence[float], same: float) -> float:
    """Return the median of devices of one kind for one that is near it, else its own rate."""
    middle = statistics.median(alike)
    return middle if abs(rate - middle) <= same * middle else rate


def _transport_notes(node: Node, measured: Measurements) -> list[str]:
    transports = set(measured.transports)
    notes: list[str] = []
    if "SHM" in transports and any(nvlink_count(link.kind) for link in node.links):
        notes.append(
            "NCCL went through host memory (SHM) although GPUs have NVLink: check "
            "NCCL_P2P_DISABLE, NCCL_P2P_LEVEL and the size of /dev/shm"
        )
    if "NET/Socket" in transports and any(nic.rdma for nic in node.nics):
        notes.append(
            "NCCL fell back to sockets although there are RDMA ports: check NCCL_IB_DISABLE and "
            "NCCL_IB_HCA"
        )
    return notes
