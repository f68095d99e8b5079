"""The rotary step of latent attention, fused with the norm of the latent and the cache write.

Shapes: T tokens, H query heads, E columns of a query head before its rotary ones, L width of the
latent, R rotary width, P positions; the cache is [blocks, 1, block tokens, L + R].
"""

from __future__ import annotations

import torch

from rankwright.kernels.backend import Backend, ceil_div, jit, next_power_of_two, runs_triton, tl
from rankwright.kernels.rms_norm import rms_norm_reference


def mla_rotary_and_cache_reference(
    q_THE: torch.Tensor,
    kv_TC: torch.Tensor,
    norm_L: torch.Tensor,
    cos_sin_PR: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    cache: torch.Tensor,
    eps: float,
) -> None:
    """Rotate the queries in place; normed latents and rotated keys go to their cache slots."""
    rotary, latent = cos_sin_PR.shape[1], len(norm_L)
    cos_T1R, sin_T1R = cos_sin_PR[positions_T][:, None].chunk(2, dim=-1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        low, high = x.float().chunk(2, dim=-1)
        rotated = [low * cos_T1R - high * sin_T1R, high * cos_T1R + low * sin_T1R]
        return torch.cat(rotated, dim=-1).to(x.dtype)

    q_THE[..., -rotary:] = rotate(q_THE[..., -rotary:])
    kept = slots_T >= 0
    block_tokens = cache.shape[2]
    block, offset = slots_T[kept] // block_tokens, slots_T[kept] % block_tokens
    normed_TL = rms_norm_reference(kv_TC[:, :latent], norm_L, eps)
    key_TR = rotate(kv_TC[:, None, latent:])[:, 0]
    cache[block, 0, offset] = torch.cat([normed_TL, key_TR], dim=-1)[kept]


@jit()
def _mla_rotary_kernel(
    q_ptr,
    kv_ptr,
    norm_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    cache_ptr,
    eps,
    q_stride,
    kv_stride,
    block_stride,
    token_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LATENT: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    # Heads of queries in blocks; the last program has the key and the latent.
    part = tl.program_id(1)
    r = tl.arange(0, BLOCK_R)
    in_half = r < HALF
    position = tl.load(positions_ptr + token)
    cos = tl.load(cos_sin_ptr + position * (2 * HALF) + r, mask=in_half, other=0.0)
    sin = tl.load(cos_sin_ptr + position * (2 * HALF) + HALF + r, mask=in_half, other=0.0)
    if part < (NUM_HEADS + BLOCK_H - 1) // BLOCK_H:
        head = part * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (head < NUM_HEADS)[:, None] & in_half[None, :]
        at = (
            q_ptr + token * q_stride + head[:, None] * HEAD_DIM + (HEAD_DIM - 2 * HALF) + r[None, :]
        )
        low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        kind = q_ptr.dtype.element_ty
        tl.store(at, (low * cos[None, :] - high * sin[None, :]).to(kind), mask=mask)
        tl.store(at + HALF, (high * cos[None, :] + low * sin[None, :]).to(kind), mask=mask)
    else:
        slot = tl.load(slots_ptr + token)
        kept = slot >= 0
        row = cache_ptr + slot // BLOCK_TOKENS * block_stride + slot % BLOCK_TOKENS * token_stride
        cache_type = cache_ptr.dtype.element_ty
        c = tl.arange(0, BLOCK_L)
        in_latent = c < LATENT
        x = tl.load(kv_ptr + token * kv_stride + c, mask=in_latent, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, axis=0) / LATENT + eps)
        weight = tl.load(norm_ptr + c, mask=in_latent, other=0.0).to(tl.float32)
        normed = (x * rstd).to(cache_type).to(tl.float32) * weight
        tl.store(row + c, normed.to(cache_type), mask=in_latent & kept)
        key_at = kv_ptr + token * kv_stride + LATENT + r
        key_low = tl.load(key_at, mask=in_half, other=0.0).to(tl.float32)
        key_high = tl.load(key_at + HALF, mask=in_half, other=0.0).to(tl.float32)
        tl.store(
            row + LATENT + r, (key_low * cos - key_high * sin).to(cache_type), mask=in_half & kept
        )
        tl.store(
            row + LATENT + HALF + r,
            (key_high * cos + key_low * sin).to(cache_type),
            mask=in_half & kept,
        )


def mla_rotary_and_cache(
    q_THE: torch.Tensor,
    kv_TC: torch.Tensor,
    norm_L: torch.Tensor,
    cos_sin_PR: torch.Tensor,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    cache: torch.Tensor,
    eps: float,
    *,
    backend: Backend = "auto",
) -> None:
    """Rotate the queries in place, and write each token's row of the cache.

    Args:
        q_THE: Queries, their last R columns rotary; the last two axes are dense.
        kv_TC: The latent, then the key, of each token; rows may be strided.
        norm_L: RMSNorm weight of the latent.
        cos_sin_PR: From `rope_table`; pairs are (i, i + R / 2).
        positions_T: int64.
        slots_T: int64, `block * block_tokens + offset`; negative writes nothing.
        cache: Written in place.
        eps: Of the norm.
        backend: What runs it, see `runs_triton`.

    Raises:
        ValueError: Shapes disagree.
    """
    num_tokens, num_heads, head_dim = q_THE.shape
    latent, rotary = len(norm_L), cos_sin_PR.shape[1]
    columns = latent + rotary
    if (
        kv_TC.shape != (num_tokens, columns)
        or head_dim < rotary
        or cache.shape[1::2] != (1, columns)
    ):
        raise ValueError(
            f"mla_rotary_and_cache: latents {tuple(kv_TC.shape)}, queries {tuple(q_THE.shape)}, "
            f"cache {tuple(cache.shape)}; expected {latent} + {rotary} columns of latents "
            f"and cache, and {rotary} of each query head at least"
        )
    if not runs_triton(q_THE, backend):
        mla_rotary_and_cache_reference(
            q_THE, kv_TC, norm_L, cos_sin_PR, positions_T, slots_T, cache, eps
        )
        return
    if not num_tokens:
        return
    block_h = min(next_power_of_two(num_heads), 16)
    _mla_rotary_kernel[(num_tokens, ceil_div(num_heads, block_h) + 1)](
        q_THE,
        kv_TC,
        norm_L,
        cos_sin_PR,
        positions_T,
        slots_T,
        cache,
        eps,
        q_THE.stride(0),
        kv_TC.stride(0),
        cache.stride(0),
        cache.stride(2),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        LATENT=latent,
        HALF=rotary // 2,
        BLOCK_TOKENS=cache.shape[2],
        BLOCK_H=block_h,
        BLOCK_L=next_power_of_two(latent),
        BLOCK_R=next_power_of_two(rotary // 2),
        num_warps=2,
    )
