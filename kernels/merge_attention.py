"""Merge the attention of one query over several parts of its context.

Shapes: C parts, B queries, H heads, D head dimension. Each part has its softmax-weighted mean of
the values and the log-sum-exp of its scores; the whole is the mean of the parts, weighted with
their sums (Rabe and Staats, arXiv 2112.05682, section 2).
"""

from __future__ import annotations

import torch

from rankwright.kernels.backend import Backend, jit, next_power_of_two, runs_triton, tl


def merge_attention_reference(parts_CBHE: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return [B, H, D] in `dtype`; see `merge_attention`."""
    lse_CBH = parts_CBHE[..., -1]
    highest_BH = lse_CBH.amax(0)
    shift_BH = highest_BH.where(highest_BH.isfinite(), 0.0)
    weights_CBH = (lse_CBH - shift_BH).exp()
    total_BH = weights_CBH.sum(0)
    sums_BHD = (parts_CBHE[..., :-1] * weights_CBH.unsqueeze(-1)).sum(0)
    return (sums_BHD / total_BH.where(total_BH > 0, 1.0).unsqueeze(-1)).to(dtype)


@jit()
def _merge_attention_kernel(
    parts_ptr,
    out_ptr,
    part_stride,
    NUM_PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    at = parts_ptr + row * (HEAD_DIM + 1)
    highest = tl.load(at + HEAD_DIM)
    for part in tl.static_range(1, NUM_PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        highest = tl.maximum(highest, tl.load(at + part * part_stride + HEAD_DIM))
    # A query that sees nothing anywhere has no maximum; 0 in its place keeps inf - inf out.
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    acc = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    for part in tl.static_range(NUM_PARTS):
        weight = tl.exp(tl.load(at + part * part_stride + HEAD_DIM) - highest)
        mean = tl.load(at + part * part_stride + d, mask=d < HEAD_DIM, other=0.0)
        acc += weight * mean
        total += weight
    out = acc / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)


def merge_attention(
    parts_CBHE: torch.Tensor, dtype: torch.dtype, *, backend: Backend = "auto"
) -> torch.Tensor:
    """Return the attention over all parts as [B, H, D]; zeros where no part has any context.

    Args:
        parts_CBHE: float32, contiguous; E is D means and then the log-sum-exp, -inf for an empty
            part.
        dtype: Of the result.
        backend: What runs it, see `runs_triton`.

    Raises:
        ValueError: The parts are not contiguous float32 of four axes.
    """
    if (
        parts_CBHE.dim() != 4
        or parts_CBHE.dtype != torch.float32
        or not parts_CBHE.is_contiguous()
        or parts_CBHE.shape[-1] < 2
    ):
        raise ValueError(
            f"merge_attention: parts {tuple(parts_CBHE.shape)} of {parts_CBHE.dtype}; expected "
            "contiguous float32 [parts, queries, heads, head dim + 1]"
        )
    if not runs_triton(parts_CBHE, backend):
        return merge_attention_reference(parts_CBHE, dtype)
    num_parts, batch, num_heads, width = parts_CBHE.shape
    out_BHD = torch.empty(batch, num_heads, width - 1, dtype=dtype, device=parts_CBHE.device)
    if out_BHD.numel():
        _merge_attention_kernel[(batch * num_heads,)](
            parts_CBHE,
            out_BHD,
            parts_CBHE.stride(0),
            NUM_PARTS=num_parts,
            HEAD_DIM=width - 1,
            BLOCK_D=next_power_of_two(width - 1),
            num_warps=1,
        )
    return out_BHD
