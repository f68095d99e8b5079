"""The experts of a MoE block: two grouped GEMMs with the gated activation between, and the sum.

Shapes: T tokens, K experts a token, P = T K pairs, S expert slots of this rank, D hidden, F columns
of an expert on this rank; gate_up is [S, 2 F, D] (gate rows first), down [S, D, F].

The first GEMM gathers its rows from the tokens and ends with the activation; the second ends with
the weight of the pair and writes one row a pair. A last small kernel adds each token's rows up in
the order of its experts: no atomics, so the result does not depend on who comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rankwright.kernels.backend import DOT_PRECISION, Backend, ceil_div, jit, runs_triton, tl
from rankwright.kernels.moe_align import Alignment, align
from rankwright.kernels.moe_configs import ExpertsConfig, Tile, experts_config


@dataclass(frozen=True, slots=True)
class Experts:
    """Weights of this rank's expert slots, and the activation.

    Args:
        gate_up: [S, 2 F, D].
        down: [S, D, F].
        gate_up_bias: [S, 2 F] or None.
        down_bias: [S, D] or None; on one of the ranks that share an expert only.
        limit: None: `silu(gate) * up`. Else gpt-oss's activation (arXiv 2508.10925, section 2.1):
            `(up + 1) * gate * sigmoid(1.702 gate)`, gate at most and up within this limit.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    limit: float | None = None

    @property
    def matrices(self) -> tuple[torch.Tensor, ...]:
        """All that a slot holds, each tensor [S, ...]."""
        held = (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return tuple(tensor for tensor in held if tensor is not None)

    @property
    def num_slots(self) -> int:
        """S."""
        return self.gate_up.shape[0]


# Slope of the sigmoid in gpt-oss's activation: sigmoid(1.702 x) is nearly the normal distribution
# function (Hendrycks and Gimpel, arXiv 1606.08415, section 2).
ALPHA = 1.702


def run_experts_reference(
    x_TD: torch.Tensor, experts: Experts, weights_TK: torch.Tensor, slots_TK: torch.Tensor
) -> torch.Tensor:
    """Return [T, D]: the weighted sum of what this rank's experts make of each token."""
    out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for slot in range(experts.num_slots):
        token, k = (slots_TK == slot).nonzero(as_tuple=True)
        if not len(token):
            continue
        gate_up = x_TD[token] @ experts.gate_up[slot].T
        if experts.gate_up_bias is not None:
            gate_up = gate_up + experts.gate_up_bias[slot]
        gate, up = gate_up.float().chunk(2, dim=-1)
        if experts.limit is None:
            hidden = gate * gate.sigmoid() * up
        else:
            gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
            hidden = (up + 1) * gate * (ALPHA * gate).sigmoid()
        made = (hidden.to(x_TD.dtype) @ experts.down[slot].T).float()
        if experts.down_bias is not None:
            made = made + experts.down_bias[slot].float()
        out_TD.index_add_(0, token, made * weights_TK[token, k, None])
    return out_TD.to(x_TD.dtype)


@jit(do_not_specialize=("num_pairs", "num_blocks"))
def _grouped_gemm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    pair_weights_ptr,
    pairs_ptr,
    slots_ptr,
    out_ptr,
    num_pairs,
    num_blocks,
    x_stride,
    limit,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    CLAMPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALPHA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Blocks of rows in groups, those of a group side by side: they share weights and rows in L2.
    program = tl.program_id(0)
    per_group: tl.constexpr = GROUP_M * ((N + BLOCK_N - 1) // BLOCK_N)
    first_block = program // per_group * GROUP_M
    group_size = tl.minimum(num_blocks - first_block, GROUP_M)
    block = first_block + program % per_group % group_size
    tile_n = program % per_group // group_size
    slot = tl.load(slots_ptr + block).to(tl.int64)
    if slot < 0:
        return

    m = tl.arange(0, BLOCK_M)
    if ALIGNED:
        pair = tl.load(pairs_ptr + block * BLOCK_M + m)
    else:  # a block is one pair
        pair = tl.where(m == 0, block, num_pairs)
    is_pair = pair < num_pairs
    # Rows of padding and columns past the end read something that is there, and are not stored.
    row = tl.where(is_pair, pair // TOP_K, 0).to(tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_in = n % N
    k = tl.arange(0, BLOCK_K)
    ROWS: tl.constexpr = 2 * N if GATED else N
    x_at = x_ptr + row[:, None] * x_stride + k[None, :]
    w_at = weight_ptr + slot * (ROWS * K) + n_in[None, :] * K + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_at + first)
            w = tl.load(w_at + first)
        else:
            x = tl.load(x_at + first, mask=(first + k < K)[None, :], other=0.0)
            w = tl.load(w_at + first, mask=(first + k < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if GATED:
            if K % BLOCK_K == 0:
                w_up = tl.load(w_at + N * K + first)
            else:
                w_up = tl.load(w_at + N * K + first, mask=(first + k < K)[:, None], other=0.0)
            up = tl.dot(x, w_up, up, input_precision=PRECISION)

    if HAS_BIAS:
        bias_at = bias_ptr + slot * ROWS + n_in
        acc += tl.load(bias_at).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_at + N).to(tl.float32)[None, :]
    if GATED:
        if CLAMPED:
            acc = tl.minimum(acc, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
            acc = (up + 1) * acc * tl.sigmoid(ALPHA * acc)
        else:
            acc = acc * tl.sigmoid(acc) * up
    if WEIGHTED:
        acc *= tl.load(pair_weights_ptr + pair, mask=is_pair, other=0.0)[:, None]
    out_at = out_ptr + pair.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=is_pair[:, None] & (n < N)[None, :])


@jit()
def _sum_kernel(
    made_ptr,
    slots_ptr,
    out_ptr,
    DIM: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sum of a token's rows that this rank made."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        pair = token * TOP_K + i
        mine = tl.load(slots_ptr + pair) >= 0
        made = tl.load(made_ptr + pair * DIM + d, mask=(d < DIM) & mine, other=0.0)
        total += made.to(tl.float32)
    tl.store(out_ptr + token * DIM + d, total.to(out_ptr.dtype.element_ty), mask=d < DIM)


# 16 bytes a thread of 4 warps.
_SUM_BLOCK = 1024


def run_experts(
    x_TD: torch.Tensor,
    experts: Experts,
    weights_TK: torch.Tensor,
    slots_TK: torch.Tensor,
    *,
    num_experts: int | None = None,
    config: ExpertsConfig | None = None,
    out_TD: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return [T, D]: the weighted sum of what this rank's experts make of each token.

    A token none of whose experts is here gets zeros. Takes scratch memory of
    `T * K * (D + F)` values of the dtype, which the allocator reuses layer by layer.

    Args:
        x_TD: Tokens; rows may be strided.
        experts: This rank's weights.
        weights_TK: float32, from `route`.
        slots_TK: int32, from `route`; -1: another rank's.
        num_experts: Of all ranks, for the choice of a configuration; None: S.
        config: Overrides `experts_config` (for tuning).
        out_TD: Where to write the result; dense. None: somewhere new.
        backend: What runs it, see `runs_triton`.

    Raises:
        ValueError: Shapes disagree.
    """
    num_slots, hidden_size, width = experts.down.shape
    if experts.gate_up.shape != (num_slots, 2 * width, x_TD.shape[1]) or (
        weights_TK.shape != slots_TK.shape or len(slots_TK) != len(x_TD)
    ):
        raise ValueError(
            f"run_experts: tokens {tuple(x_TD.shape)}, gate_up {tuple(experts.gate_up.shape)}, "
            f"down {tuple(experts.down.shape)}, weights {tuple(weights_TK.shape)}, slots "
            f"{tuple(slots_TK.shape)}; expected [T, D], [S, 2 F, D], [S, D, F] and twice [T, K]"
        )
    if not runs_triton(x_TD, backend):
        made_TD = run_experts_reference(x_TD, experts, weights_TK, slots_TK)
        return made_TD if out_TD is None else out_TD.copy_(made_TD)
    num_tokens, top_k = slots_TK.shape
    if out_TD is None:
        out_TD = torch.empty((num_tokens, hidden_size), dtype=x_TD.dtype, device=x_TD.device)
    assert out_TD.shape == (num_tokens, hidden_size)
    assert out_TD.is_contiguous()
    if not num_tokens:
        return out_TD
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    num_experts = num_slots if num_experts is None else num_experts
    if config is None:
        config = experts_config(
            num_tokens=num_tokens,
            top_k=top_k,
            num_experts=num_experts,
            width=width,
            hidden_size=hidden_size,
            dtype=x_TD.dtype,
            device=x_TD.device,
        )
    aligned: Alignment | None = None
    if not _is_sparse(num_tokens, top_k, num_experts):
        aligned = align(slots_TK, num_slots, config.block_rows, backend="triton")
    pairs = num_tokens * top_k
    hidden_PF = torch.empty((pairs, width), dtype=x_TD.dtype, device=x_TD.device)
    made_PD = torch.empty((pairs, hidden_size), dtype=x_TD.dtype, device=x_TD.device)
    shared = (weights_TK, slots_TK, aligned, config.block_rows)
    _grouped_gemm(
        x_TD, experts.gate_up, experts.gate_up_bias, hidden_PF, config.gate_up, top_k, shared,
        gated=True, limit=experts.limit,
    )  # fmt: skip
    _grouped_gemm(
        hidden_PF, experts.down, experts.down_bias, made_PD, config.down, 1, shared,
        gated=False, limit=None,
    )  # fmt: skip
    _sum_kernel[(num_tokens, ceil_div(hidden_size, _SUM_BLOCK))](
        made_PD,
        slots_TK,
        out_TD,
        DIM=hidden_size,
        TOP_K=top_k,
        BLOCK=_SUM_BLOCK,
        num_warps=4,
    )
    return out_TD


def _is_sparse(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """Return whether pairs go unsorted, each in a block of its own.

    One token's experts differ, so that sorting has nothing to join; a few tokens with many experts
    share hardly any, and what is read twice comes from L2. It saves two launches of five.
    """
    return num_tokens == 1 or 4 * num_tokens * top_k <= num_experts


def _grouped_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: Tile,
    top_k: int,
    shared: tuple[torch.Tensor, torch.Tensor, Alignment | None, int],
    *,
    gated: bool,
    limit: float | None,
) -> None:
    """Launch one of the two products; `shared` is what they have in common."""
    weights_TK, slots_TK, aligned, block_rows = shared
    num_pairs, num_columns = out.shape
    num_blocks = num_pairs if aligned is None else aligned.max_blocks
    _grouped_gemm_kernel[(num_blocks * ceil_div(num_columns, tile.block_n),)](
        x,
        weight,
        weight if bias is None else bias,
        weights_TK,
        slots_TK if aligned is None else aligned.pairs,
        slots_TK if aligned is None else aligned.block_slots,
        out,
        num_pairs,
        num_blocks,
        x.stride(0),
        0.0 if limit is None else limit,
        N=num_columns,
        K=x.shape[1],
        TOP_K=top_k,
        GATED=gated,
        CLAMPED=limit is not None,
        WEIGHTED=not gated,
        HAS_BIAS=bias is not None,
        ALIGNED=aligned is not None,
        ALPHA=ALPHA,
        BLOCK_M=block_rows,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        PRECISION=DOT_PRECISION[x.dtype],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
