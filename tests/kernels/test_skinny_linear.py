from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from rankwright.kernels.skinny_linear import (
    SkinnyConfig,
    skinny_config,
    skinny_linear,
)
from rankwright.kernels.tuned import rows_of

CONFIG = SkinnyConfig(block_n=16, block_k=32, num_warps=4, num_stages=2)
SPLIT = replace(CONFIG, num_splits=3)


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
    # A product that its bias cancels is as large as the bias; of one element that is all there is.
    size = expected.abs() if b is None else expected.abs() + b.abs()
    found = skinny_linear(x, weight, b, config=CONFIG, backend="triton")
    assert_close(found, expected, size=size)
    out = torch.full((rows, outputs), torch.nan, dtype=dtype, device=device)
    for backend in ("triton", "reference"):
        options: dict[str, Any] = {"backend": backend, "config": CONFIG}
        given = out.clone()
        assert skinny_linear(x, weight, b, given, **options) is given
        assert_close(given, expected, size=size)


def test_strided_rows_and_weights_are_read_as_they_stand(
    device: str, assert_close: Callable[..., None]
) -> None:
    x, weight = torch.randn(3, 2 * 40, device=device), torch.randn(9, 64, device=device)
    out = skinny_linear(x[:, ::2], weight[:, :40], config=CONFIG, backend="triton")
    assert_close(out, linear(x[:, ::2], weight[:, :40]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "bias"),
    [(2, 96, 16, False), (7, 96, 33, True), (9, 131, 50, True), (16, 33, 9, False)],
)
def test_products_in_splits_equal_those_of_torch_time_after_time(
    dtype: torch.dtype,
    rows: int,
    inputs: int,
    outputs: int,
    bias: bool,
    device: str,
    assert_close: Callable[..., None],
) -> None:
    for _ in range(2):  # the words that count must be left at zero
        x = torch.randn(rows, inputs, device=device).to(dtype)
        weight = (torch.randn(outputs, inputs, device=device) * inputs**-0.5).to(dtype)
        b = torch.randn(outputs, device=device).to(dtype) if bias else None
        expected = linear(x.double(), weight.double(), None if b is None else b.double())
        found = skinny_linear(x, weight, b, config=SPLIT, backend="triton")
        assert_close(found, expected.to(dtype))
        assert torch.equal(skinny_linear(x, weight, b, config=SPLIT, backend="triton"), found)


def test_more_than_one_row_stays_with_cublas_where_none_was_measured() -> None:
    cpu = torch.device("cpu")
    for outputs in (3072, 28672):
        assert skinny_config(1, 4096, outputs, cpu) is not None
        assert skinny_config(2, 4096, outputs, cpu) is None


def test_what_was_measured_is_taken_for_its_rows_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"block_n": 64, "block_k": 128, "num_warps": 4, "num_stages": 5, "num_splits": 3}
    table = {"linear": [{"shape": [8, 4096, 6144], "config": config}]}
    monkeypatch.setattr(
        "rankwright.kernels.skinny_linear.tuned_rows", lambda _, kind: rows_of(table, kind)
    )
    device = torch.device("cpu")
    for rows in (2, 5, 8):
        assert skinny_config(rows, 4096, 6144, device) == SkinnyConfig(64, 128, 4, 5, 3)
    for shape in ((9, 4096, 6144), (8, 4096, 4096), (17, 4096, 6144)):
        assert skinny_config(*shape, device) is None


def test_wrong_shapes_and_too_many_rows_are_named(device: str) -> None:
    x = torch.zeros(17, 4, device=device)
    with pytest.raises(ValueError, match=r"x \(17, 4\) and weight \(3, 5\)"):
        skinny_linear(x, torch.zeros(3, 5, device=device))
    with pytest.raises(ValueError, match="17 rows; the kernel takes 16"):
        skinny_linear(x, torch.zeros(3, 4, device=device), config=CONFIG, backend="triton")
