"""Compiles a start's kernels beside it: on all CPUs, while ranks open their GPUs and load weights.

A rank that compiles each kernel when it first needs it compiles them one after another: on an H200
that was 12 s of the 27 s of a first start of Qwen3-30B-A3B, and what calls them 3.5 s more.

torchrun's agent forks the compiler before it starts ranks. What to compile is found without a GPU
(`dry_run.py`), and goes to Triton's cache on disk. The compiler holds a lock for as long as it
lives, and ranks wait for that before their first step: should it fail, they compile for themselves.
"""

import ctypes
import fcntl
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from rankwright.executor.dry_run import Launch, launches_of
from rankwright.executor.run_options import node_order
from rankwright.kernels.gpu_facts import GpuFacts
from rankwright.planner.plan import Plan, RankPlan
from rankwright.planner.read_plan import read_plan

_LOCK = "kernels.lock"
# A start compiles some 40 kernels, and waits for the slowest in any case.
_MOST_PROCESSES = 32
_SET_PARENT_DEATH_SIGNAL = 1  # linux/prctl.h


def fork_compiler(plan_path: Path, node_rank: int, run_dir: Path) -> None:
    """Start to compile what the ranks of machine `node_rank` launch; does not wait.

    Args:
        plan_path: What will run.
        node_rank: Number of this machine.
        run_dir: Where ranks will look for the lock.
    """
    lock = os.open(run_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    if os.fork():
        os.close(lock)  # the child's now
        return
    code = 1
    try:
        _die_with_parent()
        os.nice(5)  # ranks that start come first
        compile_all(kernels_of_node(read_plan(plan_path), node_rank), _num_processes())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait_for_compiler(run_dir: Path, say: Callable[[str], None] = lambda text: None) -> bool:
    """Return when no compiler works here any more, and whether there ever was one."""
    try:
        lock = os.open(run_dir / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        say("kernels are being compiled")
        fcntl.flock(lock, fcntl.LOCK_SH)
    finally:
        os.close(lock)
    return True


def kernels_of_node(plan: Plan, node_rank: int) -> list[Launch]:
    """Return what the ranks of a machine launch, each version once; asks CUDA for its GPUs."""
    # Here, not at the top: macOS has no Triton, and no GPU to compile for.
    from triton.backends.compiler import GPUTarget

    from rankwright.executor.worker import DTYPES, rank_device

    found: dict[Launch, None] = {}
    if torch.version.hip is not None:
        return []  # Triton's names of AMD's GPUs have not been tried
    for rank in unlike_ranks(plan, plan.ranks_of_node(node_order(plan)[node_rank])):
        gpu = torch.cuda.get_device_properties(rank_device(plan, rank.rank))
        target = GPUTarget("cuda", gpu.major * 10 + gpu.minor, gpu.warp_size)
        facts = GpuFacts(gpu.name, gpu.multi_processor_count, (gpu.major, gpu.minor))
        launches = launches_of(plan, rank.rank, facts, target, DTYPES[plan.model.dtype])
        found.update(dict.fromkeys(launches))
    return list(found)


def unlike_ranks(plan: Plan, ranks: Iterable[RankPlan]) -> list[RankPlan]:
    """Return those of `ranks` whose kernels may differ: of equal shares on like GPUs the first."""
    found: dict[tuple[object, ...], RankPlan] = {}
    for rank in ranks:
        gpus = {gpu.index: gpu for gpu in plan.cluster.node(rank.node).gpus}
        shares = (rank.query_heads, rank.kv_heads, rank.ffn_columns, rank.experts, rank.vocab)
        attention = plan.model.layers[rank.layers[0]].attention
        group = attention.num_heads // attention.num_kv_heads
        found.setdefault(
            (
                gpus[rank.gpu].device,
                rank.layers,
                rank.cp_rank > 0,
                rank.query_heads[0] - rank.kv_heads[0] * group,
                *(last - first for first, last in shares),
            ),
            rank,
        )
    return list(found.values())


def compile_all(launches: Sequence[Launch], num_processes: int) -> None:
    """Compile `launches` and what calls them, into Triton's cache."""
    if not launches:
        return
    # Forks have the modules, and Triton's idea of the GPU.
    context = multiprocessing.get_context("fork")
    with context.Pool(min(num_processes, 1 + len(launches)), _die_with_parent) as pool:
        driver = pool.apply_async(_compile_driver)
        for _ in pool.imap_unordered(_compile, launches):
            pass
        driver.get()


def compile_kernel(launch: Launch) -> Any:
    """Return the kernel from Triton's cache, where it is from now on."""
    return getattr(import_module(launch.module), launch.name).preload(launch.specialization)


def _compile(launch: Launch) -> None:
    from triton.backends.nvidia.driver import CudaLauncher

    kernel = compile_kernel(launch)
    CudaLauncher(kernel.src, kernel.metadata)  # a C compiler makes it, once a signature


def _compile_driver() -> None:
    """Have the C compiler make what Triton asks a GPU by."""
    from triton.backends.nvidia.driver import CudaUtils

    CudaUtils()


def _num_processes() -> int:
    """CPUs but one, for the ranks: they mostly wait for the GPU, the disk or this."""
    return min(_MOST_PROCESSES, max(1, len(os.sched_getaffinity(0)) - 1))


def _die_with_parent() -> None:
    """Have this process killed when the one that forked it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
