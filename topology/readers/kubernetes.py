"""Reads the GPU nodes of a Kubernetes cluster from their labels: `kubectl get nodes -o json`.

For where no pod can be run. GPU feature discovery labels what a node has (`nvidia.com/gpu.product`,
`.count`, `.memory`); how its GPUs are linked follows from the device, which nodes NVLink joins from
`.clique`, and what else joins them is in no label.
"""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ValidationError

from rankwright.topology.cluster import Cluster, Gpu, Node, Rack
from rankwright.topology.device_table import ROWS
from rankwright.topology.devices import DEVICES, device_key
from rankwright.topology.join import join
from rankwright.topology.link_kinds import link_latency_s
from rankwright.topology.readers.assemble import make_gpu
from rankwright.topology.readers.found import FoundGpu
from rankwright.topology.shorthand import device_links

_MIB = 2**20
# The NVLink domain of a node whose GPUs meet those of others, as a tray of an NVL72 has one.
_CLIQUE = "nvidia.com/gpu.clique"
_MAX_GPUS = 64  # of one machine; more is a typing error or a time-sliced count
# Quantities of Kubernetes: powers of ten and of two (API reference, "Quantity").
_UNITS = {
    "": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50,
}  # fmt: skip
# Written onto the product by GPU feature discovery where a GPU is shared or cut.
_SUFFIX = re.compile(r"-(SHARED|MIG-[\w.+-]+)$")


class _Metadata(BaseModel):
    name: str = "unnamed"
    labels: dict[str, str] = {}


class _Spec(BaseModel):
    unschedulable: bool = False


class _Condition(BaseModel):
    type: str = ""
    status: str = ""


class _Status(BaseModel):
    capacity: dict[str, str | int] = {}
    allocatable: dict[str, str | int] = {}
    conditions: list[_Condition] = []


class _Item(BaseModel):
    """A node, as much of it as we read."""

    metadata: _Metadata = _Metadata()
    spec: _Spec = _Spec()
    status: _Status = _Status()


class _List(BaseModel):
    items: list[_Item]


_ONE = re.compile(r'\A\s*\{(?:\s*"apiVersion"\s*:\s*"v1"\s*,)?\s*"kind"\s*:\s*"Node"')


def is_kubernetes(text: str) -> bool:
    """Return whether `text` is a list of nodes as kubectl prints it."""
    start = text.lstrip()[:4096]
    return start.startswith("{") and re.search(r'"(apiVersion|items)"\s*:', start) is not None


def parse_kubernetes(text: str, *, fabric: str | None = None) -> Cluster:
    """Return the GPU nodes that `kubectl get nodes -o json` lists and that take pods.

    Args:
        text: Its output.
        fabric: The network between them, as shorthand has it; needed where there are several.

    Raises:
        ValueError: It is no such list, no node has a GPU, or several have and no fabric is given.
    """
    nodes: list[tuple[str, Node]] = []
    notes: list[str] = []
    for item in _items(text):
        name = item.metadata.name
        if "nvidia.com/gpu.product" not in item.metadata.labels or _count(item) == 0:
            continue
        reason = _why_not(item)
        if reason is None:
            try:
                nodes.append((item.metadata.labels.get(_CLIQUE, ""), _node(item, notes)))
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            notes.append(f"{name} is left out: {reason}")
    if not nodes:
        raise ValueError(
            "; ".join(notes)
            or "no node has the label nvidia.com/gpu.product; is GPU feature discovery (the GPU "
            "operator) installed?"
        )
    if len(nodes) > 1 and fabric is None:
        raise ValueError(
            f"labels do not say what joins the {len(nodes)} nodes; add --fabric, such as "
            "--fabric ib400, roce200x4 or eth25"
        )
    notes.append(
        "read from node labels: links are those that such machines usually have, and all memory is "
        "taken to be free"
    )
    # Racks one after the other; within one, and without any, in the order of the list.
    nodes.sort(key=lambda entry: entry[0])
    racks = _racks(nodes, notes)
    clusters = [
        Cluster(nodes=(node,), source="kubernetes", notes=tuple(notes)) for _, node in nodes
    ]
    return join(clusters, fabric=fabric).model_copy(update={"racks": racks})


def _racks(nodes: Sequence[tuple[str, Node]], notes: list[str]) -> Rack | None:
    """Return the racks that NVLink joins, by the clique of each node; None where there are none.

    Args:
        nodes: The clique (empty: no label) and the node, sorted by it.
        notes: Gets a note where nodes have cliques that cannot be told as racks.
    """
    sizes = Counter(clique for clique, _ in nodes)
    device = DEVICES[nodes[0][1].gpus[0].device]
    if max(sizes.values()) < 2 or device.scale_up != "nvswitch" or "" in sizes:
        return None
    *whole, last = sizes.values()
    alike = {(len(node.gpus), gpu.device) for _, node in nodes for gpu in node.gpus}
    if len(set(whole)) > 1 or last > (whole or [last])[0] or len(alike) > 1:
        notes.append(
            f"the nodes are of {len(sizes)} NVLink domains ({_CLIQUE}) of unequal sizes "
            f"({', '.join(map(str, sizes.values()))}): NVLink between machines is not counted on"
        )
        return None
    token = device.scale_up_token
    return Rack(
        nodes=(whole or [last])[0],
        kind=token,
        bytes_per_s=device.scale_up_bytes_per_s,
        latency_s=link_latency_s(token),
    )


def _items(text: str) -> list[_Item]:
    try:
        # One node by name comes without a list around it.
        return [_Item.model_validate_json(text)] if _ONE.search(text) else _read_list(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the text"
        raise ValueError(
            f"cannot read the list of nodes: {where}: {first['msg']}; expected the output of "
            "`kubectl get nodes -o json`"
        ) from None


def _read_list(text: str) -> list[_Item]:
    return _List.model_validate_json(text).items


def _count(item: _Item) -> int:
    text = item.metadata.labels.get("nvidia.com/gpu.count", "")
    if text.isdecimal():
        return int(text)
    return int(_quantity(item.status.capacity.get("nvidia.com/gpu", "0")))


def _why_not(item: _Item) -> str | None:
    """Return why the node takes no pods, None if it does."""
    if item.spec.unschedulable:
        return "it is cordoned"
    ready = [each.status for each in item.status.conditions if each.type == "Ready"]
    return "it is not ready" if ready and ready[0] != "True" else None


def _node(item: _Item, notes: list[str]) -> Node:
    name, labels = item.metadata.name, item.metadata.labels
    count = _count(item)
    if count > _MAX_GPUS:
        raise ValueError(f"nvidia.com/gpu.count is {count}, at most {_MAX_GPUS} expected")
    label = labels["nvidia.com/gpu.product"]
    product = _product(_SUFFIX.sub("", label))
    memory = labels.get("nvidia.com/gpu.memory", "")
    capability = tuple(
        labels.get(f"nvidia.com/gpu.compute.{part}", "") for part in ("major", "minor")
    )
    key = device_key(product)
    row = next(row for row in ROWS if row.key == key)
    total = int(memory) * _MIB if memory.isdecimal() and int(memory) else row.memory_bytes
    if label.endswith("-SHARED"):
        notes.append(f"{name}: its GPUs are shared by time slices; other pods may run on them")
    mig = "-MIG-" in label or labels.get("nvidia.com/mig.strategy") == "mixed"
    if mig:
        notes.append(f"{name}: its GPUs are cut by MIG: only slices of them can be used")
    gpus: list[Gpu] = []
    for index in range(count):
        gpu, _ = make_gpu(
            FoundGpu(
                index=index,
                name=product,
                total_memory_bytes=total,
                free_memory_bytes=total,
                compute_capability=(int(capability[0]), int(capability[1]))
                if all(part.isdecimal() for part in capability)
                else row.compute_capability,
                pcie_generation=row.pcie_generation,
                pcie_width=row.pcie_width,
                mig=mig,
            )
        )
        gpus.append(gpu)
    capacity = item.status.allocatable or item.status.capacity
    return Node(
        name=name,
        gpus=tuple(gpus),
        links=device_links(tuple(gpus)),
        num_cpus=max(1, int(_quantity(capacity.get("cpu", "1")))),
        host_memory_bytes=int(_quantity(capacity.get("memory", "0"))),
        driver=_driver(labels),
    )


def _product(label: str) -> str:
    """Return the driver's name of a GPU, whose spaces the label shows as dashes.

    >>> _product("NVIDIA-A100-SXM4-80GB")
    'NVIDIA A100-SXM4-80GB'
    """
    words = label.split("-")
    for marks in itertools.islice(itertools.product(" -", repeat=len(words) - 1), 4096):
        name = words[0] + "".join(mark + word for mark, word in zip(marks, words[1:], strict=True))
        plain = re.sub(r"^((NVIDIA|Tesla) )+", "", name)
        if any(re.fullmatch(row.pattern, plain, flags=re.IGNORECASE) for row in ROWS):
            return name
    return label.replace("-", " ")


def _driver(labels: Mapping[str, str]) -> str | None:
    full = labels.get("nvidia.com/cuda.driver-version.full")
    parts = [labels.get(f"nvidia.com/cuda.driver.{part}") for part in ("major", "minor", "rev")]
    return full or ".".join(part for part in parts if part) or None


def _quantity(text: object) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)(\w{0,2})", str(text))
    return float(match[1]) * _UNITS.get(match[2], 0.0) if match else 0.0
