"""Reads the RDMA ports of this machine, InfiniBand or RoCE, from sysfs; from `ibstat` without it.

sysfs is the kernel's own word and needs no tool. A container may hide it and still have `ibstat`.
"""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from rankwright.topology.cluster import Nic
from rankwright.topology.errors import ProbeError
from rankwright.topology.readers.infiniband_text import RdmaPort, nics_of, parse_rdma

_IBSTAT_TIMEOUT_S = 10


def read_nics(
    root: Path = Path("/"), gpu_buses: Mapping[int, str] | None = None
) -> tuple[tuple[Nic, ...], tuple[str, ...]]:
    """Return the active RDMA ports, nearest GPUs included, and notes on those left out.

    Args:
        root: Where /sys is mounted.
        gpu_buses: PCI bus id of each GPU by index, to tell which are nearest to a port.
    """
    folder = root / "sys/class/infiniband"
    if not folder.is_dir():
        return _from_ibstat() if root == Path("/") else ((), ())
    devices = sorted(folder.iterdir(), key=lambda path: _natural(path.name))
    nics: list[Nic] = []
    notes: list[str] = []
    paths = {index: _pci_path(root, bus) for index, bus in (gpu_buses or {}).items()}
    for device in devices:
        found, left_out = nics_of(_ports(device))
        numa = _number(device / "device/numa_node")
        place = _resolved(device / "device")
        update = {
            "numa_node": numa if numa is not None and numa >= 0 else None,
            "nearest_gpus": _nearest(place, paths),
        }
        nics += [nic.model_copy(update=update) for nic in found]
        notes += left_out
    return tuple(nics), tuple(notes)


def _ports(device: Path) -> tuple[RdmaPort, ...]:
    ports: list[RdmaPort] = []
    for folder in sorted((device / "ports").glob("*"), key=lambda path: _natural(path.name)):
        if not folder.name.isdigit():
            continue
        rate = re.match(r"(\d+(?:\.\d+)?) Gb/sec", _read(folder / "rate"))
        state = re.match(r"\d+: (\w+)", _read(folder / "state"))
        ports.append(
            RdmaPort(
                device=device.name,
                port=int(folder.name),
                state=state[1].capitalize() if state else None,
                gbit_per_s=float(rate[1]) if rate else None,
                link_layer=_read(folder / "link_layer") or None,
            )
        )
    return tuple(ports)


def _from_ibstat() -> tuple[tuple[Nic, ...], tuple[str, ...]]:
    try:
        done = subprocess.run(
            ["ibstat"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_IBSTAT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return (), ()  # no RDMA adapter, as on most machines
    try:
        return nics_of(parse_rdma(done.stdout).ports)
    except ProbeError as error:
        return (), (f"ibstat cannot be read: {error}",)
    except ValueError:
        return (), ()


def _nearest(place: tuple[str, ...], gpus: Mapping[int, tuple[str, ...]]) -> tuple[int, ...]:
    """Return the GPUs that share the longest stretch of the PCI tree with a port, if any does."""
    shared: dict[int, int] = {}
    for index, path in gpus.items():
        depth = 0
        while depth < min(len(path), len(place)) and path[depth] == place[depth]:
            depth += 1
        # A path is .../pci0000:00/0000:00:01.0/...: without a common root they only share folders.
        if any(re.match(r"pci[0-9a-f]{4,}:", part) for part in path[:depth]):
            shared[index] = depth
    best = max(shared.values(), default=0)
    return tuple(index for index, depth in shared.items() if depth == best)


def _pci_path(root: Path, bus: str) -> tuple[str, ...]:
    # NVML prints eight digits of PCI domain, sysfs four.
    domain, _, rest = bus.lower().partition(":")
    return _resolved(root / "sys/bus/pci/devices" / f"{domain[-4:]}:{rest}")


def _resolved(path: Path) -> tuple[str, ...]:
    try:
        return path.resolve(strict=True).parts
    except (OSError, RuntimeError):
        return ()


def _natural(name: str) -> tuple[str | int, ...]:
    """Return a key that sorts mlx5_2 before mlx5_10."""
    parts = re.split(r"(\d+)", name)
    return tuple(int(part) if at % 2 else part for at, part in enumerate(parts))


def _number(path: Path) -> int | None:
    match = re.fullmatch(r"-?\d{1,6}", _read(path))
    return int(match.group()) if match else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
