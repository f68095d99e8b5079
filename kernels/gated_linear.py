"""`silu(x G^T + b) * (x U^T + c)`: the first product of a gated MLP, with its activation.

Shapes: M rows, K inputs, F columns, C = 2 F rows of weights (gates, then ups).

Of one row the product is a kernel of our own (`skinny_linear.py`), whose programs can take a gate
and what it belongs to together: the activation costs no launch and no way to memory and back.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch

from rankwright.kernels.backend import Backend, runs_triton
from rankwright.kernels.skinny_linear import (
    SkinnyConfig,
    launch_vector,
    skinny_config,
    skinny_linear,
)
from rankwright.kernels.swiglu import swiglu


def gated_linear_reference(
    x_MK: torch.Tensor, weight_CK: torch.Tensor, bias_C: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the product by `torch`, and then its activation."""
    return swiglu(skinny_linear(x_MK, weight_CK, bias_C, backend="reference"), backend="reference")


def gated_linear(
    x_MK: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None = None,
    *,
    config: SkinnyConfig | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return [M, F]: of one row by one kernel where that is wanted, else by a product and `swiglu`.

    Args:
        x_MK: Rows.
        weight_CK: Gate rows, then up rows; dense.
        bias_C: Added to the products.
        config: Demands the kernel for one row, cut so.
        backend: What runs it, see `runs_triton`.

    Raises:
        ValueError: When shapes disagree.
    """
    if len(weight_CK) % 2 or x_MK.shape[1:] != weight_CK.shape[1:]:
        raise ValueError(
            f"gated_linear: x {tuple(x_MK.shape)} and weight {tuple(weight_CK.shape)}; expected "
            "[rows, inputs] and [gate rows + up rows, inputs]"
        )
    if backend == "reference":
        return gated_linear_reference(x_MK, weight_CK, bias_C)
    is_row = len(x_MK) == 1 and x_MK.stride(1) == weight_CK.stride(1) == 1
    may_run = is_row and x_MK.dtype.itemsize == 2 and runs_triton(x_MK, backend)
    if config is None and may_run and _wanted():
        config = skinny_config(1, x_MK.shape[1], len(weight_CK), x_MK.device)
    if not is_row or config is None:
        return swiglu(skinny_linear(x_MK, weight_CK, bias_C, backend=backend), backend=backend)
    out_MF = torch.empty((1, len(weight_CK) // 2), dtype=x_MK.dtype, device=x_MK.device)
    launch_vector(x_MK, weight_CK, bias_C, out_MF, config, gated=True)
    return out_MF


@lru_cache
def _wanted() -> bool:
    return os.environ.get("RANKWRIGHT_GATED_PRODUCT", "0") == "1"
