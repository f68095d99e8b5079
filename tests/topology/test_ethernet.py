"""Ethernet ports, from a made-up sysfs."""

from pathlib import Path

import pytest

from rankwright.topology.readers.ethernet import read_ethernet


def port(root: Path, name: str, speed: str | None, *, hardware: bool = True, **files: str) -> None:
    folder = root / "sys/class/net" / name
    folder.mkdir(parents=True)
    for file, text in {"type": "1", "operstate": "up", **files}.items():
        (folder / file).write_text(text + "\n")
    if speed is not None:
        (folder / "speed").write_text(speed + "\n")
    if hardware:
        (folder / "device").mkdir()
        (folder / "device/numa_node").write_text("1\n")


def test_ports_that_are_up_and_say_their_speed_count(tmp_path: Path) -> None:
    port(tmp_path, "eno1", "25000")
    port(tmp_path, "eno2", "100000", operstate="down")
    port(tmp_path, "bond0", "50000", hardware=False)
    port(tmp_path, "lo", None, hardware=False, type="772")
    port(tmp_path, "ib0", "400000", type="32")
    (nic,) = read_ethernet(tmp_path)
    assert (nic.name, nic.bytes_per_s, nic.rdma, nic.numa_node) == ("eno1", 25e9 / 8, False, 1)


@pytest.mark.parametrize("speed", ["-1", "4294967295", "0", "", None, "fast"])
def test_a_port_that_does_not_know_its_speed_is_left_out(speed: str | None, tmp_path: Path) -> None:
    port(tmp_path, "eth0", speed)
    assert read_ethernet(tmp_path) == ()
