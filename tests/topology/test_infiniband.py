"""RDMA ports from a made sysfs tree and from the text of the three tools."""

from pathlib import Path

import pytest
from tests.topology.captures import IBSTAT, IBSTATUS, IBV_DEVINFO

from rankwright.topology.errors import ProbeError
from rankwright.topology.readers.infiniband import read_nics
from rankwright.topology.readers.infiniband_text import parse_rdma, rdma_tool


def add_pci(root: Path, path: str) -> Path:
    folder = root / "sys/devices" / path
    folder.mkdir(parents=True)
    link = root / "sys/bus/pci/devices" / folder.name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(folder)
    return folder


def add_port(root: Path, name: str, pci: Path, port: int = 1, **files: str) -> None:
    device = root / "sys/class/infiniband" / name
    folder = device / "ports" / str(port)
    folder.mkdir(parents=True)
    if not (device / "device").exists():
        (device / "device").symlink_to(pci)
    content = {
        "rate": "400 Gb/sec (4X NDR)",
        "state": "4: ACTIVE",
        "link_layer": "InfiniBand",
        **files,
    }
    for file, text in content.items():
        (folder / file).write_text(text + "\n")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Two GPUs and a port behind one switch, a GPU and a dual port alone, each on a socket."""
    add_pci(tmp_path, "pci0000:00/0000:00:01.0/0000:01:00.0/0000:02:00.0")
    add_pci(tmp_path, "pci0000:00/0000:00:01.0/0000:01:00.0/0000:03:00.0")
    near = add_pci(tmp_path, "pci0000:00/0000:00:01.0/0000:01:00.0/0000:04:00.0")
    (near / "numa_node").write_text("0\n")
    add_pci(tmp_path, "pci0000:80/0000:80:01.0/0000:81:00.0")
    far = add_pci(tmp_path, "pci0000:80/0000:80:02.0/0000:82:00.0")
    (far / "numa_node").write_text("-1\n")
    add_port(tmp_path, "mlx5_10", near)
    add_port(tmp_path, "mlx5_2", far, rate="100 Gb/sec (4X EDR)", link_layer="Ethernet")
    add_port(tmp_path, "mlx5_2", far, port=2, state="1: DOWN")
    return tmp_path


BUSES = {0: "00000000:02:00.0", 1: "00000000:03:00.0", 2: "00000000:81:00.0"}


def test_ports_are_read_from_sysfs_with_their_nearest_gpus(machine: Path) -> None:
    nics, notes = read_nics(machine, BUSES)
    assert [nic.name for nic in nics] == ["mlx5_2:1", "mlx5_10"]
    roce, infiniband = nics
    assert (roce.bytes_per_s, roce.link_layer, roce.numa_node) == (12.5e9, "ethernet", None)
    assert (infiniband.bytes_per_s, infiniband.link_layer) == (50e9, "infiniband")
    assert infiniband.numa_node == 0
    assert (roce.nearest_gpus, infiniband.nearest_gpus) == ((2,), (0, 1))
    assert all(nic.rdma for nic in nics)
    assert notes == ("network port mlx5_2:2 is down and left out",)


def test_a_machine_without_ports_has_none(tmp_path: Path, machine: Path) -> None:
    assert read_nics(tmp_path / "empty") == ((), ())
    nics, _ = read_nics(machine)
    assert [nic.nearest_gpus for nic in nics] == [(), ()]


def test_unreadable_files_leave_a_port_out_with_a_note(machine: Path) -> None:
    port = machine / "sys/class/infiniband/mlx5_10/ports/1"
    (port / "rate").write_text("fast\n")
    nics, notes = read_nics(machine, BUSES)
    assert [nic.name for nic in nics] == ["mlx5_2:1"]
    assert "network port mlx5_10 is of unknown rate and left out" in notes


@pytest.mark.parametrize(
    ("text", "tool", "ports"),
    [
        (
            IBSTAT,
            "ibstat",
            [
                ("mlx5_0", 1, "Active", 400, "InfiniBand"),
                ("mlx4_0", 1, "Down", 10, "InfiniBand"),
                ("mlx4_0", 2, "Active", 56, "Ethernet"),
            ],
        ),
        (
            IBSTATUS,
            "ibstatus",
            [
                ("mlx5_0", 1, "Active", 400, "InfiniBand"),
                ("mlx5_1", 1, "Down", 40, "Ethernet"),
            ],
        ),
        (IBV_DEVINFO, "ibv_devinfo", [("mlx5_0", 1, "Active", 100, "InfiniBand")]),
    ],
)
def test_the_three_tools_say_the_same(
    text: str, tool: str, ports: list[tuple[object, ...]]
) -> None:
    assert rdma_tool(text) == tool
    read = parse_rdma(text).ports
    assert [(p.device, p.port, p.state, p.gbit_per_s, p.link_layer) for p in read] == ports


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("State: Active", "State: Acti", "line 5"),
        ("Rate: 400", "Rate: fast", "expected the rate"),
        ("Number of ports: 2", "Number of ports: 3", "has 3 ports, the text shows 2"),
        ("Port 2:", "Port 1:", "the port is listed twice"),
        ("mlx4_0", "mlx5_0", "the adapter is listed twice"),
        ("Link layer: Ethernet\n", "", "line 21"),
    ],
)
def test_what_cannot_be_read_with_certainty_is_refused(old: str, new: str, says: str) -> None:
    text = IBSTAT.replace(old, new)
    if old.startswith("Link layer"):  # then the rate is the last word, and may be cut
        text = text.rstrip()
    with pytest.raises(ProbeError, match=says):
        parse_rdma(text)


def test_a_short_list_has_adapters_and_no_ports() -> None:
    listing = parse_rdma("CA 'mlx5_0'\nCA 'mlx5_1'\n")
    assert (listing.devices, listing.ports) == (("mlx5_0", "mlx5_1"), ())
    with pytest.raises(ValueError, match="no RDMA adapter"):
        parse_rdma("hello")
