"""Puts tokens that the step before drew where the next step's input names them.

Shapes: T tokens of a step, R rows that the step before drew.

A step is decided while the one before still runs, so the host knows of some input tokens only from
which row they come. Row r is written as -1 - r; what is not negative is a token id.
"""

from __future__ import annotations

import torch

from rankwright.kernels.backend import Backend, ceil_div, jit, runs_triton, tl


def feed_tokens_reference(ids_T: torch.Tensor, drawn_R: torch.Tensor) -> torch.Tensor:
    """Return `ids_T`, with `drawn_R[r]` where it holds -1 - r."""
    return torch.where(ids_T < 0, drawn_R[(-1 - ids_T).clamp(min=0)], ids_T)


@jit(do_not_specialize=("num_tokens",))
def _feed_tokens_kernel(ids_ptr, drawn_ptr, out_ptr, num_tokens, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < num_tokens
    ids = tl.load(ids_ptr + t, mask=inside, other=0)
    drawn = tl.load(drawn_ptr + (-1 - ids), mask=ids < 0, other=0)
    tl.store(out_ptr + t, tl.where(ids < 0, drawn, ids), mask=inside)


_BLOCK = 256


def feed_tokens(
    ids_T: torch.Tensor, drawn_R: torch.Tensor, *, backend: Backend = "auto"
) -> torch.Tensor:
    """Return token ids, int64 [T].

    Args:
        ids_T: int64; -1 - r stands for row r.
        drawn_R: int64, what the step before drew.
        backend: What runs it, see `runs_triton`.

    Raises:
        ValueError: When either is not a dense int64 vector.
    """
    for name, tensor in (("ids", ids_T), ("drawn", drawn_R)):
        if tensor.dim() != 1 or tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise ValueError(
                f"feed_tokens: {name} {tuple(tensor.shape)} of {tensor.dtype}, strides "
                f"{tensor.stride()}; expected a dense vector of int64"
            )
    if not runs_triton(ids_T, backend):
        return feed_tokens_reference(ids_T, drawn_R)
    out_T = torch.empty(ids_T.shape, dtype=torch.int64, device=ids_T.device)
    if len(ids_T):
        _feed_tokens_kernel[(ceil_div(len(ids_T), _BLOCK),)](
            ids_T, drawn_R, out_T, len(ids_T), BLOCK=_BLOCK, num_warps=4
        )
    return out_T
