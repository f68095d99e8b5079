"""Joins the machines that several probes read into one `Cluster`, equal neighbours folded together.

Order is kept, since plans count machines and launchers start them in the order of the scheduler;
only machines that stand side by side are folded.
"""

import re
from collections.abc import Iterable, Sequence

from rankwright.topology.cluster import Cluster, Fabric, FabricKind, Gpu, Link, Nic, Node
from rankwright.topology.shorthand import FABRIC_LATENCY_S, parse_fabric

# Machines of one kind never have exactly the same memory free: drivers keep some tens of MB. A
# fiftieth of a card is more than that and less than any process that computes on it.
_FREE_MEMORY_SHARE = 0.02
# Rates that a probe measured or derived differ a little from one machine to the next.
_RATE_SHARE = 0.10
# A CPU's rates are measured in a moment that other programs share: half of it says nothing.
_CPU_RATE_SHARE = 0.50
# Ports of a node that are slower than this part of its fastest carry storage or management, not
# the traffic between GPUs (the same rule as the plan's list of ports).
_SAME_RATE_SHARE = 0.9
# Where neither a port nor the user says: the slowest network that machines with several cards are
# sold with today. A note says that it is an assumption.
_ASSUMED_BYTES_PER_S = 10e9 / 8


def join(clusters: Sequence[Cluster], *, fabric: str | None = None, source: str = "") -> Cluster:
    """Return all machines of `clusters`, in their order, as one cluster.

    Args:
        clusters: What was read, a machine each or more.
        fabric: The network between them, as shorthand has it; None: what their ports say.
        source: Where they came from; empty: as the first says.

    Raises:
        ValueError: There is none to join, or the fabric cannot be read.
    """
    if not clusters:
        raise ValueError("no machine was read: there is nothing to join")
    nodes = tuple(node for cluster in clusters for node in cluster.nodes)
    folded = fold(nodes)
    notes = list(_notes(clusters))
    known = next((each.fabric for each in clusters if each.fabric is not None), None)
    if fabric is not None:
        known = parse_fabric(fabric, min(len(node.gpus) for node in nodes))
    if known is None and sum(node.count for node in nodes) > 1:
        known, note = find_fabric(nodes)
        notes += [note] if note is not None else []
    return Cluster(
        nodes=folded,
        fabric=known,
        source=source or clusters[0].source,
        notes=tuple(notes),
        measurements=clusters[0].measurements if len(clusters) == 1 else None,
    )


def fold(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """Return `nodes` with neighbours that are alike as one `Node` of their summed count.

    Of everything that may differ between such machines (free memory, measured rates) the least is
    kept, so that a plan that fits the one fits all. Their uuids differ and are dropped.
    """
    runs: list[list[Node]] = []
    for node in nodes:
        if runs and all(_alike(other, node) for other in runs[-1]):
            runs[-1].append(node)
        else:
            runs.append([node])
    return tuple(run[0] if len(run) == 1 else _merge(run) for run in runs)


def find_fabric(nodes: Sequence[Node]) -> tuple[Fabric, str | None]:
    """Return the network between `nodes`, as their ports say, and a note where they do not.

    RDMA ports before others; the machine with the slowest or the fewest decides.
    """
    for rdma in (True, False):
        ports = [_fastest([nic for nic in node.nics if nic.rdma == rdma]) for node in nodes]
        if all(ports):
            rate = min(nic.bytes_per_s for nics in ports for nic in nics)
            layers = {nic.link_layer for nics in ports for nic in nics}
            kind: FabricKind = "roce" if "ethernet" in layers else "infiniband"
            kind = kind if rdma else "ethernet"
            return _fabric(kind, rate, min(map(len, ports)) if rdma else 1), None
    silent = next(node.name for node in nodes if not _fastest(node.nics))
    gbit = _ASSUMED_BYTES_PER_S * 8 / 1e9
    note = (
        f"{silent} does not say how fast its network is: Ethernet of {gbit:.0f} Gb/s is assumed; "
        "say what it has with --fabric, such as --fabric eth25 or ib400"
    )
    return _fabric("ethernet", _ASSUMED_BYTES_PER_S, 1), note


def hostlist(names: Sequence[str]) -> str:
    """Return names in one word, as Slurm writes them where they count up.

    >>> hostlist(["gpu07", "gpu08", "gpu09"]), hostlist(["a", "b"]), hostlist(["a", "a"])
    ('gpu[07-09]', 'a,b', 'a')
    """
    unique = list(dict.fromkeys(names))
    if len(unique) == 1:
        return unique[0]
    stem = re.sub(r"\d+$", "", unique[0])
    numbers = [name.removeprefix(stem) for name in unique]
    if all(number.isdecimal() for number in numbers) and stem:
        first = int(numbers[0])
        if [int(number) for number in numbers] == list(range(first, first + len(numbers))):
            return f"{stem}[{numbers[0]}-{numbers[-1]}]"
    return ",".join(unique)


def _fabric(kind: FabricKind, bytes_per_s: float, ports: int) -> Fabric:
    return Fabric(
        kind=kind,
        bytes_per_s=bytes_per_s,
        ports_per_node=ports,
        latency_s=FABRIC_LATENCY_S[kind],
    )


def _fastest(nics: Sequence[Nic]) -> list[Nic]:
    top = max((nic.bytes_per_s for nic in nics), default=0.0)
    return [nic for nic in nics if nic.bytes_per_s >= _SAME_RATE_SHARE * top]


def _notes(clusters: Sequence[Cluster]) -> Iterable[str]:
    """Yield each note once; one that not all machines share says whose it is."""
    if len(clusters) == 1:
        yield from clusters[0].notes
        return
    names: dict[str, list[str]] = {}
    for cluster in clusters:
        for note in cluster.notes:
            names.setdefault(note, []).append(hostlist([node.name for node in cluster.nodes]))
    for note, of in names.items():
        yield note if len(of) == len(clusters) else f"{hostlist(of)}: {note}"


def _alike(a: Node, b: Node) -> bool:
    return (
        _fixed(a) == _fixed(b)
        and all(_gpus_alike(x, y) for x, y in zip(a.gpus, b.gpus, strict=True))
        and all(
            _close(x.bytes_per_s, y.bytes_per_s, _RATE_SHARE)
            for x, y in zip(_links(a), _links(b), strict=True)
        )
    )


def _fixed(node: Node) -> tuple[object, ...]:
    """Return what machines of one kind have exactly alike."""
    return (
        node.num_cpus,
        node.driver,
        sorted((nic.name, nic.bytes_per_s, nic.rdma, str(nic.link_layer)) for nic in node.nics),
        [(link.a, link.b, link.kind) for link in _links(node)],
        [
            (
                *(gpu.index, gpu.device, gpu.name, round(gpu.total_memory_bytes / 2**30)),
                *(gpu.compute_capability, gpu.pcie_generation, gpu.pcie_width),
                *(gpu.numa_node, gpu.mig, gpu.num_processes > 0, sorted(gpu.flops_per_s or ())),
                gpu.memory_bytes_per_s is None,
            )
            for gpu in node.gpus
        ],
    )


def _gpus_alike(a: Gpu, b: Gpu) -> bool:
    if a.device == "cpu":
        # Free memory of a machine without GPUs is its page cache's business.
        share = _CPU_RATE_SHARE
    else:
        share = _RATE_SHARE
        if abs(a.memory_bytes - b.memory_bytes) > _FREE_MEMORY_SHARE * a.total_memory_bytes:
            return False
    first, second = a.flops_per_s or {}, b.flops_per_s or {}
    return _close(a.memory_bytes_per_s or 1.0, b.memory_bytes_per_s or 1.0, share) and all(
        _close(first[dtype], second[dtype], share) for dtype in first
    )


def _close(a: float, b: float, share: float) -> bool:
    return abs(a - b) <= share * max(a, b)


def _links(node: Node) -> list[Link]:
    return sorted(node.links, key=lambda link: (link.a, link.b))


def _merge(run: Sequence[Node]) -> Node:
    return run[0].model_copy(
        update={
            "name": hostlist([node.name for node in run]),
            "count": sum(node.count for node in run),
            "gpus": tuple(_merge_gpus(gpus) for gpus in zip(*(n.gpus for n in run), strict=True)),
            "links": tuple(
                links[0].model_copy(
                    update={
                        "bytes_per_s": min(link.bytes_per_s for link in links),
                        "latency_s": max(link.latency_s for link in links),
                    }
                )
                for links in zip(*map(_links, run), strict=True)
            ),
            "host_memory_bytes": min(node.host_memory_bytes for node in run),
        }
    )


def _merge_gpus(gpus: Sequence[Gpu]) -> Gpu:
    first = gpus[0]
    rates = [gpu.memory_bytes_per_s for gpu in gpus if gpu.memory_bytes_per_s is not None]
    return first.model_copy(
        update={
            "memory_bytes": min(gpu.memory_bytes for gpu in gpus),
            "total_memory_bytes": min(gpu.total_memory_bytes for gpu in gpus),
            "num_processes": max(gpu.num_processes for gpu in gpus),
            "uuid": first.uuid if all(gpu.uuid == first.uuid for gpu in gpus) else None,
            "memory_bytes_per_s": min(rates, default=None),
            "flops_per_s": None
            if first.flops_per_s is None
            else {
                dtype: min((gpu.flops_per_s or {})[dtype] for gpu in gpus)
                for dtype in first.flops_per_s
            },
        }
    )
