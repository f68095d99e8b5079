"""Reads NCCL's topology XML (RCCL's too), as `NCCL_TOPO_DUMP_FILE` writes it and clouds ship it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

from rankwright.topology.cluster import Nic
from rankwright.topology.errors import ProbeError

_MAX_BYTES = 16 * 2**20
_GPU_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")  # display, 3D, AMD display, accelerator


@dataclass(frozen=True, slots=True)
class XmlGpu:
    """One `<gpu>` and its PCI function; `direct` is links by the bus id they lead to."""

    dev: int
    bus_id: str
    vendor: str
    device: str
    sm: int | None
    pcie_width: int | None
    pcie_generation: int | None
    numa_node: int | None
    cpu_affinity: str | None
    path: tuple[int, ...]
    direct: tuple[tuple[str, int], ...]
    is_xgmi: bool


@dataclass(frozen=True, slots=True)
class XmlNet:
    """One `<net>`, a network port; `port` is 0 for a plain socket interface."""

    name: str
    mbit_per_s: float
    port: int
    numa_node: int | None
    path: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class XmlTopology:
    """What the file says; `matrix` is None, with the reason in `notes`, where it contradicts."""

    gpus: tuple[XmlGpu, ...]
    nets: tuple[XmlNet, ...]
    num_cpus: int
    num_nvlinks: int
    num_xgmi: int
    num_gpu_functions: int
    matrix: tuple[tuple[str, ...], ...] | None
    nic_matrix: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """An element's path of element numbers from the root, what they are, and its `<cpu>`."""

    path: tuple[int, ...]
    element: ElementTree.Element
    parents: tuple[ElementTree.Element, ...]


def is_nccl_xml(text: str) -> bool:
    """Return whether the text is a topology file of NCCL."""
    return re.search(r"<system\b", text) is not None and re.search(r"<cpu\b", text) is not None


def parse_nccl_xml(text: str) -> XmlTopology:
    """Return what a topology file of NCCL says.

    Pairs are named as nvidia-smi does: NV# by counted NVLinks, XGMI, PIX below one switch, PXB
    below several, PHB below one CPU, SYS across CPUs. NCCL does not tell NODE from PHB.

    Raises:
        ProbeError: The XML is not well-formed, or a `<gpu>` lacks what identifies it.
        ValueError: The text has no `<system>`.
    """
    root = _parse(text)
    kinds: dict[int, str] = {}
    places = list(_walk(root, (), (), kinds))
    gpus = sorted(
        (_gpu(place) for place in places if place.element.tag == "gpu"), key=lambda gpu: gpu.dev
    )
    if len({gpu.dev for gpu in gpus}) != len(gpus) or len({g.bus_id for g in gpus}) != len(gpus):
        raise _refuse("two <gpu> have the same dev or busid")
    nets = tuple(_net(place) for place in places if place.element.tag == "net")
    cpus = [place.element for place in places if place.element.tag == "cpu"]
    if len({(cpu.get("host_hash"), cpu.get("numaid")) for cpu in cpus}) != len(cpus):
        raise _refuse("two <cpu> have the same numaid")
    hosts = {cpu.get("host_hash") for cpu in cpus}
    notes: list[str] = []
    matrix = None
    if len(hosts - {None}) > 1:
        notes.append("the file joins several hosts: their GPUs are of no one node")
    elif gpus:
        matrix = _matrix(gpus, kinds, notes)
    return XmlTopology(
        gpus=tuple(gpus),
        nets=nets,
        num_cpus=len(cpus),
        num_nvlinks=_count(places, "nvlink"),
        num_xgmi=_count(places, "xgmi"),
        num_gpu_functions=sum(
            place.element.tag == "pci" and place.element.get("class", "")[:6] in _GPU_CLASSES
            for place in places
        ),
        matrix=matrix,
        nic_matrix=tuple(tuple(_pci_kind(n.path, g.path, kinds) for g in gpus) for n in nets),
        notes=tuple(notes),
    )


def nics_of_xml(topology: XmlTopology) -> tuple[Nic, ...]:
    """Return the ports as `Nic`; those with a verbs port number are RDMA (sockets have port 0)."""
    names = [net.name for net in topology.nets]
    return tuple(
        Nic(
            name=net.name if names.count(net.name) == 1 else f"{net.name}:{net.port}",
            bytes_per_s=net.mbit_per_s * 1e6 / 8,
            rdma=net.port > 0,
            numa_node=net.numa_node,
        )
        for net in topology.nets
        if net.mbit_per_s > 0
    )


def _parse(text: str) -> ElementTree.Element:
    start = text.find("<system")
    if start < 0:
        raise ValueError("no <system> in the text; expected a topology file of NCCL")
    # A file may be quoted between log lines; only the element counts.
    end = text.rfind("</system>")
    body = text[start : end + len("</system>")] if end > start else text[start:]
    if len(body) > _MAX_BYTES or "<!ENTITY" in body or "<!DOCTYPE" in body:
        raise _refuse("a topology of one machine needs no entities and less than 16 MiB")
    try:
        return ElementTree.fromstring(body)
    except ElementTree.ParseError as error:
        line = text[:start].count("\n") + error.position[0]
        raise _refuse(f"line {line}: the XML is not well-formed ({error})") from None
    except (ValueError, RecursionError) as error:  # a null byte, say
        raise _refuse(f"the XML cannot be read ({error})") from None


def _walk(
    element: ElementTree.Element,
    parents: tuple[ElementTree.Element, ...],
    path: tuple[int, ...],
    kinds: dict[int, str],
) -> Iterator[_Place]:
    if len(path) > 64:
        raise _refuse("elements are nested more than 64 deep")
    number = len(kinds)
    kinds[number] = str(element.tag)
    here = (*path, number)
    yield _Place(here, element, parents)
    for child in element:
        yield from _walk(child, (*parents, element), here, kinds)


def _gpu(place: _Place) -> XmlGpu:
    pci = place.parents[-1] if place.parents else place.element
    bus = pci.get("busid", "").lower()
    dev = place.element.get("dev", "")
    if pci.tag != "pci" or not bus or not re.fullmatch(r"\d{1,4}", dev):
        raise _refuse(f"a <gpu> (dev={dev!r}) without number or without a <pci busid> around it")
    direct: dict[str, int] = {}
    links = [child for child in place.element if child.tag in ("nvlink", "xgmi")]
    for link in links:
        target, count = link.get("target", "").lower(), link.get("count", "")
        if not target or not re.fullmatch(r"\d{1,3}", count):
            raise _refuse(f"a <{link.tag}> of GPU {dev} without target or count")
        if target in direct:
            raise _refuse(f"GPU {dev} counts its links to {target} twice")
        direct[target] = int(count)
    cpu = next((parent for parent in reversed(place.parents) if parent.tag == "cpu"), None)
    speed = re.match(r"(\d{1,3}(?:\.\d+)?)", pci.get("link_speed", ""))
    return XmlGpu(
        dev=int(dev),
        bus_id=bus,
        vendor=pci.get("vendor", "").lower(),
        device=pci.get("device", "").lower(),
        sm=_integer(place.element.get("sm")),
        pcie_width=_integer(pci.get("link_width")) or None,
        pcie_generation=_GENERATIONS.get(float(speed[1])) if speed else None,
        numa_node=_numa(cpu),
        cpu_affinity=cpus_of_mask(cpu.get("affinity", "")) if cpu is not None else None,
        path=place.path[:-2],  # what is above its <pci>
        direct=tuple(direct.items()),
        is_xgmi=any(link.tag == "xgmi" for link in links),
    )


_GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}  # GT/s a lane, PCI-SIG


def _net(place: _Place) -> XmlNet:
    name, speed = place.element.get("name"), place.element.get("speed", "")
    if not name or not re.fullmatch(r"\d{1,9}(\.\d+)?", speed):
        raise _refuse(f"a <net> (name={name!r}, speed={speed!r}) without name or speed in Mb/s")
    # <net> is in <nic>, which is in <pci>, or in <cpu> where the interface is no PCI function.
    above = place.path[:-2]
    if len(place.parents) > 1 and place.parents[-2].tag == "pci":
        above = place.path[:-3]
    cpu = next((parent for parent in reversed(place.parents) if parent.tag == "cpu"), None)
    port = _integer(place.element.get("port")) or 0
    return XmlNet(name, float(speed), port, _numa(cpu), above)


def _matrix(
    gpus: list[XmlGpu], kinds: dict[int, str], notes: list[str]
) -> tuple[tuple[str, ...], ...] | None:
    buses = {gpu.bus_id for gpu in gpus}
    rows: list[tuple[str, ...]] = []
    to_switches = {gpu.dev: _switch_links(gpu, buses) for gpu in gpus}
    if len(set(to_switches.values())) > 1:
        counts = ", ".join(f"GPU {dev}: {count}" for dev, count in to_switches.items())
        notes.append(f"the GPUs have unequal numbers of NVLinks to switches ({counts})")
    for a in gpus:
        links = dict(a.direct)
        if a.bus_id in links:
            notes.append(f"GPU {a.dev} ({a.bus_id}) has NVLinks to itself: no pair can be told")
            return None
        row: list[str] = []
        for b in gpus:
            back = dict(b.direct)
            if a is b:
                row.append("X")
                continue
            if links.get(b.bus_id, 0) != back.get(a.bus_id, 0):
                notes.append(
                    f"{a.bus_id} counts {links.get(b.bus_id, 0)} links to {b.bus_id}, which "
                    f"counts {back.get(a.bus_id, 0)} back: no matrix is made of it"
                )
                return None
            switched = min(to_switches[a.dev], to_switches[b.dev])
            count = links.get(b.bus_id, 0) or switched
            if count:
                row.append("XGMI" if a.is_xgmi else f"NV{count}")
            else:
                row.append(_pci_kind(a.path, b.path, kinds))
        rows.append(tuple(row))
    return tuple(rows)


def _switch_links(gpu: XmlGpu, buses: set[str]) -> int:
    """Return how many links lead to no GPU of the file."""
    return sum(count for bus, count in gpu.direct if bus not in buses)


def _pci_kind(a: tuple[int, ...], b: tuple[int, ...], kinds: dict[int, str]) -> str:
    """Return the link token of two PCI functions by the paths of what is above them."""
    shared = 0
    while shared < min(len(a), len(b)) and a[shared] == b[shared]:
        shared += 1
    meets = kinds[a[shared - 1]] if shared else "system"
    if meets == "pci":
        # Each <pci> is a whole switch: NCCL folds its ports into one (src/graph/xml.cc).
        return "PIX" if len(a) == len(b) == shared else "PXB"
    return "PHB" if meets == "cpu" else "SYS"


def cpus_of_mask(mask: str) -> str | None:
    """Return a hexadecimal CPU mask as a list, None if it is none or empty.

    >>> cpus_of_mask("0000ffff,0000ffff")
    '0-15,32-47'
    """
    digits = mask.replace(",", "")
    if not re.fullmatch(r"[0-9a-fA-F]{1,1024}", digits) or int(digits, 16) == 0:
        return None
    bits = bin(int(digits, 16))[:1:-1]
    ranges = [(run.start(), run.end() - 1) for run in re.finditer("1+", bits)]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def _numa(cpu: ElementTree.Element | None) -> int | None:
    node = None if cpu is None else _integer(cpu.get("numaid"))
    return node if node is not None and node >= 0 else None


def _integer(value: str | None) -> int | None:
    return int(value) if value is not None and re.fullmatch(r"-?\d{1,6}", value) else None


def _count(places: list[_Place], tag: str) -> int:
    return sum(place.element.tag == tag for place in places)


def _refuse(why: str) -> ProbeError:
    return ProbeError("inconsistent_topology", f"{why}; dump the file again")
