"""CPUs beside a GPU, from what Linux says of both."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rankwright.executor.numa import bind_to_gpu, cpus_beside

ADDRESS = "0000:1b:00.0"


def sysfs(folder: Path, node: str, cpus: str) -> Path:
    device = folder / "bus/pci/devices" / ADDRESS
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    place = folder / f"devices/system/node/node{node}"
    place.mkdir(parents=True)
    (place / "cpulist").write_text(f"{cpus}\n")
    return folder


@pytest.mark.parametrize(
    ("cpus", "expected"),
    [("0-3,8-9", {0, 1, 2, 3, 8, 9}), ("7", {7}), ("", set())],
)
def test_cpus_are_those_of_the_node(tmp_path: Path, cpus: str, expected: set[int]) -> None:
    assert cpus_beside(ADDRESS, sysfs(tmp_path, "1", cpus)) == expected


def test_a_machine_that_names_no_node_binds_nothing(tmp_path: Path) -> None:
    sysfs(tmp_path, "-1", "0")
    (tmp_path / "devices/system/node/node-1/cpulist").unlink()
    assert cpus_beside(ADDRESS, tmp_path) == set()
    assert cpus_beside("0000:ff:00.0", tmp_path) == set()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
@pytest.mark.parametrize("allowed", [True, False])
def test_a_rank_stays_on_cpus_that_it_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    before = os.sched_getaffinity(0)
    cpu = min(before) if allowed else max(before) + 1
    place = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: place)
    try:
        bind_to_gpu(torch.device("cuda", 0), sysfs(tmp_path, "1", str(cpu)))
        assert os.sched_getaffinity(0) == ({cpu} if allowed else before)
    finally:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), before)
