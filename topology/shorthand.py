"""Clusters written in one word, such as `2x8xh100-sxm+ib400`.

    cluster := part ("+" part)* ["+" fabric]
    part    := [NODESx] COUNTx DEVICE       NODESx starts a new kind of node
    fabric  := (ib | roce | eth) GBITS [xPORTS] ("@" MACHINES [":" RATIO])*

`2xrtx4090+2xrtx3090` is one node with two kinds of GPU, `1x8xh100-sxm+1x4xl40s+ib400` two nodes.
A fabric has one port for each GPU of the smallest node (Ethernet: one port a node) unless `xPORTS`
says otherwise. `@32@512:2` are its switches: leaves of 32 machines, and above them pods of 512 with
half of what enters them from below on their way up. How the GPUs of a node are joined, and whether
NVLink joins those of a rack, follows from the device; a probe knows better.
"""

import re
from dataclasses import dataclass, field
from itertools import combinations

from rankwright.topology.cluster import (
    MAX_NODES,
    Cluster,
    Fabric,
    FabricKind,
    FabricLevel,
    Gpu,
    Link,
    Node,
    Rack,
)
from rankwright.topology.devices import ALIASES, DEVICES, Device, resolve_key
from rankwright.topology.link_kinds import link_bytes_per_s, link_latency_s

_PART = re.compile(r"(?:(?P<nodes>\d{1,9})x)?(?P<count>\d{1,9})x(?P<device>[a-z][a-z0-9.-]*)$")
_FABRIC = re.compile(
    r"(?P<kind>ib|roce|eth)(?P<gbit>\d{1,6})(?:x(?P<ports>\d{1,4}))?"
    r"(?P<levels>(?:@\d{1,7}(?::\d{1,3}(?:\.\d{1,3})?)?)*)$"
)

_FABRIC_KINDS: dict[str, FabricKind] = {
    "ib": "infiniband",
    "roce": "roce",
    "eth": "ethernet",
}

# Seconds that one hop between nodes adds to a small message. InfiniBand: send and receive of 2 KB
# between two DGX H100 took 17 us against 5 us inside one (torch.distributed, NCCL). RoCE: the same
# between two DGX A100, 24 us against 8. Ethernet goes through the kernels and memories of
# both hosts; 50 us is assumed for it, not measured: measure the machines where it matters.
FABRIC_LATENCY_S: dict[FabricKind, float] = {
    "infiniband": 12e-6,
    "roce": 16e-6,
    "ethernet": 50e-6,
}

# What a tray of GB200 NVL72 has beside NVLink: a ConnectX-7 a GPU (DGX GB200 data sheet).
_BESIDE_A_RACK = "ib400"

_MAX_GPUS = 32  # of one node: no server holds more cards; catches a forgotten node count
_MAX_CPU_RANKS = 512
_LARGEST_BOARD = 16  # GPUs that NVSwitch joins inside one machine; more are a rack's
_CARDS_A_SOCKET = 4  # 8-card servers hang four cards from each of two sockets

# NVLinks between the eight V100 of a DGX-1 or p3.16xlarge ("hybrid cube mesh", DGX-1 system
# architecture whitepaper, figure 4); a node with fewer has the first ones. Other pairs go by SYS.
_CUBE_MESH = {
    (0, 1): 1, (0, 2): 1, (0, 3): 2, (0, 4): 2, (1, 2): 2, (1, 3): 1, (1, 5): 2, (2, 3): 2,
    (2, 6): 1, (3, 7): 1, (4, 5): 1, (4, 6): 1, (4, 7): 2, (5, 6): 2, (5, 7): 1, (6, 7): 2,
}  # fmt: skip


@dataclass(slots=True)
class _NodeText:
    nodes: int
    # (count, device key)
    parts: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])

    @property
    def num_gpus(self) -> int:
        return sum(count for count, _ in self.parts)


def parse_cluster(text: str) -> Cluster:
    """Return the cluster that the shorthand `text` describes.

    >>> parse_cluster("2x8xh200-sxm+ib400").describe()
    '2 x (8 x h200-sxm) + infiniband 8 x 400 Gb/s'

    Raises:
        ValueError: The text does not parse; the message names the token and what was expected.
    """
    tokens = text.strip().lower().split("+")
    fabric_text = _FABRIC.match(tokens[-1]) if len(tokens) > 1 else None
    kinds = _read_parts(tokens[:-1] if fabric_text else tokens, text)
    racks, num_nodes = _racks(kinds), sum(kind.nodes for kind in kinds)
    is_one_rack = racks is not None and num_nodes <= racks.nodes
    if num_nodes > 1 and fabric_text is None and not is_one_rack:
        raise ValueError(
            f"cluster {text!r} has {num_nodes} nodes and nothing between "
            "them; append a fabric such as +ib400, +roce200 or +eth100"
        )
    nodes = tuple(_node(kind, f"node{index}", text) for index, kind in enumerate(kinds))
    num_ports = min(kind.num_gpus for kind in kinds)
    fabric, notes = _read_fabric(fabric_text, num_ports, text), _notes(nodes)
    if fabric is None and num_nodes > 1:
        fabric = parse_fabric(_BESIDE_A_RACK, num_ports)
        notes = (
            *notes,
            f"NVLink joins the machines of the rack; no network beside it was given, "
            f"{num_ports} x 400 Gb/s InfiniBand a machine is taken",
        )
    return Cluster(nodes=nodes, fabric=fabric, racks=racks, source=text.strip(), notes=notes)


def parse_fabric(text: str, num_gpus: int = 1) -> Fabric:
    """Return the network that the last word of a shorthand means.

    Args:
        text: Such as `ib400`, `roce200x4` or `eth25`.
        num_gpus: Of a node, which has a port for each unless the text says otherwise.

    Raises:
        ValueError: The text does not parse.
    """
    word = text.strip().lower().removeprefix("+")
    match = _FABRIC.match(word)
    if match is None:
        raise ValueError(
            f"cannot read the fabric {text!r}; expected ib, roce or eth, Gb/s of a port and xPORTS "
            "of a node, such as ib400, roce200x4 or eth25"
        )
    fabric = _read_fabric(match, num_gpus, text)
    assert fabric is not None
    return fabric


def format_shorthand(cluster: Cluster) -> str:
    """Return the shorthand of a cluster: devices, counts and fabric, without links or free memory.

    >>> format_shorthand(parse_cluster("4xA100-SXM"))
    '4xa100-sxm-80gb'
    """
    words: list[str] = []
    for node in cluster.nodes:
        runs: list[tuple[int, str]] = []
        for gpu in node.gpus:
            if runs and runs[-1][1] == gpu.device:
                runs[-1] = (runs[-1][0] + 1, gpu.device)
            else:
                runs.append((1, gpu.device))
        prefix = f"{node.count}x" if node.count > 1 or len(cluster.nodes) > 1 else ""
        words.append(prefix + "+".join(f"{count}x{device}" for count, device in runs))
    fabric = cluster.fabric
    if fabric is not None:
        kind = next(word for word, value in _FABRIC_KINDS.items() if value == fabric.kind)
        word = f"{kind}{fabric.bytes_per_s * 8 / 1e9:.0f}x{fabric.ports_per_node}"
        for level in fabric.levels:
            ratio = level.oversubscription
            word += f"@{level.nodes}" + (f":{ratio:g}" if ratio > 1 else "")
        words.append(word)
    return "+".join(words)


def _read_parts(tokens: list[str], text: str) -> list[_NodeText]:
    kinds: list[_NodeText] = []
    for position, token in enumerate(tokens):
        match = _PART.match(token)
        if match is None:
            where = "a fabric may only stand last; " if _FABRIC.match(token) else ""
            if token in DEVICES or token in ALIASES:
                where = f"a count is missing, as in 1x{token}; "
            raise ValueError(
                f"cluster {text!r}: cannot read {token!r}; {where}expected [NODESx]COUNTxDEVICE, "
                "such as 8xh100-sxm or 2x8xh100-sxm+ib400"
            )
        nodes, count = int(match["nodes"] or 1), int(match["count"])
        if not 1 <= nodes <= MAX_NODES or count < 1:
            raise ValueError(
                f"cluster {text!r}: {token!r} has {nodes} nodes of {count}; expected at least one "
                f"of each and at most {MAX_NODES} nodes"
            )
        try:
            key = resolve_key(match["device"])
        except ValueError as error:
            raise ValueError(f"cluster {text!r}: {error}") from None
        if position == 0 or match["nodes"] is not None:
            kinds.append(_NodeText(nodes))
        kinds[-1].parts.append((count, key))
    return kinds


def _read_fabric(match: re.Match[str] | None, num_gpus: int, text: str) -> Fabric | None:
    if match is None:
        return None
    kind = _FABRIC_KINDS[match["kind"]]
    ports = int(match["ports"]) if match["ports"] else (1 if kind == "ethernet" else num_gpus)
    gbit = int(match["gbit"])
    if gbit < 1 or ports < 1:
        raise ValueError(
            f"cluster {text!r}: fabric {match[0]!r} has {gbit} Gb/s on {ports} ports; "
            "expected at least 1 of each, such as ib400 or roce200x4"
        )
    return Fabric(
        kind=kind,
        bytes_per_s=gbit * 1e9 / 8,
        ports_per_node=ports,
        latency_s=FABRIC_LATENCY_S[kind],
        levels=_read_levels(match["levels"], text),
    )


def _read_levels(words: str, text: str) -> tuple[FabricLevel, ...]:
    """Return the switches that `@32@512:2` stands for."""
    levels: list[FabricLevel] = []
    for word in words.split("@")[1:]:
        nodes, _, ratio = word.partition(":")
        size, below = int(nodes), levels[-1].nodes if levels else 1
        if size <= below or size % below or float(ratio or 1) < 1:
            raise ValueError(
                f"cluster {text!r}: switches {'@' + word!r} above {below} machines; expected a "
                "multiple of that, and a ratio of at least 1, such as @32@512:2"
            )
        levels.append(FabricLevel(nodes=size, oversubscription=float(ratio or 1)))
    return tuple(levels)


def _racks(kinds: list[_NodeText]) -> Rack | None:
    """Return the racks of machines whose GPUs meet in NVLink switches outside of them.

    As with an NVL72's trays of four: where all machines are alike and a rack holds several.
    """
    sizes = {(kind.num_gpus, *{key for _, key in kind.parts}) for kind in kinds}
    if len(sizes) > 1 or len(kinds[0].parts) > 1 or sum(kind.nodes for kind in kinds) == 1:
        return None
    num_gpus, device = kinds[0].num_gpus, DEVICES[kinds[0].parts[0][1]]
    domain = device.scale_up_domain
    if device.scale_up != "nvswitch" or domain <= _LARGEST_BOARD or domain % num_gpus:
        return None
    if num_gpus == domain:
        return None
    token = device.scale_up_token
    return Rack(
        nodes=domain // num_gpus,
        kind=token,
        bytes_per_s=device.scale_up_bytes_per_s,
        latency_s=link_latency_s(token),
    )


def _node(kind: _NodeText, name: str, text: str) -> Node:
    counts: dict[str, int] = {}
    for count, key in kind.parts:
        counts[key] = counts.get(key, 0) + count
    if "cpu" in counts and len(counts) > 1:
        raise ValueError(f"cluster {text!r}: CPU ranks and GPUs do not mix in one node")
    for key, count in counts.items():
        _check_count(DEVICES[key], count, text)
    if len(counts) > 1 and kind.num_gpus > _MAX_GPUS:
        raise ValueError(
            f"cluster {text!r}: {kind.num_gpus} GPUs in one node, at most {_MAX_GPUS}; put a node "
            "count in front of each kind, such as 2x8xl40s+2x8xl4+ib400"
        )
    keys = [key for count, key in kind.parts for _ in range(count)]
    cpus = counts.get("cpu", 0)
    gpus = tuple(_gpu(index, DEVICES[key]) for index, key in enumerate(keys))
    return Node(
        name=name,
        count=kind.nodes,
        gpus=gpus,
        links=device_links(gpus),
        num_cpus=max(cpus, 1),
        host_memory_bytes=sum(gpu.total_memory_bytes for gpu in gpus) if cpus else 0,
    )


def _check_count(device: Device, count: int, text: str) -> None:
    limit = _MAX_CPU_RANKS if device.vendor == "cpu" else _MAX_GPUS
    why = "that is the most one machine holds"
    if device.scale_up in ("nvswitch", "mesh"):
        limit = device.scale_up_domain
        why = "its links join no more"
    if count > limit:
        raise ValueError(
            f"cluster {text!r}: {count} x {device.key} in one node, at most {limit} ({why}); "
            f"write more nodes, such as {-(-count // limit)}x{limit}x{device.key}+ib400"
        )


def _gpu(index: int, device: Device) -> Gpu:
    return Gpu(
        index=index,
        device=device.key,
        name=device.key,
        memory_bytes=device.memory_bytes,
        total_memory_bytes=device.memory_bytes,
        compute_capability=device.compute_capability,
        pcie_generation=device.pcie_generation if device.vendor != "cpu" else None,
        pcie_width=device.pcie_width if device.vendor != "cpu" else None,
    )


def device_links(gpus: tuple[Gpu, ...]) -> tuple[Link, ...]:
    """Return the links that machines with these GPUs usually have, one for every pair."""
    links: list[Link] = []
    for a, b in combinations(gpus, 2):
        kind = _link_kind(a, b, len(gpus))
        links.append(
            Link(
                a=a.index,
                b=b.index,
                kind=kind,
                bytes_per_s=link_bytes_per_s(kind, a, b),
                latency_s=link_latency_s(kind),
            )
        )
    return tuple(links)


def _link_kind(a: Gpu, b: Gpu, num_gpus: int) -> str:
    if a.device == "cpu":
        return "SHM"
    device = DEVICES.get(a.device)
    if device is not None and a.device == b.device:
        if device.scale_up == "nvswitch" or device.scale_up_token == "XGMI":
            return device.scale_up_token
        if device.scale_up == "mesh":
            pair = (min(a.index, b.index), max(a.index, b.index))
            return f"NV{_CUBE_MESH[pair]}" if pair in _CUBE_MESH else "SYS"
    same_socket = num_gpus <= _CARDS_A_SOCKET or (
        (a.index < (num_gpus + 1) // 2) == (b.index < (num_gpus + 1) // 2)
    )
    return "PHB" if same_socket else "SYS"


def _is_mesh(node: Node) -> bool:
    """Return whether NVLink joins the GPUs in a mesh, in which pairs without a link are known."""
    devices = {gpu.device for gpu in node.gpus}
    return len(devices) == 1 and DEVICES[devices.pop()].scale_up == "mesh"


def _notes(nodes: tuple[Node, ...]) -> tuple[str, ...]:
    kinds = {link.kind for node in nodes if not _is_mesh(node) for link in node.links}
    if not kinds & {"PHB", "SYS"}:
        return ()
    return (
        "PCIe cards are taken to meet in the CPU, without NVLink bridges or PCIe switches; "
        "probe the machine for its real links",
    )
