"""Reads the Ethernet ports of this machine from sysfs."""

from pathlib import Path

from rankwright.topology.cluster import Nic

_ETHERNET = "1"  # ARPHRD_ETHER of linux/if_arp.h; loopback is 772, InfiniBand 32


def read_ethernet(root: Path = Path("/")) -> tuple[Nic, ...]:
    """Return the Ethernet ports that are up and say how fast they are, by name.

    Only hardware counts: bridges, bonds and the ends of virtual cables have a speed too, but no
    `device`. A virtual machine's port often says -1, which is no speed.

    Args:
        root: Where /sys is mounted.
    """
    nics: list[Nic] = []
    for folder in sorted((root / "sys/class/net").glob("*")):
        speed = _read(folder / "speed")  # Mb/s
        if not (folder / "device").exists() or _read(folder / "type") != _ETHERNET:
            continue
        if _read(folder / "operstate") == "down" or not speed.isdecimal() or int(speed) == 0:
            continue
        if int(speed) == 2**32 - 1:  # how some drivers say that they do not know
            continue
        numa = _read(folder / "device/numa_node")
        nics.append(
            Nic(
                name=folder.name,
                bytes_per_s=int(speed) * 1e6 / 8,
                rdma=False,
                numa_node=int(numa) if numa.isdecimal() else None,
                link_layer="ethernet",
            )
        )
    return tuple(nics)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # a port that is down refuses to tell its speed
        return ""
