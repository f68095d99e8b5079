"""Reads the machine that we run on as a `Cluster`; captures of one are in `captures.py`.

NVML first, the text of nvidia-smi where NVML fails, amd-smi or rocm-smi where there is no GPU of
NVIDIA's; CPU ranks where there is none of AMD's either.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rankwright.topology.cluster import Cluster, Gpu, Node
from rankwright.topology.errors import ProbeError, failure_of
from rankwright.topology.readers.amd_smi_tool import read_amd
from rankwright.topology.readers.assemble import make_cluster
from rankwright.topology.readers.cpu import read_cpu, usable_cores, usable_memory_bytes
from rankwright.topology.readers.found import FoundMachine
from rankwright.topology.readers.infiniband import read_nics
from rankwright.topology.readers.nvidia_smi_tool import read_nvidia_smi
from rankwright.topology.readers.nvml import read_nvml

__all__ = ["ProbeError", "probe"]

# A machine with such a failure has no NVIDIA GPU as far as we can tell, which is no error unless a
# GPU was asked for. All other failures mean a GPU that is there and does not work: never hidden.
_NO_GPU = {"nvml_library_not_found", "nvml_binding_missing", "no_devices", "tool_not_found"}


def probe(*, require_gpu: bool = False) -> Cluster:
    """Return this machine: its GPUs and their links, or CPU ranks if it has none.

    `CUDA_VISIBLE_DEVICES` is respected (`HIP_VISIBLE_DEVICES` goes before it on AMD); the GPUs left
    keep their index in PCI order.

    Args:
        require_gpu: Refuse to fall back on CPU ranks.

    Raises:
        ProbeError: The driver is broken, or a GPU was required and there is none; `kind` is the
            class and the message ends with the remedy.
    """
    variable = "CUDA_VISIBLE_DEVICES"
    try:
        machine = _read_gpus()
    except ProbeError as error:
        if error.kind not in _NO_GPU and not _driver_absent(error):
            raise
        amd, notes = _read_amd()
        if amd is None and require_gpu:
            raise
        if amd is None:
            return _cpu_cluster(notes)
        machine = amd
        if "HIP_VISIBLE_DEVICES" in os.environ:
            variable = "HIP_VISIBLE_DEVICES"
    nics, notes = read_nics(gpu_buses={gpu.index: gpu.bus_id for gpu in machine.gpus if gpu.bus_id})
    cluster = make_cluster(
        replace(machine, nics=nics, notes=(*machine.notes, *notes)),
        "probe",
        name=os.uname().nodename,
        num_cpus=usable_cores(),
        host_memory_bytes=usable_memory_bytes()[0],
    )
    visible = os.environ.get(variable)
    if visible is None:
        return cluster
    node = _visible(cluster.nodes[0], visible)
    if node is not None:
        notes = (*cluster.notes, f"limited by {variable}={visible}")
        return cluster.model_copy(update={"nodes": (node,), "notes": notes})
    if require_gpu:
        raise failure_of("no_devices", f"{variable}={visible!r} hides every GPU")
    return _cpu_cluster()


def _cpu_cluster(more: tuple[str, ...] = ()) -> Cluster:
    node, notes = read_cpu()
    nics, left_out = read_nics()
    node = node.model_copy(update={"nics": nics})
    return Cluster(nodes=(node,), source="probe", notes=(*notes, *left_out, *more))


def _read_amd() -> tuple[FoundMachine | None, tuple[str, ...]]:
    """Return the AMD GPUs of this machine, None where there is none that we could run on.

    Raises:
        ProbeError: There are some, and they cannot be read.
    """
    try:
        return read_amd(), ()
    except ProbeError as error:
        there = any(map(_is_amd_accelerator, _pci_devices()))
        if error.kind == "tool_not_found" and there:
            return None, (f"this machine has AMD accelerators, but {error}: they are left out",)
        if error.kind in _NO_GPU and not there:
            return None, ()
        raise


def _read_gpus() -> FoundMachine:
    try:
        return read_nvml()
    except ProbeError as nvml_error:
        if nvml_error.kind == "driver_hung":  # nvidia-smi would hang as well
            raise
        try:
            return read_nvidia_smi()
        except ProbeError as smi_error:
            # The tool's absence says less than what NVML met.
            raise (nvml_error if smi_error.kind == "tool_not_found" else smi_error) from None


def _driver_absent(error: ProbeError) -> bool:
    """Whether `driver_not_loaded` only means that a library came without any NVIDIA hardware."""
    return error.kind == "driver_not_loaded" and not any(
        _read(device / "vendor") == "0x10de" for device in _pci_devices()
    )


def _pci_devices() -> Iterator[Path]:
    return Path("/sys/bus/pci/devices").glob("*")


def _is_amd_accelerator(device: Path) -> bool:
    # Instinct boards are of class "processing accelerator" or "display, other".
    return _read(device / "vendor") == "0x1002" and _read(device / "class")[:6] in (
        "0x1200",
        "0x0380",
    )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


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
