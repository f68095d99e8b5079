from collections.abc import Callable

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rankwright.kernels.rms_norm import rms_norm, rms_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Close = Callable[[torch.Tensor, torch.Tensor], None]


def test_a_row_is_divided_by_its_root_mean_square() -> None:
    out = rms_norm(torch.tensor([[3.0, -3.0], [0.5, 0.5]]), torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(out, torch.tensor([[1.0, -2.0], [1.0, 2.0]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_equals_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 64).to(dtype), torch.randn(64).to(dtype)
    module = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    module.weight.data.copy_(weight)
    assert torch.equal(rms_norm_reference(x, weight, 1e-5), module(x))
    residual = torch.randn(7, 64).to(dtype)
    expected = residual + x
    assert torch.equal(rms_norm_reference(x, weight, 1e-5, residual), module(expected))
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 1), (3, 64), (2, 67), (1, 257)])
def test_kernel_equals_reference(
    tokens: int, dim: int, with_residual: bool, dtype: torch.dtype, device: str, assert_close: Close
) -> None:
    x = torch.randn(tokens, dim, device=device).to(dtype)
    weight = torch.randn(dim, device=device).to(dtype)
    residual = torch.randn(tokens, dim, device=device).to(dtype) if with_residual else None
    expected_residual = None if residual is None else residual.clone()
    expected = rms_norm(x, weight, 1e-6, expected_residual, backend="reference")
    assert_close(rms_norm(x, weight, 1e-6, residual, backend="triton"), expected)
    if residual is not None and expected_residual is not None:
        assert torch.equal(residual, expected_residual)


def test_residual_keeps_its_own_dtype(device: str, assert_close: Close) -> None:
    x = torch.randn(2, 64, device=device).bfloat16()
    weight = torch.randn(64, device=device).bfloat16()
    residual = torch.randn(2, 64, device=device)
    total = residual + x
    out = rms_norm(x, weight, 1e-6, residual, backend="triton")
    assert torch.equal(residual, total)
    assert_close(out, rms_norm(total, weight.float(), 1e-6).bfloat16())


def test_rows_and_columns_may_be_strided(device: str, assert_close: Close) -> None:
    wide = torch.randn(3, 100, device=device)
    weight = torch.randn(33, device=device)
    for x in (wide[:, 5:38], wide[:, 1:99].t()[:33, :].t(), wide[:, :99:3]):
        expected = rms_norm(x.clone(), weight, 1e-6, backend="reference")
        assert_close(rms_norm(x, weight, 1e-6, backend="triton"), expected)
    residual = torch.randn(3, 50, device=device)
    untouched = residual[:, 33:].clone()
    expected_residual = residual[:, :33] + wide[:, :33]
    rms_norm(wide[:, :33], weight, 1e-6, residual[:, :33], backend="triton")
    assert torch.equal(residual[:, :33], expected_residual)
    assert torch.equal(residual[:, 33:], untouched)


def test_no_tokens_is_fine(device: str) -> None:
    out = rms_norm(
        torch.ones(0, 8, device=device), torch.ones(8, device=device), 1e-6, backend="triton"
    )
    assert out.shape == (0, 8)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"x \(2, 8\) and weight \(9,\)"):
        rms_norm(torch.ones(2, 8), torch.ones(9), 1e-6)
    with pytest.raises(ValueError, match=r"residual \(3, 8\)"):
        rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6, torch.ones(3, 8))
    with pytest.raises(ValueError, match="backend='cuda'"):
        rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6, backend="cuda")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "dim"), [(1, 4096), (257, 4096), (64, 5120), (33, 16384)])
def test_large_shapes_replay_in_a_graph(tokens: int, dim: int, assert_close: Close) -> None:
    x, residual = (torch.randn(tokens, dim, device="cuda").bfloat16() for _ in range(2))
    weight = torch.randn(dim, device="cuda").bfloat16()
    rms_norm(x, weight, 1e-5, residual.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rms_norm(x, weight, 1e-5, residual)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        expected_residual = residual.clone()
        expected = rms_norm(x, weight, 1e-5, expected_residual, backend="reference")
        graph.replay()
        assert_close(out, expected)
        assert torch.equal(residual, expected_residual)
