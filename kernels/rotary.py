"""Rotary position embedding, fused with query and key norms and with the write to the KV cache.

Shapes: T tokens, C packed columns (query heads, then key heads, then value heads), H query heads,
K key/value heads, D head dimension, R = D / 2 rotated pairs, P positions; caches are
[blocks, K, block tokens, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from rankwright.kernels.backend import Backend, ceil_div, jit, next_power_of_two, runs_triton, tl
from rankwright.kernels.overlap import overlap, take_turn

Scaling = Mapping[str, Any]


# Each takes the wavelengths of the unscaled embedding over 2 pi and returns the scaled frequencies.
# The order of operations is transformers': a frequency off in its last bit turns the angle of
# position 100,000 by 0.01.


def _linear(period_R: torch.Tensor, theta: float, scaling: Scaling) -> torch.Tensor:
    return 1.0 / period_R / scaling["factor"]


def _llama3(period_R: torch.Tensor, theta: float, scaling: Scaling) -> torch.Tensor:
    """Return low frequencies divided by the factor, high ones kept, a ramp between.

    Source: Llama 3.1's `apply_scaling` (github.com/meta-llama/llama-models, models/llama3).
    """
    factor, low, high = (scaling[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    inv_freq_R = 1.0 / period_R
    rotations_R = scaling["original_max_position_embeddings"] / (2 * math.pi / inv_freq_R)
    keep_R = ((rotations_R - low) / (high - low)).clamp(0, 1)
    return (1 - keep_R) * inv_freq_R / factor + keep_R * inv_freq_R


def _yarn(period_R: torch.Tensor, theta: float, scaling: Scaling) -> torch.Tensor:
    """Return the "NTK-by-parts" frequencies of YaRN (arXiv 2309.00071, section 3.2)."""
    head_dim = 2 * len(period_R)
    context = scaling["original_max_position_embeddings"]

    def pair_with(num_rotations: float) -> float:
        wavelength = context / (num_rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low = pair_with(scaling.get("beta_fast") or 32)
    high = pair_with(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # 0.001 keeps the ramp finite where both ends meet, as in YaRN's published code.
    ramp_R = (torch.arange(len(period_R), dtype=torch.float32) - low) / (high - low or 0.001)
    keep_R = 1 - ramp_R.clamp(0, 1)
    return 1.0 / (scaling["factor"] * period_R) * (1 - keep_R) + 1.0 / period_R * keep_R


def _yarn_magnitude(scaling: Scaling) -> float:
    """Return what cos and sin are multiplied with (arXiv 2309.00071, section 3.4)."""

    def magnitude(weight: float) -> float:
        factor = scaling["factor"]
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):  # DeepSeek-V2 and V3
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)


_CONTEXT = "original_max_position_embeddings"
_SCALINGS: dict[
    str, tuple[tuple[str, ...], Callable[[torch.Tensor, float, Scaling], torch.Tensor]]
] = {
    "default": ((), lambda period_R, theta, scaling: 1.0 / period_R),
    "linear": (("factor",), _linear),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _CONTEXT), _llama3),
    "yarn": (("factor", _CONTEXT), _yarn),
}


def rope_table(
    head_dim: int,
    max_positions: int,
    theta: float,
    scaling: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return float32 [max_positions, head_dim]: cosines in the first half, sines in the second.

    Args:
        head_dim: Rotated dimensions of a head; even.
        max_positions: Rows of the table.
        theta: Base of the wavelengths.
        scaling: The `rope_scaling` of a Hugging Face config with `rope_type` (or `type`) default,
            linear, llama3 or yarn; None means default.
        device: Where the table goes. It is computed on the CPU, so that every rank has the same.

    Raises:
        ValueError: When the type is unknown or one of its values is missing.
    """
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _SCALINGS:
        raise ValueError(f"rope scaling {kind!r} is not known; expected {', '.join(_SCALINGS)}")
    required, scale = _SCALINGS[kind]
    missing = [key for key in required if scaling.get(key) is None]
    if missing:
        raise ValueError(f"rope scaling {kind!r} lacks {', '.join(missing)}; add it to the config")
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim}; rotary embedding needs an even number")
    exponent_R = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq_R = scale(theta**exponent_R, theta, scaling)
    magnitude = _yarn_magnitude(scaling) if kind == "yarn" else 1.0
    angle_PR = torch.arange(max_positions, dtype=torch.float32)[:, None] * inv_freq_R
    return (torch.cat([angle_PR.cos(), angle_PR.sin()], dim=-1) * magnitude).to(device)


def _norm_reference(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    normalised = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (normalised.to(x.dtype).float() * weight_D.float()).to(x.dtype)


def rotary_and_cache_reference(
    qkv_TC: torch.Tensor,
    cos_sin_PD: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Return the rotated queries [T, H, D]; rotated keys and values go to their cache slots."""
    heads = qkv_TC.unflatten(1, (num_heads + 2 * num_kv_heads, head_dim))
    q_THD, k_TKD, v_TKD = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm_D is not None:
        q_THD = _norm_reference(q_THD, q_norm_D, eps)
    if k_norm_D is not None:
        k_TKD = _norm_reference(k_TKD, k_norm_D, eps)
    cos_T1R, sin_T1R = cos_sin_PD[positions_T][:, None].chunk(2, dim=-1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        low, high = x.float().chunk(2, dim=-1)
        rotated = [low * cos_T1R - high * sin_T1R, high * cos_T1R + low * sin_T1R]
        return torch.cat(rotated, dim=-1).to(x.dtype)

    kept = slots_T >= 0
    block_tokens = k_cache.shape[2]
    block, offset = slots_T[kept] // block_tokens, slots_T[kept] % block_tokens
    k_cache[block, :, offset] = rotate(k_TKD)[kept].to(k_cache.dtype)
    v_cache[block, :, offset] = v_TKD[kept].to(v_cache.dtype)
    return rotate(q_THD)


@jit()
def _rotary_and_cache_kernel(
    qkv_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    eps,
    qkv_stride,
    k_block_stride,
    k_head_stride,
    k_token_stride,
    v_block_stride,
    v_head_stride,
    v_token_stride,
    BLOCK_TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    take_turn(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    # Packed heads of this program: query, key and value heads may meet in one tile.
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    is_q = head < NUM_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_v = (head >= NUM_HEADS + NUM_KV_HEADS) & (head < NUM_HEADS + 2 * NUM_KV_HEADS)
    r = tl.arange(0, BLOCK_R)[None, :]
    in_half = r < HALF_DIM

    at = qkv_ptr + token * qkv_stride + head * (2 * HALF_DIM) + r
    mask = (is_q | is_k | is_v) & in_half
    low_raw = tl.load(at, mask=mask, other=0.0)
    high_raw = tl.load(at + HALF_DIM, mask=mask, other=0.0)
    low = low_raw.to(tl.float32)
    high = high_raw.to(tl.float32)

    if HAS_NORM:
        dtype = qkv_ptr.dtype.element_ty
        square = tl.sum(low * low + high * high, axis=1)[:, None]
        rstd = tl.rsqrt(square / (2 * HALF_DIM) + eps)
        q_low = tl.load(q_norm_ptr + r, mask=in_half, other=0.0).to(tl.float32)
        q_high = tl.load(q_norm_ptr + HALF_DIM + r, mask=in_half, other=0.0).to(tl.float32)
        k_low = tl.load(k_norm_ptr + r, mask=in_half, other=0.0).to(tl.float32)
        k_high = tl.load(k_norm_ptr + HALF_DIM + r, mask=in_half, other=0.0).to(tl.float32)
        low = (low * rstd).to(dtype).to(tl.float32) * tl.where(is_q, q_low, k_low)
        high = (high * rstd).to(dtype).to(tl.float32) * tl.where(is_q, q_high, k_high)
        low = low.to(dtype).to(tl.float32)
        high = high.to(dtype).to(tl.float32)

    position = tl.load(positions_ptr + token)
    cos_at = cos_sin_ptr + position * (2 * HALF_DIM) + r
    cos = tl.load(cos_at, mask=in_half, other=0.0)
    sin = tl.load(cos_at + HALF_DIM, mask=in_half, other=0.0)
    new_low = low * cos - high * sin
    new_high = high * cos + low * sin

    q_type = q_out_ptr.dtype.element_ty
    q_at = q_out_ptr + token * (NUM_HEADS * 2 * HALF_DIM) + head * (2 * HALF_DIM) + r
    tl.store(q_at, new_low.to(q_type), mask=is_q & in_half)
    tl.store(q_at + HALF_DIM, new_high.to(q_type), mask=is_q & in_half)

    slot = tl.load(slots_ptr + token)
    kept = slot >= 0
    block = slot // BLOCK_TOKENS
    offset = slot % BLOCK_TOKENS
    k_type = k_cache_ptr.dtype.element_ty
    k_at = k_cache_ptr + block * k_block_stride + offset * k_token_stride
    k_at += (head - NUM_HEADS) * k_head_stride + r
    k_mask = is_k & in_half & kept
    tl.store(k_at, new_low.to(k_type), mask=k_mask)
    tl.store(k_at + HALF_DIM, new_high.to(k_type), mask=k_mask)
    v_at = v_cache_ptr + block * v_block_stride + offset * v_token_stride
    v_at += (head - NUM_HEADS - NUM_KV_HEADS) * v_head_stride + r
    v_mask = is_v & in_half & kept
    tl.store(v_at, low_raw.to(v_cache_ptr.dtype.element_ty), mask=v_mask)
    tl.store(v_at + HALF_DIM, high_raw.to(v_cache_ptr.dtype.element_ty), mask=v_mask)


def _check(
    qkv_TC: torch.Tensor,
    cos_sin_PD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    columns = (num_heads + 2 * num_kv_heads) * head_dim
    if qkv_TC.dim() != 2 or qkv_TC.shape[1] != columns:
        raise ValueError(
            f"rotary_and_cache: qkv {tuple(qkv_TC.shape)}; expected [tokens, {columns}] "
            f"for {num_heads} + 2 x {num_kv_heads} heads of {head_dim}"
        )
    if cos_sin_PD.shape[1] != head_dim or cos_sin_PD.dtype != torch.float32:
        raise ValueError(
            f"rotary_and_cache: table {tuple(cos_sin_PD.shape)} of {cos_sin_PD.dtype}; "
            f"expected float32 [positions, {head_dim}] from rope_table"
        )
    if k_cache.shape != v_cache.shape or k_cache.shape[1::2] != (num_kv_heads, head_dim):
        raise ValueError(
            f"rotary_and_cache: caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}; "
            f"expected [blocks, {num_kv_heads}, block tokens, {head_dim}] twice"
        )


def rotary_and_cache(
    qkv_TC: torch.Tensor,
    cos_sin_PD: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return the rotated queries as a contiguous [T, H, D]; keys and values go to the caches.

    Args:
        qkv_TC: Query heads, key heads, value heads of each token, packed; rows may be strided.
        cos_sin_PD: From `rope_table`.
        positions_T: int64, position of each token in its sequence.
        slots_T: int64, `block * block_tokens + offset` of each token; negative writes nothing.
        k_cache: Pool of key blocks, written in place.
        v_cache: Pool of value blocks, written in place.
        num_heads: Query heads of this rank.
        num_kv_heads: Key/value heads of this rank.
        head_dim: Dimensions of a head, all rotated: pairs are (i, i + head_dim / 2).
        q_norm_D: RMSNorm weight of every query head (Qwen3); given together with `k_norm_D`.
        k_norm_D: RMSNorm weight of every key head.
        eps: Of those two norms.
        backend: What runs it, see `runs_triton`.

    Raises:
        ValueError: When shapes disagree, or only one norm is given.
    """
    _check(qkv_TC, cos_sin_PD, k_cache, v_cache, num_heads, num_kv_heads, head_dim)
    if (q_norm_D is None) != (k_norm_D is None):
        raise ValueError("rotary_and_cache: give both q_norm and k_norm, or neither")
    if not runs_triton(qkv_TC, backend):
        return rotary_and_cache_reference(
            qkv_TC, cos_sin_PD, positions_T, slots_T, k_cache, v_cache,
            num_heads, num_kv_heads, head_dim, q_norm_D, k_norm_D, eps,
        )  # fmt: skip
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError("rotary_and_cache: the last axis of the caches must be dense")
    if qkv_TC.stride(1) != 1:
        qkv_TC = qkv_TC.contiguous()
    num_tokens = len(qkv_TC)
    q_THD = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv_TC.dtype, device=qkv_TC.device)
    if num_tokens == 0:
        return q_THD
    block_r = next_power_of_two(head_dim // 2)
    packed_heads = num_heads + 2 * num_kv_heads
    # 8 heads of 128 are 1024 values, one 16-byte load of each half for every thread of 2 warps;
    # at decode, six such programs a token (8B-class models) use more of the GPU than one would.
    block_h = min(next_power_of_two(packed_heads), 8)
    _rotary_and_cache_kernel[(num_tokens, ceil_div(packed_heads, block_h))](
        qkv_TC,
        cos_sin_PD,
        positions_T,
        slots_T,
        qkv_TC if q_norm_D is None else q_norm_D,
        qkv_TC if k_norm_D is None else k_norm_D,
        q_THD,
        k_cache,
        v_cache,
        eps,
        qkv_TC.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        BLOCK_TOKENS=k_cache.shape[2],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF_DIM=head_dim // 2,
        BLOCK_H=block_h,
        BLOCK_R=block_r,
        HAS_NORM=q_norm_D is not None,
        num_warps=2,
        **overlap(qkv_TC),
    )
    return q_THD
