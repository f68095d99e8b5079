"""CPU ranks: what this process may use, from files of a made-up root."""

import os
from pathlib import Path

import pytest

from rankwright.topology.devices import flops_per_s, memory_bytes_per_s
from rankwright.topology.readers.cpu import (
    measure_memory_bytes_per_s,
    read_cpu,
    usable_cores,
    usable_memory_bytes,
)

MEMINFO = "MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:   12000000 kB\n"
CPUINFO = (
    "processor\t: 0\nmodel name\t: Some CPU\ncpu MHz\t\t: 2500.000\nflags\t\t: fpu sse2 avx fma\n"
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def _four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2, 3}, raising=False)


@pytest.mark.usefixtures("_four_cores")
@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 4),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/hidden\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
    ],
)
def test_cores_are_limited_by_affinity_and_quota(
    tmp_path: Path, files: dict[str, str], cores: int
) -> None:
    assert usable_cores(write(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("files", "total", "free"),
    [
        ({}, 16_000_000 * 1024, 12_000_000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/job\n",
                "sys/fs/cgroup/job/memory.max": "4000000000\n",
                "sys/fs/cgroup/job/memory.current": "1000000000\n",
            },
            4_000_000_000,
            3_000_000_000,
        ),
        (
            {"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max": "max\n"},
            16_000_000 * 1024,
            12_000_000 * 1024,
        ),
        (
            {
                "proc/self/cgroup": "9:memory:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "2000000000\n",
            },
            2_000_000_000,
            2_000_000_000,
        ),
    ],
)
def test_memory_is_limited_by_the_cgroup(
    tmp_path: Path, files: dict[str, str], total: int, free: int
) -> None:
    root = write(tmp_path, {"proc/meminfo": MEMINFO, **files})
    assert usable_memory_bytes(root) == (total, free)


@pytest.mark.usefixtures("_four_cores")
def test_ranks_share_cores_and_memory_evenly(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/meminfo": MEMINFO, "proc/cpuinfo": CPUINFO})
    node, notes = read_cpu(root, ranks=2)
    assert node.num_cpus == 4
    assert len(node.gpus) == 2
    rank = node.gpus[1]
    assert (rank.device, rank.name, rank.index) == ("cpu", "Some CPU", 1)
    assert rank.memory_bytes == 6_000_000 * 1024
    assert rank.total_memory_bytes == 8_000_000 * 1024
    # 2 cores a rank, 2.5 GHz, two fused multiply-adds of 8 lanes
    assert flops_per_s(rank, "float32") == 2 * 2.5e9 * 32
    assert memory_bytes_per_s(rank) > 1e8
    assert "estimated" in notes[0]
    assert len(read_cpu(root)[0].gpus) == 4


def test_a_machine_that_hides_everything_still_gives_a_rank(tmp_path: Path) -> None:
    node, _ = read_cpu(tmp_path, ranks=1)
    assert node.gpus[0].memory_bytes > 1
    assert flops_per_s(node.gpus[0], "float32") > 0


def test_copies_are_measured_at_a_plausible_rate() -> None:
    assert 1e8 < measure_memory_bytes_per_s(1, free_bytes=2**30) < 1e12
