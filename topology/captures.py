"""Reads a capture of any tool that describes a machine: which tool it was, and what it said.

The kind is told from the content. What holds a whole machine, links and names, becomes a cluster.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from rankwright.topology.cluster import Cluster
from rankwright.topology.device_table import MIB
from rankwright.topology.devices import DEVICES
from rankwright.topology.errors import ProbeError, find_failure
from rankwright.topology.pci_ids import PCI_IDS
from rankwright.topology.readers.amd_smi import amd_machine, is_amd_topology, parse_amd_topology
from rankwright.topology.readers.amd_smi_gpus import is_amd_listing, parse_amd_listing
from rankwright.topology.readers.assemble import make_cluster, with_numa
from rankwright.topology.readers.found import FoundGpu, FoundMachine
from rankwright.topology.readers.infiniband_text import nics_of, parse_rdma, rdma_tool
from rankwright.topology.readers.listing import ListedGpu, found_gpu, index_of
from rankwright.topology.readers.lspci import is_pci_tree, parse_pci_tree
from rankwright.topology.readers.nccl_xml import is_nccl_xml, nics_of_xml, parse_nccl_xml
from rankwright.topology.readers.nvidia_smi import has_links, is_topo_m, parse_topo_m
from rankwright.topology.readers.nvidia_smi_log import is_smi_log, parse_smi_log
from rankwright.topology.readers.nvidia_smi_query import (
    is_list,
    is_query,
    list_names,
    list_query,
)
from rankwright.topology.readers.nvidia_smi_table import is_smi_table, parse_smi_table
from rankwright.topology.readers.nvlink_status import is_nvlink_status, parse_nvlink_status
from rankwright.topology.readers.peer_access import is_peer_access, parse_peer_access
from rankwright.topology.readers.rocm_smi import (
    RocmTopology,
    is_rocm_topology,
    parse_rocm_topology,
    rocm_machine,
)

_Page = dict[str, object]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of capture: how to know it, and how to say as JSON what is in it."""

    name: str
    matches: Callable[[str], bool]
    describe: Callable[[str], _Page]


def describe_topology_text(text: str) -> _Page:
    """Return what a capture says, as the JSON of `probe --from-file`.

    `kind` names the tool. Where pairs of GPUs are described: `matrix` (GPU x GPU tokens, `X` on the
    diagonal), `gpu_names`, `nics`, `nic_matrix` (a row a port, its token to each GPU),
    `cpu_affinity` and `numa_affinity`. Or only `error` with `class` and `message`.
    """
    try:
        kind = next((kind for kind in KINDS if kind.matches(text)), None)
        if kind is None:
            raise find_failure(text) or ValueError(
                "no topology in the text; expected the output of `nvidia-smi topo -m`, of another "
                "tool that lists GPUs or network ports, or NCCL's topology XML"
            )
        return {"kind": kind.name, **kind.describe(text)}
    except ProbeError as error:
        return {"error": {"class": error.kind, "message": str(error)}}
    except ValueError as error:
        return {"error": {"class": "no_topology", "message": str(error)}}


def probe_from_text(text: str) -> Cluster:
    """Return the machine that a capture describes.

    It needs links and names: the table of `nvidia-smi topo -m` with the output of `nvidia-smi -L`
    (or `-q`, or `--query-gpu=index,name,... --format=csv`) beside it; `rocm-smi --showtopo` with
    `--showproductname`; `amd-smi topology` with `amd-smi static`; or a topology file of NCCL, whose
    PCI ids name the GPUs. Ports that `ibstat` lists in the same capture become the node's, but
    beside NCCL's file.

    Raises:
        ProbeError: The capture holds an error of its tool, or contradicts itself.
        ValueError: Links or names are missing.
    """
    if is_nccl_xml(text):
        return make_cluster(_xml_machine(text), "NCCL topology file")
    if is_rocm_topology(text):
        return _with_ports(text, rocm_machine(text), "rocm-smi text")
    if is_amd_topology(text):
        return _with_ports(text, amd_machine(text), "amd-smi text")
    matrix = parse_topo_m(text)
    listed = _gpus_beside(text, len(matrix.gpu_names))
    if len(listed) != len(matrix.gpu_names):
        raise ProbeError(
            "inconsistent_topology",
            f"the text lists {len(listed)} GPUs and links {len(matrix.gpu_names)}; take both from "
            "one machine at one time",
        )
    kinds = {
        (index_of(listed[i]), index_of(listed[j])): token
        for i, row in enumerate(matrix.matrix)
        for j, token in enumerate(row)
        if i < j
    }
    found, left_out = _known(listed)
    rows = {index_of(gpu): row for row, gpu in enumerate(listed)}
    numa = matrix.numa_affinity
    found = with_numa(found, numa and [numa[rows[gpu.index]] for gpu in found])
    return _with_ports(text, FoundMachine(found, kinds, None, left_out), "nvidia-smi text")


def _with_ports(text: str, machine: FoundMachine, source: str) -> Cluster:
    """Return the cluster of `machine` with the ports that `ibstat` lists in the same capture."""
    if rdma_tool(text) is not None:
        nics, notes = nics_of(parse_rdma(text).ports)
        machine = replace(machine, nics=nics, notes=(*machine.notes, *notes))
    return make_cluster(machine, source)


def _gpus_beside(text: str, count: int) -> tuple[ListedGpu, ...]:
    if is_smi_log(text):
        return parse_smi_log(text).gpus
    try:
        return list_names(text)
    except ValueError as no_list:
        if "no GPU list" not in str(no_list):
            raise
    if is_query(text):
        return list_query(text)
    raise ValueError(
        f"the text shows how {count} GPUs are linked but not what they are; add the output of "
        "`nvidia-smi -L` to it"
    )


def _known(listed: Sequence[ListedGpu]) -> tuple[tuple[FoundGpu, ...], tuple[str, ...]]:
    """Return the GPUs that can be planned with, and a note on each other one.

    Raises:
        ValueError: None can.
    """
    found: list[FoundGpu] = []
    notes: list[str] = []
    unknown: ValueError | None = None
    for gpu in listed:
        try:
            found.append(found_gpu(gpu))
        except ValueError as error:  # a display card beside the accelerators, say
            unknown = error
            notes.append(f"GPU {gpu.index} is left out: {error}")
    if unknown is not None and not found:
        raise unknown
    return tuple(found), tuple(notes)


def _xml_machine(text: str) -> FoundMachine:
    topology = parse_nccl_xml(text)
    if not topology.gpus or topology.matrix is None:
        why = "; ".join(topology.notes) or (
            f"it has {topology.num_gpu_functions} GPU functions but no <gpu> elements, as the "
            "templates of clouds have; dump one on the machine with NCCL_TOPO_DUMP_FILE"
        )
        raise ValueError(f"the topology file does not tell the links of its GPUs: {why}")
    gpus: list[FoundGpu] = []
    for gpu in topology.gpus:
        key = PCI_IDS.get((gpu.vendor, gpu.device))
        if key is None:
            raise ValueError(
                f"GPU {gpu.dev} has PCI id {gpu.vendor or '?'}:{gpu.device or '?'}, which "
                "topology/pci_ids.py does not list; use `nvidia-smi topo -m` with `-L`"
            )
        memory = DEVICES[key].memory_bytes
        gpus.append(
            FoundGpu(
                index=gpu.dev,
                name=key,
                total_memory_bytes=memory,
                free_memory_bytes=memory,
                bus_id=gpu.bus_id,
                compute_capability=DEVICES[key].compute_capability,
                pcie_generation=gpu.pcie_generation,
                pcie_width=gpu.pcie_width,
                numa_node=gpu.numa_node,
            )
        )
    kinds = {
        (gpus[i].index, gpus[j].index): token
        for i, row in enumerate(topology.matrix)
        for j, token in enumerate(row)
        if i < j
    }
    return FoundMachine(tuple(gpus), kinds, None, topology.notes, nics_of_xml(topology))


def _topo_m(text: str) -> _Page:
    matrix = parse_topo_m(text)
    return {
        "matrix": _rows(matrix.matrix),
        "gpu_names": list(matrix.gpu_names),
        "nics": list(matrix.nics),
        "nic_matrix": _rows(matrix.nic_matrix),
        "cpu_affinity": _list(matrix.cpu_affinity),
        "numa_affinity": _list(matrix.numa_affinity),
        "nic_links": _rows(matrix.nic_links),
        "gpu_numa_id": _list(matrix.gpu_numa_id),
        "nic_legend": matrix.nic_legend,
    }


def _peer_access(text: str) -> _Page:
    table = parse_peer_access(text)
    return {
        "n_rows": len(table.rows),
        "matrix": _rows(table.rows),
        "gpu_names": list(table.names),
        "complete": table.complete,
    }


def _rocm_topology(text: str) -> _Page:
    return _amd_links(parse_rocm_topology(text))


def _amd_topology(text: str) -> _Page:
    topology = parse_amd_topology(text)
    page = _amd_links(topology.links)
    return {**page, "bus_ids": list(topology.buses), "access": _rows(topology.access)}


def _amd_links(topology: RocmTopology) -> _Page:
    tokens = topology.link_type
    return {
        "n_gpus": len(topology.names),
        "weight": _rows(topology.weight),
        "hops": _rows(topology.hops),
        "link_type": _rows(tokens),
        "numa_node": _list(topology.numa_node),
        "matrix": None
        if tokens is None
        else [["X" if i == j else cell for j, cell in enumerate(r)] for i, r in enumerate(tokens)],
        "gpu_names": list(topology.names),
        "nics": [],
        "nic_matrix": [],
        "cpu_affinity": None,
        "numa_affinity": _list(topology.numa_affinity),
    }


def _nccl_xml(text: str) -> _Page:
    topology = parse_nccl_xml(text)
    nodes = [None if gpu.numa_node is None else str(gpu.numa_node) for gpu in topology.gpus]
    return {
        "gpus": len(topology.gpus),
        "nets": len(topology.nets),
        "cpus": topology.num_cpus,
        "nvlinks": topology.num_nvlinks,
        "xgmi": topology.num_xgmi,
        "gpu_functions": topology.num_gpu_functions,
        "matrix": _rows(topology.matrix),
        "gpu_names": [f"GPU{gpu.dev}" for gpu in topology.gpus],
        "nics": [net.name for net in topology.nets],
        "nic_matrix": _rows(topology.nic_matrix),
        "cpu_affinity": [gpu.cpu_affinity for gpu in topology.gpus],
        "numa_affinity": nodes,
        "devices": [PCI_IDS.get((gpu.vendor, gpu.device)) for gpu in topology.gpus],
        "notes": list(topology.notes),
    }


def _nvlink_status(text: str) -> _Page:
    return {
        "gpus": [
            {
                "gpu": gpu.index,
                "name": gpu.name,
                "links": {str(link): speed for link, speed in gpu.links},
                "message": gpu.message,
            }
            for gpu in parse_nvlink_status(text)
        ]
    }


def _rdma(text: str) -> _Page:
    listing = parse_rdma(text)
    return {"nics": list(listing.devices), "ports": [asdict(port) for port in listing.ports]}


def _pci_tree(text: str) -> _Page:
    tree = parse_pci_tree(text)
    return {
        "n_gpus": len(tree.gpus),
        "gpus": [asdict(device) for device in tree.gpus],
        "nics": [device.bus_id for device in tree.nics],
        "nic_devices": [asdict(device) for device in tree.nics],
        "n_devices": tree.num_devices,
    }


def _smi_log(text: str) -> _Page:
    log = parse_smi_log(text)
    return {**_listing(log.gpus), "attached_gpus": log.attached}


def _of_list(read: Callable[[str], tuple[ListedGpu, ...]]) -> Callable[[str], _Page]:
    def describe(text: str) -> _Page:
        failure = None if read is list_query else find_failure(text)
        if failure is not None:
            raise failure
        return _listing(read(text))

    return describe


def _listing(gpus: Sequence[ListedGpu]) -> _Page:
    return {
        "n_gpus": len(gpus),
        "gpus": [_gpu_page(gpu) for gpu in gpus],
        # Without all indices, a part of the machine was asked for (-i), or lines were lost.
        "complete": [gpu.index for gpu in gpus] == list(range(len(gpus))),
    }


def _gpu_page(gpu: ListedGpu) -> _Page:
    page: _Page = asdict(gpu)
    if gpu.memory_total_bytes is not None:
        page["memory_total_mib"] = gpu.memory_total_bytes // MIB
    return page


def _amd_listing(text: str) -> _Page:
    return _listing(parse_amd_listing(text))


def _rows(rows: Sequence[Sequence[str | None]] | None) -> list[list[str | None]] | None:
    return None if rows is None else [list(row) for row in rows]


def _list(column: Sequence[str | None] | None) -> list[str | None] | None:
    return None if column is None else list(column)


# In order: a capture of several tools is of the first kind here that matches, so that tables of
# pairs go before lists. A header without rows is still taken for `topo -m`, and refused as that.
KINDS: tuple[Kind, ...] = (
    Kind("nccl_topo_xml", is_nccl_xml, _nccl_xml),
    Kind("topo_m", has_links, _topo_m),
    Kind("rocm_showtopo", is_rocm_topology, _rocm_topology),
    Kind("amd_smi_topology", is_amd_topology, _amd_topology),
    Kind("topo_p2p", is_peer_access, _peer_access),
    Kind("topo_m", is_topo_m, _topo_m),
    Kind("smi_q", is_smi_log, _smi_log),
    Kind("amd_smi_static", is_amd_listing, _amd_listing),
    Kind("smi_table", is_smi_table, _of_list(parse_smi_table)),
    Kind("query_gpu_csv", is_query, _of_list(list_query)),
    Kind("nvlink_status", is_nvlink_status, _nvlink_status),
    Kind("smi_L", is_list, _of_list(list_names)),
    Kind("ibstat", lambda text: rdma_tool(text) == "ibstat", _rdma),
    Kind("ibstatus", lambda text: rdma_tool(text) == "ibstatus", _rdma),
    Kind("ibv_devinfo", lambda text: rdma_tool(text) == "ibv_devinfo", _rdma),
    Kind("lspci_tv", is_pci_tree, _pci_tree),
)
