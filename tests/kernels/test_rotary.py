from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rankwright.kernels.rotary import rope_table, rotary_and_cache

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Close = Callable[[torch.Tensor, torch.Tensor], None]

YARN = {"rope_type": "yarn", "factor": 3.7, "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn with an attention factor": YARN | {"attention_factor": 0.8},
    "yarn with other betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn of DeepSeek": YARN | {"mscale": 0.707, "mscale_all_dim": 1.1},
    "yarn untruncated": YARN | {"truncate": False},
}


def test_position_zero_turns_nothing_and_the_first_pair_turns_one_radian_a_position() -> None:
    table = rope_table(4, 3, 10000.0)
    torch.testing.assert_close(table[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    angle = torch.tensor([2.0, 2.0 / 100])  # 10000 ** (-2 / 4) = 1 / 100
    torch.testing.assert_close(table[2], torch.cat([angle.cos(), angle.sin()]))


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 10000.0), (80, 500000.0), (128, 1e6)])
def test_table_equals_transformers_bit_for_bit(name: str, head_dim: int, theta: float) -> None:
    positions = 9001  # past 8192 and 512
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta} | (SCALINGS[name] or {"rope_type": "default"}),
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.ones(1), torch.arange(positions)[None])
    half = head_dim // 2
    expected = torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)
    assert torch.equal(rope_table(head_dim, positions, theta, SCALINGS[name]), expected)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "llama4"}, "'llama4' is not known; expected default, linear, llama3, yarn"),
        ({"rope_type": "linear"}, "'linear' lacks factor"),
        ({"type": "llama3", "factor": 8.0}, "lacks low_freq_factor, high_freq_factor, original"),
    ],
)
def test_bad_scaling_is_named(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_table(64, 8, 1e4, scaling)


class Case:
    """Random inputs of one call: caches full of NaN in a pool that other layers share."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        tokens: int,
        dtype: torch.dtype,
        device: str,
        blocks: int = 3,
        block_tokens: int = 16,
    ) -> None:
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, device=device).to(dtype)
        self.table = rope_table(dim, 100, 1e4, device=device)
        self.positions = torch.randint(0, 100, (tokens,), device=device)
        self.slots = torch.randperm(blocks * block_tokens, device=device)[:tokens]
        pool = torch.full((2, blocks, 2, kv_heads, block_tokens, dim), torch.nan, device=device)
        self.pool = pool.to(dtype)

    def run(self, backend: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        pool = self.pool.clone()
        q = rotary_and_cache(
            self.qkv, self.table, self.positions, self.slots, pool[0, :, 1], pool[1, :, 1],
            self.heads, self.kv_heads, self.dim, backend=backend, **options,
        )  # fmt: skip
        return q, pool


def test_reference_equals_transformers() -> None:
    case = Case(6, 2, 32, 5, torch.float32, "cpu")
    q_norm, k_norm = Qwen3RMSNorm(32, eps=1e-5), Qwen3RMSNorm(32, eps=1e-5)
    for norm in (q_norm, k_norm):
        norm.weight.requires_grad_(False).uniform_(0.5, 1.5)
    heads = case.qkv.view(5, 10, 32)
    cos, sin = case.table[case.positions].repeat(1, 2).view(5, 4, 16)[:, [0, 2, 1, 3]].chunk(2, 1)
    q, k = apply_rotary_pos_emb(
        q_norm(heads[None, :, :6]).transpose(1, 2),
        k_norm(heads[None, :, 6:8]).transpose(1, 2),
        cos.flatten(1)[None],
        sin.flatten(1)[None],
    )
    out, pool = case.run("reference", q_norm_D=q_norm.weight, k_norm_D=k_norm.weight, eps=1e-5)
    torch.testing.assert_close(out, q[0].transpose(0, 1))
    for token, slot in enumerate(case.slots.tolist()):
        block, offset = divmod(slot, 16)
        torch.testing.assert_close(pool[0, block, 1, :, offset], k[0, :, token])
        assert torch.equal(pool[1, block, 1, :, offset], heads[token, 8:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "tokens"),
    [(9, 3, 64, 2), (2, 2, 80, 3), (4, 1, 128, 1), (1, 1, 2, 3)],
)
def test_kernel_equals_reference(
    heads: int,
    kv_heads: int,
    dim: int,
    tokens: int,
    with_norm: bool,
    dtype: torch.dtype,
    device: str,
    assert_close: Close,
) -> None:
    case = Case(heads, kv_heads, dim, tokens, dtype, device)
    norms = {}
    if with_norm:
        norms = {f"{x}_norm_D": (torch.rand(dim, device=device) + 0.5).to(dtype) for x in "qk"}
    out, pool = case.run("triton", **norms)
    expected, expected_pool = case.run("reference", **norms)
    assert out.is_contiguous()
    assert_close(out, expected)
    assert torch.equal(pool.isnan(), expected_pool.isnan())  # wrote its slots and nothing else
    assert_close(pool.nan_to_num(), expected_pool.nan_to_num())


def test_padding_tokens_write_nothing(device: str) -> None:
    case = Case(2, 1, 16, 4, torch.float32, device)
    case.slots[1:] = -1
    for backend in ("triton", "reference"):
        q, pool = case.run(backend)
        assert not q.isnan().any()
        assert int((~pool.isnan()).sum()) == 2 * 16  # one key and one value


def test_packed_rows_may_be_strided(device: str, assert_close: Close) -> None:
    case = Case(2, 1, 16, 3, torch.float32, device)
    expected, expected_pool = case.run("reference")
    wide = torch.randn(3, 100, device=device)
    wide[:, 7:71] = case.qkv
    for qkv in (wide[:, 7:71], case.qkv.t().contiguous().t()):
        case.qkv = qkv
        q, pool = case.run("triton")
        assert_close(q, expected)
        assert_close(pool.nan_to_num(), expected_pool.nan_to_num())


def test_no_tokens_is_fine(device: str) -> None:
    case = Case(2, 1, 16, 0, torch.float32, device)
    for backend in ("triton", "reference"):
        assert case.run(backend)[0].shape == (0, 2, 16)


def test_wrong_shapes_are_named() -> None:
    case = Case(2, 1, 16, 3, torch.float32, "cpu")
    with pytest.raises(ValueError, match="both q_norm and k_norm"):
        case.run("auto", q_norm_D=torch.ones(16))
    case.heads = 3
    with pytest.raises(ValueError, match=r"qkv \(3, 64\); expected \[tokens, 80\]"):
        case.run("auto")
    case.heads, case.table = 2, case.table[:, :8]
    with pytest.raises(ValueError, match=r"expected float32 \[positions, 16\]"):
        case.run("auto")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_large_shapes_replay_in_a_graph(tokens: int, assert_close: Close) -> None:
    case = Case(32, 8, 128, tokens, torch.bfloat16, "cuda", blocks=20, block_tokens=64)
    norms = {f"{x}_norm_D": (torch.rand(128, device="cuda") + 0.5).bfloat16() for x in "qk"}
    case.run("triton", **norms)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, pool = case.run("triton", **norms)
    for _ in range(2):
        case.qkv.copy_(torch.randn_like(case.qkv))
        case.slots.copy_(torch.randperm(20 * 64, device="cuda")[:tokens])
        graph.replay()
        expected, expected_pool = case.run("reference", **norms)
        assert_close(out, expected)
        assert torch.equal(pool.isnan(), expected_pool.isnan())
        assert_close(pool.nan_to_num(), expected_pool.nan_to_num())
