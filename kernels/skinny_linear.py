"""`y = x W^T + b` for few rows of x: reading W is the whole cost.

Shapes: M rows, K inputs, N outputs, S splits.

cuBLAS splits K where N alone does not fill the GPU, and adds the parts up in a second kernel; and
its tiles of 64 outputs and more leave multiprocessors idle when N is some thousands. Here one row
is multiplied without tensor cores, by programs of few enough outputs that one wave of them fills
the GPU. Of 2 to 16 rows each program takes more outputs, so that x is read less often, and a part
of K where that would leave multiprocessors idle; the last program to finish a tile adds its parts
up, in the order of the parts, so that results do not depend on which that is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch.nn.functional import linear

from rankwright.kernels.backend import (
    DOT_PRECISION,
    Backend,
    ceil_div,
    jit,
    next_power_of_two,
    runs_triton,
    tl,
)
from rankwright.kernels.gpu_facts import gpu_facts
from rankwright.kernels.overlap import let_next_come, overlap, wait_for_last
from rankwright.kernels.tuned import tuned_rows
from rankwright.kernels.weights_ahead import bring_to_cache, share_ahead

# Rows that the kernel takes at most. Fewer have a tile of as many too: Hopper's matrix instruction,
# which reads W from shared memory itself, takes no fewer from Triton.
MAX_ROWS = 16
# Rows are rounded up to these: a product of 2 to 8 reads as much as one of 8.
ROW_BUCKETS = (1, 8, 16)
# Tiles of outputs that can be split: each has a word that counts its finished parts.
_MAX_SPLIT_TILES = 4096


@dataclass(frozen=True, slots=True)
class SkinnyConfig:
    """How the kernel is cut: outputs of a program, inputs of a step, and what it runs on.

    More than one split are for more than one row.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    num_splits: int = 1


@jit()
def _vector_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    next_ptr,
    num_outputs,
    w_stride,
    NUM_INPUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    AHEAD_BYTES: tl.constexpr,
    AHEAD_PROGRAMS: tl.constexpr,
    THREADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Write one row: products in registers, added up across threads once at the end.

    Where kernels overlap, the first step's weights are on their way before x is there. `GATED`: the
    weights are of as many gates and then of the outputs they belong to, taken in turn.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if GATED:
        n_mask = n < 2 * num_outputs
        n = n // 2 + n % 2 * num_outputs
    else:
        n_mask = n < num_outputs
    k = tl.arange(0, BLOCK_K)
    w_at = w_ptr + n.to(tl.int64)[:, None] * w_stride + k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    first = 0
    if OVERLAP:
        let_next_come(OVERLAP)
        inside = k < NUM_INPUTS
        w = tl.load(w_at, mask=n_mask[:, None] & inside[None, :], other=0.0)
        wait_for_last(OVERLAP)
        x = tl.load(x_ptr + k, mask=inside, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
        first = BLOCK_K
    for start in tl.range(first, NUM_INPUTS, BLOCK_K, num_stages=STAGES):
        inside = k < NUM_INPUTS - start
        x = tl.load(x_ptr + start + k, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_at + start, mask=n_mask[:, None] & inside[None, :], other=0.0)
        acc += w.to(tl.float32) * x[None, :]
    if AHEAD_BYTES > 0:  # behind all weights of this program
        bring_to_cache(next_ptr, AHEAD_BYTES, AHEAD_PROGRAMS, THREADS)
    out = tl.sum(acc, axis=1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    if GATED:
        # Rounded as products that are written and read again are.
        gate, up = tl.split(tl.reshape(out.to(dtype).to(tl.float32), [BLOCK_N // 2, 2]))
        out = gate * tl.sigmoid(gate) * up
        n = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        n_mask = n < num_outputs
    tl.store(out_ptr + n, out.to(dtype), mask=n_mask)


@jit(do_not_specialize=("num_rows",))
def _rows_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    finished_ptr,
    num_rows,
    num_outputs,
    num_inputs,
    split_inputs,
    x_stride,
    w_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write up to `BLOCK_M` rows: W's rows stand where a product usually has those of x."""
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    n_mask, m_mask = n < num_outputs, m < num_rows
    w_at = w_ptr + n.to(tl.int64)[:, None] * w_stride + k[None, :]
    x_at = x_ptr + m[None, :] * x_stride + k[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first = split * split_inputs
    stop = tl.minimum(first + split_inputs, num_inputs)
    for start in tl.range(first, stop, BLOCK_K):
        if WHOLE_STEPS:
            w = tl.load(w_at + start, mask=n_mask[:, None], other=0.0)
            x = tl.load(x_at + start, mask=m_mask[None, :], other=0.0)
        else:
            inside = k < stop - start
            w = tl.load(w_at + start, mask=n_mask[:, None] & inside[None, :], other=0.0)
            x = tl.load(x_at + start, mask=m_mask[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    at = m[None, :] * num_outputs + n[:, None]
    mask = n_mask[:, None] & m_mask[None, :]
    if IS_SPLIT:
        part_size = tl.cast(num_rows, tl.int64) * num_outputs
        tl.store(partial_ptr + split * part_size + at, acc, mask=mask)
        tl.debug_barrier()  # all of this part is written before it counts as finished
        before = tl.atomic_add(finished_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if before != tl.num_programs(1) - 1:
            return
        tl.store(finished_ptr + tile, 0)  # for the next product
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for part in range(0, tl.num_programs(1)):
            acc += tl.load(partial_ptr + part * part_size + at, mask=mask, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@lru_cache
def _finished_words(device: torch.device) -> torch.Tensor:
    """Return int32 zeros that split products count with, and leave at zero.

    One product of a device runs at a time: a rank computes on one stream.
    """
    return torch.zeros(_MAX_SPLIT_TILES, dtype=torch.int32, device=device)


def skinny_config(
    num_rows: int, num_inputs: int, num_outputs: int, device: torch.device
) -> SkinnyConfig | None:
    """Return how a product is best cut, or None where cuBLAS is at least as fast.

    What was measured on this GPU (`tuned.py`) comes first, by rows rounded up to 1, 8 or 16.

    Without: one row, bfloat16, on an H100 (copy 2.98 TB/s), cuBLAS and this kernel, us: 20.7 and
    19.0 on 6,144 outputs of 4,096 inputs; 16.4 and 13.6 on 4,096 of 4,096; 81.9 and 76.3 on 28,672
    of 4,096; 44.3 and 40.8 on 4,096 of 14,336; 14.1 and 10.9 on 3,072 of 4,096; 25.4 and 21.7 on
    4,096 of 7,168. Of 8 rows, unsplit, it took up to 14 % less there; but on two H200 steps of 8
    rows were 0.4 ms longer than what cuBLAS would have let expect, so none are taken unmeasured.
    """
    bucket = next((bucket for bucket in ROW_BUCKETS if num_rows <= bucket), None)
    if bucket is None:
        return None
    if row := tuned_rows(device, "linear").get((bucket, num_inputs, num_outputs)):
        return SkinnyConfig(**row)
    if num_rows != 1:
        return None
    if num_outputs >= 96 * gpu_facts(device).num_multiprocessors:
        return SkinnyConfig(block_n=4, block_k=1024, num_warps=8, num_stages=3)
    return SkinnyConfig(block_n=8, block_k=512, num_warps=4, num_stages=3)


def skinny_linear(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    out_MN: torch.Tensor | None = None,
    *,
    next_weight: torch.Tensor | None = None,
    config: SkinnyConfig | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return `x W^T + b`, by the kernel where that is the faster way, else by `torch`.

    Args:
        x_MK: Rows; strided or not.
        weight_NK: Dense rows.
        bias_N: Added to every row.
        out_MN: Written instead of a new tensor; dense.
        next_weight: What is multiplied with after this, see `weights_ahead.py`.
        config: Demands the kernel, cut so.
        backend: "reference" demands `torch`.

    Raises:
        ValueError: When shapes disagree, or a kernel is demanded for more than `MAX_ROWS` rows.
    """
    if x_MK.dim() != 2 or weight_NK.dim() != 2 or x_MK.shape[1] != weight_NK.shape[1]:
        raise ValueError(
            f"skinny_linear: x {tuple(x_MK.shape)} and weight {tuple(weight_NK.shape)}; "
            "expected [rows, inputs] and [outputs, inputs]"
        )
    num_rows, num_inputs = x_MK.shape
    num_outputs = len(weight_NK)
    triton_runs = runs_triton(x_MK, backend)
    if config is None and triton_runs and x_MK.dtype.itemsize == 2:
        config = skinny_config(num_rows, num_inputs, num_outputs, x_MK.device)
    if not triton_runs or config is None or num_rows == 0:
        return _by_torch(x_MK, weight_NK, bias_N, out_MN)
    if num_rows > MAX_ROWS:
        raise ValueError(f"skinny_linear: {num_rows} rows; the kernel takes {MAX_ROWS} at most")
    if weight_NK.stride(1) != 1:
        return _by_torch(x_MK, weight_NK, bias_N, out_MN)
    if x_MK.stride(1) != 1:
        x_MK = x_MK.contiguous()
    if out_MN is None:
        out_MN = torch.empty((num_rows, num_outputs), dtype=x_MK.dtype, device=x_MK.device)
    assert out_MN.is_contiguous()
    if num_rows > 1:
        _launch_rows(x_MK, weight_NK, bias_N, out_MN, config)
    else:
        launch_vector(x_MK, weight_NK, bias_N, out_MN, config, next_weight=next_weight)
    return out_MN


def launch_vector(
    x_1K: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_1F: torch.Tensor,
    config: SkinnyConfig,
    *,
    gated: bool = False,
    next_weight: torch.Tensor | None = None,
) -> None:
    """Fill `out_1F` with the product of one row.

    Args:
        x_1K: The row; dense.
        weight_NK: Dense rows.
        bias_N: Added to the product.
        out_1F: Written; as wide as the weight has rows, or half of that where `gated`.
        config: How the kernel is cut.
        gated: Write `silu(first half) * second half` of the product.
        next_weight: What is multiplied with after this, see `weights_ahead.py`.
    """
    block_n = max(config.block_n, 2) if gated else config.block_n
    programs, threads = ceil_div(len(weight_NK), block_n), 32 * config.num_warps
    askers, ahead_bytes = share_ahead(next_weight, programs, threads)
    _vector_kernel[(programs,)](
        x_1K, weight_NK, x_1K if bias_N is None else bias_N, out_1F,
        weight_NK if next_weight is None else next_weight,
        out_1F.shape[1], weight_NK.stride(0),
        NUM_INPUTS=x_1K.shape[1], BLOCK_N=block_n, BLOCK_K=_block_k(config, x_1K.shape[1]),
        STAGES=config.num_stages, HAS_BIAS=bias_N is not None, GATED=gated,
        AHEAD_BYTES=ahead_bytes, AHEAD_PROGRAMS=askers, THREADS=threads,
        num_warps=config.num_warps, **overlap(x_1K),
    )  # fmt: skip


def _block_k(config: SkinnyConfig, num_inputs: int) -> int:
    return min(config.block_k, max(16, next_power_of_two(num_inputs)))


def _launch_rows(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_MN: torch.Tensor,
    config: SkinnyConfig,
) -> None:
    num_rows, num_inputs = x_MK.shape
    num_outputs = len(weight_NK)
    config = replace(config, block_k=_block_k(config, num_inputs))
    tiles = ceil_div(num_outputs, config.block_n)
    steps = ceil_div(num_inputs, config.block_k)
    wanted = config.num_splits if tiles <= _MAX_SPLIT_TILES else 1
    split_inputs = ceil_div(steps, wanted) * config.block_k
    num_splits = ceil_div(num_inputs, split_inputs)
    partial = finished = out_MN
    if num_splits > 1:
        partial = torch.empty(
            (num_splits, num_rows, num_outputs), dtype=torch.float32, device=out_MN.device
        )
        finished = _finished_words(out_MN.device)
    _rows_kernel[(tiles, num_splits)](
        x_MK, weight_NK, x_MK if bias_N is None else bias_N, out_MN, partial, finished, num_rows,
        num_outputs, num_inputs, split_inputs, x_MK.stride(0), weight_NK.stride(0),
        BLOCK_M=MAX_ROWS,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        WHOLE_STEPS=num_inputs % config.block_k == 0, IS_SPLIT=num_splits > 1,
        HAS_BIAS=bias_N is not None, PRECISION=DOT_PRECISION[x_MK.dtype],
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _by_torch(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    out_MN: torch.Tensor | None,
) -> torch.Tensor:
    if out_MN is None:
        return linear(x_MK, weight_NK, bias_N)
    if bias_N is None:
        return torch.mm(x_MK, weight_NK.t(), out=out_MN)
    return torch.addmm(bias_N, x_MK, weight_NK.t(), out=out_MN)
