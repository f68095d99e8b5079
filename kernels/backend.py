"""Decides what runs an operation: a Triton kernel on a GPU, plain PyTorch elsewhere.

Every operation of this folder comes twice, as `<op>_reference` in plain PyTorch and as a Triton
kernel, behind one wrapper with an argument `backend`. This module holds what the wrappers share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton wheels; the references do without
    triton = None
    tl = None

Backend = Literal["auto", "triton", "reference"]

__all__ = ["DOT_PRECISION", "Backend", "ceil_div", "jit", "next_power_of_two", "runs_triton", "tl"]

# Triton's default for float32 operands is tf32, which keeps 10 of 23 bits of mantissa.
DOT_PRECISION = {torch.float32: "ieee", torch.bfloat16: "tf32", torch.float16: "tf32"}


def jit(
    *, do_not_specialize: tuple[str, ...] = (), any_alignment: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Return `triton.jit`, or a decorator that changes nothing where Triton is not installed.

    Args:
        do_not_specialize: Integer arguments that differ from call to call. Triton compiles
            another version for each of "is 1", "divisible by 16" and "other", which a server
            would notice as a pause.
        any_alignment: Pointers that are a multiple of 16 in some calls only, for which Triton would
            compile another version, though nothing is loaded from them 16 bytes at a time.
    """
    if triton is None:
        return lambda kernel: kernel
    return triton.jit(
        do_not_specialize=list(do_not_specialize),
        do_not_specialize_on_alignment=list(any_alignment),
    )


def runs_triton(tensor: torch.Tensor, backend: Backend) -> bool:
    """Return whether the Triton kernel should run.

    Args:
        tensor: Any operand; its device decides when `backend` is "auto". On the meta device, which
            stands for a GPU (`gpu_facts.py`), the kernel is launched as on one.
        backend: "triton" demands the kernel (on the CPU that needs Triton's interpreter, switched
            on by TRITON_INTERPRET=1 before the import), "reference" demands plain PyTorch.

    Raises:
        ValueError: When `backend` is none of the three, or wants a Triton that is not installed.
    """
    if backend == "reference":
        return False
    if backend == "auto":
        return (tensor.is_cuda or tensor.is_meta) and triton is not None
    if backend != "triton":
        raise ValueError(f"backend={backend!r}; expected 'auto', 'triton' or 'reference'")
    if triton is None:
        raise ValueError("backend='triton', but Triton is not installed; use backend='reference'")
    return True


def ceil_div(a: int, b: int) -> int:
    """Return `a / b` rounded up.

    >>> ceil_div(65, 64)
    2
    """
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`.

    >>> [next_power_of_two(n) for n in (1, 80, 128)]
    [1, 128, 128]
    """
    return 1 << (n - 1).bit_length()
