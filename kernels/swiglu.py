"""SwiGLU: the gated activation between the two matrix products of a dense FFN.

Shapes: T tokens, C columns of the fused gate and up projection, F = C / 2.
"""

from __future__ import annotations

import torch

from rankwright.kernels.backend import Backend, ceil_div, jit, runs_triton, tl
from rankwright.kernels.overlap import overlap, take_turn


def swiglu_reference(gate_up_TC: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up`, where gate is the first half of the columns."""
    gate_TF, up_TF = gate_up_TC.float().chunk(2, dim=-1)
    return (gate_TF * torch.sigmoid(gate_TF) * up_TF).to(gate_up_TC.dtype)


@jit()
def _swiglu_kernel(
    gate_up_ptr,
    out_ptr,
    gate_up_stride,
    NUM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    take_turn(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < NUM_COLUMNS
    at = gate_up_ptr + row * gate_up_stride + f
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + NUM_COLUMNS, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * NUM_COLUMNS + f, out.to(out_ptr.dtype.element_ty), mask=mask)


# One 16-byte load of bf16 gate and one of up for each thread of 4 warps.
_BLOCK = 1024


def swiglu(gate_up_TC: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """Return `silu(gate) * up` as [T, C / 2] in the dtype of the input.

    Args:
        gate_up_TC: Gate columns, then up columns; rows may be strided.
        backend: What runs it, see `runs_triton`.

    Raises:
        ValueError: When the input is not a matrix with an even number of columns.
    """
    if gate_up_TC.dim() != 2 or gate_up_TC.shape[1] % 2:
        raise ValueError(
            f"swiglu: input {tuple(gate_up_TC.shape)}; expected [tokens, gate columns + up columns]"
        )
    if not runs_triton(gate_up_TC, backend):
        return swiglu_reference(gate_up_TC)
    if gate_up_TC.stride(1) != 1:
        gate_up_TC = gate_up_TC.contiguous()
    num_tokens, num_columns = gate_up_TC.shape[0], gate_up_TC.shape[1] // 2
    out_TF = torch.empty(
        (num_tokens, num_columns), dtype=gate_up_TC.dtype, device=gate_up_TC.device
    )
    if out_TF.numel():
        _swiglu_kernel[(num_tokens, ceil_div(num_columns, _BLOCK))](
            gate_up_TC,
            out_TF,
            gate_up_TC.stride(0),
            NUM_COLUMNS=num_columns,
            BLOCK=_BLOCK,
            num_warps=4,
            **overlap(gate_up_TC),
        )
    return out_TF
