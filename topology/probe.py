"""Reads the machine that we run on as a `Cluster`; captures of one are in `captures.py`.

NVML first, the text of nvidia-smi where NVML fails, CPU ranks where there is no GPU.
"""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

from rankwright.topology.cluster import Cluster, Gpu, Node
from rankwright.topology.errors import ProbeError, failure_of, find_failure
from rankwright.topology.readers.assemble import FoundGpu, FoundMachine, make_cluster, with_numa
from rankwright.topology.readers.cpu import read_cpu, usable_cores, usable_memory_bytes
from rankwright.topology.readers.infiniband import read_nics
from rankwright.topology.readers.nvidia_smi import TopoMatrix, parse_topo_m
from rankwright.topology.readers.nvidia_smi_query import (
    BASIC_FIELDS,
    QUERY_FIELDS,
    driver_of,
    parse_query,
)
from rankwright.topology.readers.nvml import read_nvml

__all__ = ["ProbeError", "probe"]

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
    nics, notes = read_nics(gpu_buses={gpu.index: gpu.bus_id for gpu in machine.gpus if gpu.bus_id})
    cluster = make_cluster(
        replace(machine, nics=nics, notes=(*machine.notes, *notes)),
        "probe",
        name=os.uname().nodename,
        num_cpus=usable_cores(),
        host_memory_bytes=usable_memory_bytes()[0],
    )
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


def _cpu_cluster() -> Cluster:
    node, notes = read_cpu()
    nics, left_out = read_nics()
    node = node.model_copy(update={"nics": nics})
    return Cluster(nodes=(node,), source="probe", notes=(*notes, *left_out))


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
    return FoundMachine(with_numa(found, matrix.numa_affinity), _kinds(found, matrix), driver, ())


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
