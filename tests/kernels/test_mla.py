"""Latent attention: absorbed decode against expanded keys, the kernels against their references."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from rankwright.kernels.backend import Backend
from rankwright.kernels.decode_config import DecodeConfig
from rankwright.kernels.mla_attention import mla_decode_attention
from rankwright.kernels.mla_rotary import mla_rotary_and_cache
from rankwright.kernels.rotary import rope_table, rotary_and_cache_reference

Close = Callable[[torch.Tensor, torch.Tensor], None]
NEVER_READ = 2**31 - 1  # a block number that would end far outside the pool


def paged_latents(
    contexts: list[int], columns: int, dtype: torch.dtype, device: str, block_tokens: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cache, tables and lengths; what may not be read is NaN, or a block that does not exist."""
    needed = [-(-context // block_tokens) for context in contexts]
    order = torch.randperm(sum(needed) + 1)
    pool = torch.full((len(order), 2, 1, block_tokens, columns), torch.nan)
    tables = torch.full((len(contexts), max(needed) + 1), NEVER_READ, dtype=torch.int32)
    used = 0
    for b, context in enumerate(contexts):
        tables[b, : needed[b]] = order[used : used + needed[b]]
        for i, block in enumerate(order[used : used + needed[b]]):
            tokens = min(block_tokens, context - i * block_tokens)
            pool[block, 1, :, :tokens] = torch.randn(1, tokens, columns)
        used += needed[b]
    lengths = torch.tensor(contexts, dtype=torch.int32, device=device)
    return pool.to(device, dtype)[:, 1], tables.to(device), lengths


def test_absorbed_queries_meet_latents_as_expanded_keys_do() -> None:
    heads, before, value, latent, rotary, context = 3, 10, 12, 20, 6, 37
    cache, tables, lengths = paged_latents([context], latent + rotary, torch.float32, "cpu")
    up_keys, up_values = torch.randn(heads, before, latent), torch.randn(heads, value, latent)
    q = torch.randn(heads, before + rotary)
    absorbed = torch.cat([(q[:, None, :before] @ up_keys)[:, 0], q[:, before:]], dim=-1)[None]
    found = mla_decode_attention(absorbed, cache, tables, lengths, 0.3, latent)
    out = (up_values @ found[0].unsqueeze(2))[..., 0]
    rows = cache[tables[0, :3].long(), 0].flatten(0, 1)[:context]
    keys = torch.cat(
        [rows[:, :latent] @ up_keys.transpose(1, 2), rows[:, latent:].expand(heads, -1, -1)], -1
    )
    values = rows[:, :latent] @ up_values.transpose(1, 2)
    expected = F.scaled_dot_product_attention(q[:, None], keys, values, scale=0.3)[:, 0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    ("heads", "latent", "rotary", "block_tokens"),
    [(3, 20, 6, 16), (40, 32, 16, 32), (1, 64, 8, 16)],
)
def test_decode_kernel_equals_reference(
    heads: int,
    latent: int,
    rotary: int,
    block_tokens: int,
    num_splits: int,
    dtype: torch.dtype,
    device: str,
    assert_close: Close,
) -> None:
    contexts = [1, 0, block_tokens, 2 * block_tokens + 5]
    cache, tables, lengths = paged_latents(contexts, latent + rotary, dtype, device, block_tokens)
    q = torch.randn(4, heads, latent + rotary, device=device).to(dtype)
    scale = (latent + rotary) ** -0.5
    config = DecodeConfig(tile=16, num_warps=4, num_stages=2, num_splits=num_splits)
    lse, known = torch.full((2, 4, heads), torch.nan, device=device)
    out = mla_decode_attention(
        q, cache, tables, lengths, scale, latent, lse_BH=lse, config=config, backend="triton"
    )
    expected = mla_decode_attention(
        q, cache, tables, lengths, scale, latent, lse_BH=known, backend="reference"
    )
    assert_close(out, expected)
    assert not out[1].any()
    assert torch.isneginf(lse[1]).all()
    torch.testing.assert_close(lse, known, rtol=1e-2, atol=1e-2)


def test_the_chosen_configuration_fits_its_blocks(device: str, assert_close: Close) -> None:
    cache, tables, lengths = paged_latents([70, 3], 26, torch.float32, device)
    q = torch.randn(2, 5, 26, device=device)
    out = mla_decode_attention(q, cache, tables, lengths, 0.2, 20, backend="triton")
    assert_close(out, mla_decode_attention(q, cache, tables, lengths, 0.2, 20, backend="reference"))
    none = mla_decode_attention(q[:0], cache, tables[:0], lengths[:0], 0.2, 20, backend="triton")
    assert none.shape == (0, 5, 20)


def test_shapes_that_disagree_are_refused() -> None:
    cache, tables, lengths = paged_latents([3], 26, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"queries \(1, 2, 25\)"):
        mla_decode_attention(torch.zeros(1, 2, 25), cache, tables, lengths, 1.0, 20)
    with pytest.raises(ValueError, match=r"log-sum-exp \(2,\)"):
        mla_decode_attention(
            torch.zeros(1, 2, 26), cache, tables, lengths, 1.0, 20, lse_BH=torch.zeros(2)
        )
    with pytest.raises(ValueError, match=r"latents \(1, 25\)"):
        mla_rotary_and_cache(
            torch.zeros(1, 2, 16), torch.zeros(1, 25), torch.ones(20), rope_table(6, 8, 1e4),
            torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), cache, 1e-6,
        )  # fmt: skip


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "latent", "rotary"), [(3, 20, 6), (17, 64, 16), (1, 16, 2)])
def test_rotary_step_is_the_norm_and_the_rotation_one_by_one(
    heads: int,
    latent: int,
    rotary: int,
    dtype: torch.dtype,
    backend: Backend,
    device: str,
    assert_close: Close,
) -> None:
    tokens, before, block_tokens = 5, 10, 16
    table = rope_table(rotary, 64, 1e4, device=device)
    positions = torch.randint(0, 64, (tokens,), device=device)
    slots = torch.tensor([3, -1, 40, 16, 0], device=device)
    q = torch.randn(tokens, heads, before + rotary, device=device).to(dtype)
    # Strided, as a part of a fused product is.
    kv = torch.randn(tokens, latent + rotary + 7, device=device).to(dtype)[:, 7:]
    norm = torch.randn(latent, device=device).to(dtype)
    cache = torch.full((3, 1, block_tokens, latent + rotary), torch.nan, device=device).to(dtype)
    out = q.clone()
    mla_rotary_and_cache(
        out, kv, norm, table, positions, slots, cache, 1e-6,
        backend=backend,
    )  # fmt: skip
    # The same rotation as other attention has, of all heads and the key as one more.
    packed = torch.cat([q[..., before:].flatten(1), kv[:, latent:], kv[:, latent:]], dim=-1)
    keys = torch.zeros(3, 1, block_tokens, rotary, device=device, dtype=dtype)
    rotated = rotary_and_cache_reference(
        packed, table, positions, slots, keys, keys.clone(), heads, 1, rotary
    )
    assert_close(out[..., before:], rotated)
    assert torch.equal(out[..., :before], q[..., :before])
    kept = slots >= 0
    written = cache.flatten(0, 2)[slots[kept]]
    normed = F.rms_norm(kv[:, :latent].float(), (latent,), eps=1e-6).to(dtype).float()
    assert_close(written[:, :latent], (normed * norm.float()).to(dtype)[kept])
    assert_close(written[:, latent:], keys.flatten(0, 2)[slots[kept]])
    assert int(cache.isnan().sum()) == (3 * block_tokens - 4) * (latent + rotary)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "heads"), [(1, 16), (64, 16), (4, 128)])
def test_large_decode_replays_in_a_graph(batch: int, heads: int, assert_close: Close) -> None:
    contexts = [int(x) for x in torch.randint(1, 3000, (batch,))]
    cache, tables, lengths = paged_latents(contexts, 576, torch.bfloat16, "cuda", 64)
    q = torch.randn(batch, heads, 576, device="cuda").bfloat16()
    mla_decode_attention(q, cache, tables, lengths, 192**-0.5, 512)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mla_decode_attention(q, cache, tables, lengths, 192**-0.5, 512)
    for _ in range(2):
        q.copy_(torch.randn_like(q))
        graph.replay()
        assert_close(
            out,
            mla_decode_attention(q, cache, tables, lengths, 192**-0.5, 512, backend="reference"),
        )
