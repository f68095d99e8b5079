"""Reads `ibstat`, `ibstatus` and `ibv_devinfo`: the ports of RDMA adapters, InfiniBand or RoCE."""

import re
from dataclasses import dataclass, replace

from rankwright.topology.cluster import Nic
from rankwright.topology.readers.text import numbered_lines, refusal

# Where a tool names an adapter, and a port of it; ibstatus names both at once.
_DEVICES = {
    "ibstat": re.compile(r"\s*CA '([\w.:-]+)'\s*$"),
    "ibstatus": re.compile(r"\s*Infiniband device '([\w.:-]+)' port (\d+) status:\s*$"),
    "ibv_devinfo": re.compile(r"\s*hca_id:\s*([\w.:-]+)\s*$"),
}
_PORT = re.compile(r"\s*port(?::\s+| )(\d{1,3}):?\s*$", re.IGNORECASE)
_FIELDS = {
    "state": "state",
    "rate": "rate",
    "link layer": "link_layer",
    "link_layer": "link_layer",
    "active_width": "width",
    "active_speed": "speed",
    "number of ports": "num_ports",
    "phys_port_cnt": "num_ports",
}
_PATTERNS = {
    "state": r"(?:\d: )?(?:PORT_)?([A-Za-z_]+)(?: \(\d\))?",
    "rate": r"(\d{1,4}(?:\.\d+)?)(?: Gb/sec.*| \(\w+\))?",
    "link_layer": r"(InfiniBand|IB|Ethernet|Unspecified|Unknown)",
    "width": r"(\d{1,2}X|invalid width)(?: \(\d+\))?",
    "speed": r"(\d{1,3}(?:\.\d+)? Gbps|invalid speed)(?: \(\d+\))?",  # one newer than the tool
    "num_ports": r"(\d{1,3})",
}
_STATES = {
    "active": "Active",
    "down": "Down",
    "init": "Initializing",
    "initializing": "Initializing",
    "armed": "Armed",
    "active_defer": "ActiveDefer",
    "nop": "NoStateChange",
}


@dataclass(frozen=True, slots=True)
class RdmaPort:
    """One port; None where the tool does not say."""

    device: str
    port: int
    state: str | None = None
    gbit_per_s: float | None = None
    link_layer: str | None = None


@dataclass(frozen=True, slots=True)
class RdmaListing:
    """Adapters in the order printed, and their ports (none in the short list of `ibstat -l`)."""

    tool: str
    devices: tuple[str, ...]
    ports: tuple[RdmaPort, ...]


def rdma_tool(text: str) -> str | None:
    """Return which of the three tools printed the text, None if it was none of them."""
    for _, line in numbered_lines(text):
        for tool, pattern in _DEVICES.items():
            if pattern.match(line):
                return tool
    return None


def parse_rdma(text: str) -> RdmaListing:
    """Return the adapters and ports that ibstat, ibstatus or ibv_devinfo printed.

    Raises:
        ProbeError: A field cannot be read, a port belongs to no adapter, or ports are missing.
        ValueError: The text is of none of the three.
    """
    tool = rdma_tool(text)
    if tool is None:
        raise ValueError(
            "no RDMA adapter in the text; expected the output of ibstat, ibstatus or ibv_devinfo"
        )
    lines = numbered_lines(text)
    devices: list[str] = []
    ports: list[RdmaPort] = []
    declared: dict[str, int] = {}
    width: float | None = None
    for number, line in lines:
        device = _DEVICES[tool].match(line)
        port = _PORT.match(line)
        if device is not None:
            if tool != "ibstatus" and device[1] in devices:
                raise refusal(number, line, "the adapter is listed twice")
            if device[1] not in devices:
                devices.append(device[1])
        if tool == "ibstatus" and device is not None:
            port = re.match(r".*port (\d+) status", line)
        if port is not None and devices:
            if any((known.device, known.port) == (devices[-1], int(port[1])) for known in ports):
                raise refusal(number, line, "the port is listed twice")
            ports.append(RdmaPort(devices[-1], int(port[1])))
            continue
        key, colon, rest = line.partition(":")
        field = _FIELDS.get(key.strip().lower())
        if device is not None or not colon or field is None or not devices:
            continue
        value = re.fullmatch(_PATTERNS[field], rest.strip(), re.IGNORECASE)
        # The last line may be cut inside a number, and still look like one.
        if value is None or (number == len(lines) and field in ("rate", "speed")):
            raise refusal(number, line, f"expected the {field.replace('_', ' ')} of a port")
        if field == "num_ports":
            declared[devices[-1]] = int(value[1])
            continue
        if not ports or ports[-1].device != devices[-1]:
            raise refusal(number, line, "belongs to no port")
        if field == "width":
            width = float(value[1][:-1]) if value[1][0].isdigit() else None
            continue
        ports[-1] = _with_field(number, line, ports[-1], field, value[1], width)
    for name, count in declared.items():
        found = sum(port.device == name for port in ports)
        if found != count:
            raise refusal(len(lines), name, f"has {count} ports, the text shows {found}")
    return RdmaListing(tool, tuple(devices), tuple(ports))


def nics_of(ports: tuple[RdmaPort, ...]) -> tuple[tuple[Nic, ...], tuple[str, ...]]:
    """Return the active ports of known rate as `Nic`, and a note on each port left out."""
    nics: list[Nic] = []
    notes: list[str] = []
    several = {port.device for port in ports if port.port > 1}
    for port in ports:
        name = f"{port.device}:{port.port}" if port.device in several else port.device
        if port.state != "Active" or not port.gbit_per_s:
            why = "of unknown rate" if port.state == "Active" else (port.state or "of no state")
            notes.append(f"network port {name} is {why.lower()} and left out")
            continue
        layer = (port.link_layer or "").lower()
        layer = "infiniband" if layer == "ib" else layer  # in old versions of ibstat
        nics.append(
            Nic(
                name=name,
                bytes_per_s=port.gbit_per_s * 1e9 / 8,
                rdma=True,  # each of these tools lists RDMA devices only
                link_layer=layer if layer in ("infiniband", "ethernet") else None,
            )
        )
    return tuple(nics), tuple(notes)


def _with_field(
    number: int, line: str, port: RdmaPort, field: str, value: str, width: float | None
) -> RdmaPort:
    if field == "state":
        state = _STATES.get(value.lower())
        if state is None:
            raise refusal(number, line, f"expected a state of {', '.join(_STATES)}")
        return replace(port, state=state)
    if field == "rate":
        return replace(port, gbit_per_s=float(value))
    if field == "speed":
        if width is None or not value[0].isdigit():
            return port
        return replace(port, gbit_per_s=width * float(value.split()[0]))
    return replace(port, link_layer=value)
