"""What a rank checks of its device before it loads, and says where its memory runs out."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rankwright.executor.log_tail import WARNING
from rankwright.executor.start_checks import check_capability, check_triton
from rankwright.executor.start_memory import Room, StartMemoryError, check_room, cpu_room, explain
from rankwright.planner.plan import Plan, RankPlan


def check_gpu(plan: Plan, rank: RankPlan, device: torch.device) -> None:
    """Check that this GPU can run what the plan gives `rank`, before anything is loaded to it.

    Raises:
        MissingToolError: Triton is not installed.
        ValueError: It does not compute in the plan's dtype.
        StartMemoryError: Weights and KV cache do not fit into what is free.
    """
    check_triton()
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        note = check_capability(plan.model.dtype, capability, torch.cuda.get_device_name(device))
        if note is not None:
            warnings.warn(note, stacklevel=1)
    check_room(plan, rank, Room(*torch.cuda.mem_get_info(device)))


@contextmanager
def memory_explained(
    plan: Plan, rank: RankPlan, device: torch.device, done: list[str]
) -> Iterator[None]:
    """Say what takes the memory, and what would fit, where it runs out inside the block.

    Args:
        plan: What is started.
        rank: Which part of it this is.
        device: Where.
        done: Its last entry is the last step that was done.

    Raises:
        StartMemoryError: Instead of PyTorch's error.
    """
    here = cpu_room(len(plan.ranks_of_node(rank.node)))
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # On CPUs PyTorch has no class of its own for it.
        on_cpu = "DefaultCPUAllocator" in str(error)
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        if device.type == "cuda":
            free_bytes, total_bytes = torch.cuda.mem_get_info(device)
            here = Room(free_bytes + torch.cuda.memory_reserved(device), total_bytes)
        raise StartMemoryError(explain(plan, rank, here, f"at start after: {done[-1]}")) from error


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """Print a warning of ours as one line, which the launcher shows the user; others as Python."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        print(f"{WARNING}{' '.join(str(message).split())}", flush=True)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))
