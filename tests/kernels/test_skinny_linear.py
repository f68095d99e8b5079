from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from rankwright.kernels.skinny_linear import (
    SkinnyConfig,
    skinny_config,
    skinny_linear,
)

CONFIG = SkinnyConfig(block_n=16, block_k=32, num_warps=4, num_stages=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7, 16])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (32, 16), (67, 33), (129, 50)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_equal_those_of_torch(
    dtype: torch.dtype,
    rows: int,
    inputs: int,
    outputs: int,
    bias: bool,
    device: str,
    assert_close: Callable[..., None],
) -> None:
    x = torch.randn(rows, inputs, device=device).to(dtype)
    weight = (torch.randn(outputs, inputs, device=device) * inputs**-0.5).to(dtype)
    b = torch.randn(outputs, device=device).to(dtype) if bias else None
    expected = linear(x.double(), weight.double(), None if b is None else b.double()).to(dtype)
    assert_close(skinny_linear(x, weight, b, config=CONFIG, backend="triton"), expected)
    out = torch.full((rows, outputs), torch.nan, dtype=dtype, device=device)
    for backend in ("triton", "reference"):
        options: dict[str, Any] = {"backend": backend, "config": CONFIG}
        given = out.clone()
        assert skinny_linear(x, weight, b, given, **options) is given
        assert_close(given, expected)


def test_strided_rows_and_weights_are_read_as_they_stand(
    device: str, assert_close: Callable[..., None]
) -> None:
    x, weight = torch.randn(3, 2 * 40, device=device), torch.randn(9, 64, device=device)
    out = skinny_linear(x[:, ::2], weight[:, :40], config=CONFIG, backend="triton")
    assert_close(out, linear(x[:, ::2], weight[:, :40]))


def test_more_than_one_row_stays_with_cublas_unless_a_cut_is_given() -> None:
    for outputs in (3072, 28672):
        assert skinny_config(1, outputs, 132) is not None
        assert skinny_config(2, outputs, 132) is None


def test_wrong_shapes_and_too_many_rows_are_named(device: str) -> None:
    x = torch.zeros(17, 4, device=device)
    with pytest.raises(ValueError, match=r"x \(17, 4\) and weight \(3, 5\)"):
        skinny_linear(x, torch.zeros(3, 5, device=device))
    with pytest.raises(ValueError, match="17 rows; the kernel takes 16"):
        skinny_linear(x, torch.zeros(3, 4, device=device), config=CONFIG, backend="triton")
