"""Times what each rank does alone: copies within its memory, and matrix products."""

from collections.abc import Callable

import torch

from rankwright.executor.measure_ranks import Ranks
from rankwright.topology.measurements import GemmRate, MemoryRate

_MIB = 2**20
_COPY_BYTES = {"cuda": 1024 * _MIB, "cpu": 64 * _MIB}  # past every cache
_CALLS = 8  # in a round
# Weights of 128 MiB in 16 bits do not fit into an L2 cache of 50 to 126 MB.
_GEMMS: dict[str, tuple[tuple[str, int, int, int], ...]] = {
    "cuda": (
        ("bfloat16", 16, 8192, 8192),
        ("bfloat16", 256, 8192, 8192),
        ("bfloat16", 4096, 4096, 4096),
        ("bfloat16", 8192, 8192, 8192),
        ("float16", 8192, 8192, 8192),
        ("float8", 8192, 8192, 8192),
    ),
    "cpu": (
        ("float32", 1, 1024, 1024),
        ("float32", 32, 1024, 1024),
        ("float32", 512, 1024, 1024),
        ("bfloat16", 512, 1024, 1024),
    ),
}


def time_memory(ranks: Ranks) -> list[MemoryRate]:
    """Return the rate of large copies on this rank, while all ranks of its machine copy."""
    size = _COPY_BYTES[ranks.device.type]
    # Random: on zeros some kernels run faster than on data.
    source = torch.randint(0, 256, (size,), device=ranks.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    ranks.wait()
    seconds = ranks.stream_seconds(lambda: target.copy_(source))
    ranks.wait()
    return [MemoryRate(node=ranks.node, gpu=ranks.gpu, bytes_per_s=2 * size / seconds)]


def time_gemms(ranks: Ranks) -> list[GemmRate]:
    """Return the rates of matrix products on this rank, while all of its machine multiply."""
    rows: list[GemmRate] = []
    for dtype, m, n, k in _GEMMS[ranks.device.type]:
        ranks.wait()
        if dtype == "float8" and torch.cuda.get_device_capability(ranks.device) < (8, 9):
            continue
        try:
            seconds = product_s(ranks, product(dtype, m, n, k, ranks.device))
        except (RuntimeError, AttributeError) as error:
            line = str(error).splitlines()[0][:120]
            ranks.notes.append(f"matrix products in {dtype} could not be timed: {line}")
            continue
        rate = 2.0 * m * n * k / seconds
        rows.append(
            GemmRate(node=ranks.node, gpu=ranks.gpu, dtype=dtype, m=m, n=n, k=k, flops_per_s=rate)
        )
    ranks.wait()
    return rows


def product_s(ranks: Ranks, call: Callable[[], object], **seconds: float) -> float:
    """Return the seconds of a call of `product`; `seconds` as of `Ranks.sustained_seconds`."""
    return ranks.sustained_seconds(call, _CALLS, **seconds)


def product(dtype: str, m: int, n: int, k: int, device: torch.device) -> Callable[[], object]:
    """Return a call that multiplies an m x k by a k x n matrix of random numbers.

    Random, because a board that is given zeros draws less power and keeps a higher clock.
    """
    if dtype == "float8":
        a = torch.randn(m, k, device=device).to(torch.float8_e4m3fn)
        b = torch.randn(n, k, device=device).to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)
        scaled_mm, result = torch.ops.aten._scaled_mm, torch.bfloat16
        return lambda: scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=result)
    kind = getattr(torch, dtype)
    left = torch.randn(m, k, device=device, dtype=kind)
    right = torch.randn(n, k, device=device, dtype=kind).t()  # as weights lie
    out = torch.empty(m, n, device=device, dtype=kind)
    return lambda: torch.mm(left, right, out=out)
