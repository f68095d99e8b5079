"""Reads a machine without GPUs as CPU ranks: cores and memory we may use, and how fast they are.

Cores come from the affinity mask and the cgroup's quota, memory from the kernel and the cgroup's
limit, shared evenly by the ranks. Memory bandwidth is measured with plain copies. The arithmetic
rate is an estimate, since Python cannot reach the vector units without numpy: cores x clock x the
float32 operations a clock of the widest vector unit that the CPU lists.
"""

import ctypes
import os
import re
import threading
import time
from pathlib import Path

from rankwright.topology.cluster import Gpu, Node
from rankwright.topology.shorthand import device_links

_MAX_RANKS = 8  # more processes than this gain nothing over threads; each then has several cores

# float32 operations a clock of one core, by CPU flag, widest first: two fused multiply-add units of
# 16, 8 or 4 lanes, 2 operations each; AVX without FMA adds and multiplies in separate units (Intel
# optimization manual; Arm Neoverse N1 guide). This machine class: AVX-512 at 2.0 GHz gives 128
# GFLOP/s a core, where a float32 product in torch reached 100 (Sapphire Rapids, 2026-11-21).
_FLOPS_A_CLOCK = (("avx512f", 64), ("fma", 32), ("asimd", 16), ("avx", 16), ("sse2", 8))
_DEFAULT_CLOCK_HZ = 2.0e9  # where the kernel hides it, as on Arm machines in the cloud
_SCALAR_FLOPS_A_CLOCK = 2

_BUFFER_BYTES = 64 * 2**20  # twice this is larger than the caches of most cores' share
_ALL_BUFFERS_BYTES = 512 * 2**20
_MEASURE_S = 0.15


def read_cpu(root: Path = Path("/"), *, ranks: int | None = None) -> tuple[Node, tuple[str, ...]]:
    """Return this machine as a node of CPU ranks, and notes on where its figures come from.

    Args:
        root: Where /proc and /sys are mounted.
        ranks: Number of ranks; one for each usable core, at most 8, if not given.
    """
    cores = usable_cores(root)
    ranks = ranks or min(cores, _MAX_RANKS)
    total, free = usable_memory_bytes(root)
    model, flags, clock_hz = _cpu_info(root)
    bytes_per_s = measure_memory_bytes_per_s(min(cores, _MAX_RANKS), free)
    width = next((rate for flag, rate in _FLOPS_A_CLOCK if flag in flags), _SCALAR_FLOPS_A_CLOCK)
    flops_per_s = cores * clock_hz * width / ranks
    gpus = tuple(
        Gpu(
            index=index,
            device="cpu",
            name=model,
            memory_bytes=max(free // ranks, 1),
            total_memory_bytes=max(total // ranks, 1),
            memory_bytes_per_s=bytes_per_s / ranks,
            flops_per_s={"float32": flops_per_s},
        )
        for index in range(ranks)
    )
    node = Node(
        name=os.uname().nodename or "localhost",
        gpus=gpus,
        links=device_links(gpus),
        num_cpus=cores,
        host_memory_bytes=total,
    )
    notes = (
        f"{ranks} CPU ranks share {cores} cores; memory bandwidth is measured with copies, the "
        f"arithmetic rate estimated as {clock_hz / 1e9:.1f} GHz x {width} float32 operations a "
        "clock and core",
    )
    return node, notes


def usable_cores(root: Path = Path("/")) -> int:
    """Return the cores this process may use: its affinity, within the cgroup's CPU quota."""
    # macOS has no affinity masks
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    for folder in _cgroups(root, "cpu"):
        words = _words(folder / "cpu.max")  # cgroup v2: "200000 100000" or "max 100000"
        if not words:
            words = _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
            cores = min(cores, max(1, int(words[0]) // int(words[1])))
    return cores


def usable_memory_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """Return the memory this process may use at most, and the part of it that is free."""
    text = _read(root / "proc/meminfo")
    sizes = {key: int(kib) * 1024 for key, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
    total = sizes.get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = sizes.get("MemAvailable", sizes.get("MemFree", total))
    for folder in _cgroups(root, "memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _words(folder / limit_name), _words(folder / used_name)
            if limit and limit[0].isdigit() and int(limit[0]) < total:
                total = int(limit[0])
                free = min(free, total - int(used[0]) if used and used[0].isdigit() else total)
    return total, max(free, 0)


def measure_memory_bytes_per_s(threads: int, free_bytes: int = 2**40) -> float:
    """Return the bytes/s that `threads` copies at once read and write, in about 0.2 s."""
    size = min(_BUFFER_BYTES, _ALL_BUFFERS_BYTES // (2 * threads), max(free_bytes // 8, 2**20))
    barrier = threading.Barrier(threads)
    rates = [0.0] * threads

    def copy(thread: int) -> None:
        source = ctypes.create_string_buffer(size)
        target = ctypes.create_string_buffer(size)
        ctypes.memset(source, 1, size)  # the pages must exist before the clock runs
        ctypes.memmove(target, source, size)
        barrier.wait()
        end = time.perf_counter() + _MEASURE_S
        while (start := time.perf_counter()) < end or not rates[thread]:
            ctypes.memmove(target, source, size)  # ctypes lets go of the interpreter's lock
            # The best copy counts: other work on the machine only ever slows one down.
            rates[thread] = max(rates[thread], 2 * size / (time.perf_counter() - start))

    workers = [threading.Thread(target=copy, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)


def _cpu_info(root: Path) -> tuple[str, set[str], float]:
    text = _read(root / "proc/cpuinfo")
    fields: dict[str, str] = dict(re.findall(r"^([\w ]+?)\s*:\s*(.*)$", text, re.M))
    flags: set[str] = set((fields.get("flags") or fields.get("Features") or "").split())
    mhz = re.fullmatch(r"\d+(\.\d+)?", fields.get("cpu MHz", ""))
    khz = _words(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    if khz and khz[0].isdigit():
        clock_hz = int(khz[0]) * 1e3
    elif mhz and float(mhz.group()) > 0:
        clock_hz = float(mhz.group()) * 1e6
    else:
        clock_hz = _DEFAULT_CLOCK_HZ
    return fields.get("model name") or os.uname().machine, flags, clock_hz


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Return this process's cgroup folder and its parents, for v2 and v1, that may hold limits."""
    folders: list[Path] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = base / path.strip("/")
        folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(base))]
    # In a container the path names a folder of the host; the limits then stand at the top.
    folders += [root / "sys/fs/cgroup", root / "sys/fs/cgroup" / controller]
    return list(dict.fromkeys(folders))


def _words(path: Path) -> list[str]:
    return _read(path).split()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
