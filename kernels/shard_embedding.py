"""Rows of an embedding of which this rank has some: zeros for tokens that it has none of.

Shapes: T tokens, V rows of this rank, D hidden size.

In PyTorch that is two comparisons, a selection, the lookup, a product and a copy to where the sum
over the ranks reads, each a launch. Here it is one kernel, which writes there.
"""

from __future__ import annotations

import torch

from rankwright.kernels.backend import Backend, ceil_div, jit, runs_triton, tl


def shard_embedding_reference(
    ids_T: torch.Tensor, weight_VD: torch.Tensor, first: int
) -> torch.Tensor:
    """Return [T, D]: row `id - first` of the weight, or zeros."""
    here_T = (ids_T >= first) & (ids_T < first + len(weight_VD))
    rows_TD = weight_VD[(ids_T - first).where(here_T, 0)]
    return rows_TD.where(here_T.unsqueeze(1), 0)


@jit()
def _shard_embedding_kernel(
    ids_ptr,
    weight_ptr,
    out_ptr,
    first,
    num_rows,
    weight_stride,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token) - first
    here = (row >= 0) & (row < num_rows)
    values = tl.load(weight_ptr + row * weight_stride + d, mask=(d < DIM) & here, other=0.0)
    tl.store(out_ptr + token * DIM + d, values, mask=d < DIM)


# One 16-byte load of bfloat16 for each thread of 4 warps.
_BLOCK = 1024


def shard_embedding(
    ids_T: torch.Tensor,
    weight_VD: torch.Tensor,
    first: int,
    out_TD: torch.Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return this rank's part of the embeddings as [T, D].

    Args:
        ids_T: Tokens, int64.
        weight_VD: This rank's rows; not none.
        first: Token of the first of them.
        out_TD: Written instead of a new tensor; dense.
        backend: What runs it, see `runs_triton`.
    """
    num_tokens, dim = len(ids_T), weight_VD.shape[1]
    if not runs_triton(ids_T, backend) or weight_VD.stride(1) != 1:
        found_TD = shard_embedding_reference(ids_T, weight_VD, first)
        return found_TD if out_TD is None else out_TD.copy_(found_TD)
    if out_TD is None:
        out_TD = torch.empty((num_tokens, dim), dtype=weight_VD.dtype, device=ids_T.device)
    assert out_TD.is_contiguous()
    if num_tokens:
        _shard_embedding_kernel[(num_tokens, ceil_div(dim, _BLOCK))](
            ids_T.contiguous(), weight_VD, out_TD, first, len(weight_VD), weight_VD.stride(0),
            DIM=dim, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out_TD
