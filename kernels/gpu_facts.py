"""What launches are chosen by besides shapes: which GPU runs them, and its multiprocessors.

A tensor on the meta device has a shape and no values. It stands for one on the GPU that `stand_in`
was told of: with such tensors one sees what a program would launch on a GPU without having it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """A GPU as its driver describes it."""

    name: str
    num_multiprocessors: int
    capability: tuple[int, int] = (0, 0)


_stood_in_for: list[GpuFacts] = []


def stand_in(gpu: GpuFacts) -> None:
    """Let tensors on the meta device stand for tensors on `gpu` from now on."""
    _stood_in_for[:] = [gpu]
    gpu_facts.cache_clear()


@lru_cache
def gpu_facts(device: torch.device) -> GpuFacts:
    """Return what is known of `device`.

    Raises:
        ValueError: The meta device stands for no GPU.
    """
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return GpuFacts(found.name, found.multi_processor_count, (found.major, found.minor))
    if device.type == "meta":
        if not _stood_in_for:
            raise ValueError("a tensor on the meta device stands for no GPU; call stand_in first")
        return _stood_in_for[0]
    # The interpreter runs one program at a time; 4 let its tests meet splits.
    return GpuFacts(device.type, 4)
