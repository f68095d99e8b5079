"""Reads the machine that we run on, or a capture of its tools' output, as a `Cluster`.

NVML first, the text of nvidia-smi where NVML fails, CPU ranks where there is no GPU.
"""

import os
import subprocess
from pathlib import Path

from rankwright.topology.cluster import Cluster, Gpu, Node
from rankwright.topology.errors import ProbeError, failure_of, find_failure
from rankwright.topology.readers.assemble import FoundGpu, make_gpu, make_links
from rankwright.topology.readers.cpu import read_cpu, usable_cores, usable_memory_bytes
from rankwright.topology.readers.nvidia_smi import TopoMatrix, parse_topo_m
from rankwright.topology.readers.nvidia_smi_query import (
    BASIC_FIELDS,
    QUERY_FIELDS,
    driver_of,
    parse_list,
    parse_query,
)
from rankwright.topology.readers.nvml import FoundMachine, read_nvml

__all__ = ["ProbeError", "describe_topology_text", "probe", "probe_from_text"]

# A machine with such a failure has no NVIDIA GPU as far as we can tell, which is no error unless a
# GPU was asked for. All other failures mean a GPU that is there and does not work: never hidden.
_NO_GPU = {"nvml_library_not_found", "nvml_binding_missing", "no_devices", "tool_not_found"}

# A hung driver keeps nvidia-smi for ever; one that works answers within 3 s. Eight GPUs without
# persistence mode take 20 to 30 s to wake, but NVML, which is asked first, has then woken them.
_SMI_TIMEOUT_S = 10.0


def probe(*, require_gpu: bool = False) -> Cluster:
    """Return this machine: its GPUs and their links, or CPU ranks if it has none.

    `CUDA_VISIBLE_DEVICES` is respected; the GPUs left keep their index in PCI order.

    Args:
        require_gpu: Refuse to fall back on CPU ranks.

    Raises:
        ProbeError: The driver is broken, or a GPU was required and there is none; `kind` is the
            class and the message ends with the remedy.
    """
    try:
        machine = _read_gpus()
    except ProbeError as error:
        if require_gpu or (error.kind not in _NO_GPU and not _driver_absent(error)):
            raise
        return _cpu_cluster()
    cluster = _cluster(machine, "probe")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return cluster
    node = _visible(cluster.nodes[0], visible)
    if node is not None:
        notes = (*cluster.notes, f"limited by CUDA_VISIBLE_DEVICES={visible}")
        return cluster.model_copy(update={"nodes": (node,), "notes": notes})
    if require_gpu:
        raise failure_of("no_devices", f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU")
    return _cpu_cluster()


def probe_from_text(text: str) -> Cluster:
    """Return the machine that a capture of nvidia-smi describes.

    The capture needs the table of `topo -m`, which does not say what the GPUs are, and before or
    after it the output of `nvidia-smi -L` or of `--query-gpu=index,name,... --format=csv`.

    Raises:
        ProbeError: The capture holds an error of nvidia-smi, or contradicts itself.
        ValueError: One of the two is missing.
    """
    matrix = parse_topo_m(text)
    try:
        found = parse_list(text)
    except ValueError as no_list:
        if "no GPU list" not in str(no_list):
            raise
        try:
            found = parse_query(text)
        except ValueError:
            raise ValueError(
                f"the text shows how {len(matrix.gpu_names)} GPUs are linked but not what they "
                "are; add the output of `nvidia-smi -L` to it"
            ) from None
    if len(found) != len(matrix.gpu_names):
        raise ProbeError(
            "inconsistent_topology",
            f"the text lists {len(found)} GPUs and links {len(matrix.gpu_names)}; take both from "
            "one machine at one time",
        )
    machine = FoundMachine(_with_numa(found, matrix), _kinds(found, matrix), None, ())
    return _cluster(machine, "nvidia-smi text")


def describe_topology_text(text: str) -> dict[str, object]:
    """Return what a capture of `nvidia-smi topo -m` says, as the JSON of `probe --from-file`.

    Keys: `matrix` (GPU x GPU tokens), `gpu_names`, `nics`, `nic_matrix` (a row a port, its token to
    each GPU), `cpu_affinity`, `numa_affinity`, and besides them `nic_links` (port x port),
    `gpu_numa_id` and `nic_legend`; or only `error` with `class` and `message`.
    """
    try:
        matrix = parse_topo_m(text)
    except ProbeError as error:
        return {"error": {"class": error.kind, "message": str(error)}}
    except ValueError as error:
        return {"error": {"class": "no_topology", "message": str(error)}}
    return {
        "matrix": [list(row) for row in matrix.matrix],
        "gpu_names": list(matrix.gpu_names),
        "nics": list(matrix.nics),
        "nic_matrix": [list(row) for row in matrix.nic_matrix],
        "cpu_affinity": _list(matrix.cpu_affinity),
        "numa_affinity": _list(matrix.numa_affinity),
        "nic_links": [list(row) for row in matrix.nic_links],
        "gpu_numa_id": _list(matrix.gpu_numa_id),
        "nic_legend": matrix.nic_legend,
    }


def _cpu_cluster() -> Cluster:
    node, notes = read_cpu()
    return Cluster(nodes=(node,), source="probe", notes=notes)


def _list(column: tuple[str | None, ...] | None) -> list[str | None] | None:
    return None if column is None else list(column)


def _read_gpus() -> FoundMachine:
    try:
        return read_nvml()
    except ProbeError as nvml_error:
        try:
            return _read_nvidia_smi()
        except ProbeError as smi_error:
            # The tool's absence says less than what NVML met.
            raise (nvml_error if smi_error.kind == "tool_not_found" else smi_error) from None


def _driver_absent(error: ProbeError) -> bool:
    """Whether `driver_not_loaded` only means that a library came without any NVIDIA hardware."""
    return error.kind == "driver_not_loaded" and not any(
        _is_nvidia(device) for device in Path("/sys/bus/pci/devices").glob("*/vendor")
    )


def _is_nvidia(vendor: Path) -> bool:
    try:
        return vendor.read_text().strip() == "0x10de"
    except OSError:
        return False


def _read_nvidia_smi() -> FoundMachine:
    for fields in (QUERY_FIELDS, BASIC_FIELDS):  # older drivers refuse a field they do not know
        output = _run("--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits")
        if "is not a valid field" not in output:
            break
    found = parse_query(output, fields)
    driver = driver_of(output, fields)
    if len(found) == 1:
        return FoundMachine(found, {}, driver, ())
    try:
        matrix = parse_topo_m(_run("topo", "-m"))
    except ValueError:  # a driver or a container that cannot tell
        note = "nvidia-smi topo -m failed: all pairs of GPUs are taken to meet in the CPU (SYS)"
        return FoundMachine(found, {}, driver, (note,))
    if len(matrix.gpu_names) != len(found):
        raise ProbeError(
            "inconsistent_topology",
            f"nvidia-smi lists {len(found)} GPUs and links {len(matrix.gpu_names)}; run "
            "`rankwright doctor`",
        )
    return FoundMachine(_with_numa(found, matrix), _kinds(found, matrix), driver, ())


def _run(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SMI_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise failure_of("tool_not_found", "nvidia-smi") from None
    except subprocess.TimeoutExpired:
        raise failure_of("tool_hung", f"no answer within {_SMI_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise failure_of("driver_not_loaded", f"nvidia-smi: {error}") from None
    text = done.stdout + done.stderr
    failure = find_failure(text)
    if failure is not None:
        raise failure
    return text


def _kinds(found: tuple[FoundGpu, ...], matrix: TopoMatrix) -> dict[tuple[int, int], str]:
    return {
        (found[i].index, found[j].index): token
        for i, row in enumerate(matrix.matrix)
        for j, token in enumerate(row)
        if i < j
    }


def _with_numa(found: tuple[FoundGpu, ...], matrix: TopoMatrix) -> tuple[FoundGpu, ...]:
    nodes = matrix.numa_affinity or (None,) * len(found)
    return tuple(
        FoundGpu(
            index=gpu.index,
            name=gpu.name,
            total_memory_bytes=gpu.total_memory_bytes,
            free_memory_bytes=gpu.free_memory_bytes,
            uuid=gpu.uuid,
            compute_capability=gpu.compute_capability,
            pcie_generation=gpu.pcie_generation,
            pcie_width=gpu.pcie_width,
            numa_node=int(node) if node is not None and node.isdigit() else None,
            mig=gpu.mig,
        )
        for gpu, node in zip(found, nodes, strict=True)
    )


def _cluster(machine: FoundMachine, source: str) -> Cluster:
    gpus: list[Gpu] = []
    notes = list(machine.notes)
    for found in machine.gpus:
        try:
            gpu, note = make_gpu(found)
        except ValueError as error:  # a display card beside the accelerators, say
            notes.append(f"GPU {found.index} is left out: {error}")
            continue
        gpus.append(gpu)
        if note is not None:
            notes.append(note)
        if gpu.mig:
            notes.append(f"GPU {gpu.index} is in MIG mode: only slices of it can be used")
    if not gpus:
        raise ProbeError("unsupported_gpu", "; ".join(notes))
    here = source == "probe"
    node = Node(
        name=os.uname().nodename if here else "captured",
        gpus=tuple(gpus),
        links=make_links(gpus, machine.kinds),
        num_cpus=usable_cores() if here else 1,
        host_memory_bytes=usable_memory_bytes()[0] if here else 0,
        driver=machine.driver,
    )
    return Cluster(nodes=(node,), source=source, notes=tuple(notes))


def _visible(node: Node, visible: str) -> Node | None:
    """Return the node with the GPUs that CUDA would show, None if it would show none.

    As CUDA reads the variable: indices or UUID prefixes, and everything from the first entry that
    names no GPU on is ignored.
    """
    chosen: list[Gpu] = []
    for entry in visible.split(","):
        word = entry.strip()
        match = next(
            (
                gpu
                for gpu in node.gpus
                if (word.isdigit() and gpu.index == int(word))
                or (word.startswith("GPU-") and (gpu.uuid or "").startswith(word))
            ),
            None,
        )
        if match is None or match in chosen:
            break
        chosen.append(match)
    if not chosen:
        return None
    kept = {gpu.index for gpu in chosen}
    return node.model_copy(
        update={
            "gpus": tuple(gpu for gpu in node.gpus if gpu.index in kept),
            "links": tuple(link for link in node.links if link.a in kept and link.b in kept),
        }
    )
