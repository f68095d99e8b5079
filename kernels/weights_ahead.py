"""Brings the first weights of the next product into the cache while memory has nothing else to do.

Of one sequence, products read weights at the rate of the memory; norms, rotations, attention and
sums over GPUs between them leave it idle for 2 to 8 us, a third of a step on two GPUs. The last
programs of a product, behind their own weights, ask for the first megabytes of those that are
multiplied with next. They come in that time into the second level of cache, which has room for 50
MB on an H100 and is faster than memory.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch

from rankwright.kernels.backend import jit, tl
from rankwright.kernels.gpu_facts import gpu_facts

# What a thread asks for at once is a multiple of this (PTX ISA, cp.async.bulk.prefetch).
_GRAIN_BYTES = 16
# Programs on a multiprocessor that ask: those that are there when a product ends.
_ASKERS = 2


@jit()
def bring_to_cache(
    ptr, AHEAD_BYTES: tl.constexpr, AHEAD_PROGRAMS: tl.constexpr, THREADS: tl.constexpr
):
    """Ask for what begins at `ptr`, each of the last programs for a part; nothing waits for it.

    Args:
        ptr: To the weights.
        AHEAD_BYTES: Of a program; from `share_ahead`.
        AHEAD_PROGRAMS: That ask; from `share_ahead`.
        THREADS: Of a program.
    """
    asker = tl.program_id(0) - (tl.num_programs(0) - AHEAD_PROGRAMS)
    if asker >= 0:
        share: tl.constexpr = AHEAD_BYTES // THREADS
        at = ptr.to(tl.int64) + asker.to(tl.int64) * AHEAD_BYTES
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2;\nmov.b32 $0, 0;",
            "=r,l,r",
            [at + tl.arange(0, THREADS) * share, tl.full([THREADS], share, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def share_ahead(weight: torch.Tensor | None, programs: int, threads: int) -> tuple[int, int]:
    """Return how many of a product's last programs ask for how many bytes of `weight` each.

    None does below compute capability 9.0, which has no such instruction.

    Args:
        weight: What is multiplied with next, if known.
        programs: Of the product.
        threads: Of a program.
    """
    if weight is None or not weight.is_contiguous() or wanted_bytes() == 0:
        return 0, 0
    facts = gpu_facts(weight.device)
    if weight.device.type == "cpu" or facts.capability < (9, 0):
        return 0, 0
    askers = min(programs, _ASKERS * facts.num_multiprocessors)
    total = min(weight.numel() * weight.element_size(), wanted_bytes())
    grain = _GRAIN_BYTES * threads
    return askers, total // askers // grain * grain


@lru_cache
def wanted_bytes() -> int:
    """Return how much of the next weights is asked for, `RANKWRIGHT_WEIGHTS_AHEAD` in MiB."""
    return int(os.environ.get("RANKWRIGHT_WEIGHTS_AHEAD", "0")) << 20
