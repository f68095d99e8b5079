from collections.abc import Callable

import pytest
import torch

from rankwright.kernels import gated_linear as module
from rankwright.kernels.gated_linear import gated_linear, gated_linear_reference
from rankwright.kernels.skinny_linear import SkinnyConfig, skinny_linear
from rankwright.kernels.swiglu import swiglu

CONFIG = SkinnyConfig(block_n=8, block_k=32, num_warps=4, num_stages=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("inputs", "columns", "block_n"), [(1, 1, 8), (32, 16, 1), (67, 33, 2), (129, 50, 8)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_one_row_equals_the_product_and_its_activation(
    dtype: torch.dtype,
    inputs: int,
    columns: int,
    block_n: int,
    bias: bool,
    device: str,
    assert_close: Callable[..., None],
) -> None:
    x = torch.randn(1, inputs, device=device).to(dtype)
    weight = (torch.randn(2 * columns, inputs, device=device) * inputs**-0.5).to(dtype)
    b = torch.randn(2 * columns, device=device).to(dtype) if bias else None
    config = SkinnyConfig(block_n=block_n, block_k=32, num_warps=4, num_stages=2)
    found = gated_linear(x, weight, b, config=config, backend="triton")
    both = skinny_linear(x, weight, b, config=config, backend="triton")
    assert_close(found, swiglu(both, backend="reference"))
    exact = gated_linear_reference(x.double(), weight.double(), None if b is None else b.double())
    assert (found.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


def test_more_rows_and_strided_ones_take_two_kernels(
    device: str, assert_close: Callable[..., None]
) -> None:
    x = torch.randn(3, 40, device=device)
    weight = torch.randn(12, 40, device=device)
    for rows in (x, x[:1, ::2], x[:0]):
        columns = weight[:, : rows.shape[1]].contiguous()
        found = gated_linear(rows, columns, config=CONFIG, backend="triton")
        assert_close(found, gated_linear_reference(rows, columns))


@pytest.mark.parametrize("wanted", [False, True])
def test_the_kernel_is_taken_where_it_is_wanted(
    wanted: bool, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    taken = []
    monkeypatch.setattr(module, "_wanted", lambda: wanted)
    monkeypatch.setattr(module, "launch_vector", lambda *_, **options: taken.append(options))
    gated_linear(
        torch.randn(1, 64, device=device).bfloat16(),
        torch.randn(64, 64, device=device).bfloat16(),
        backend="triton",
    )
    assert taken == ([{"gated": True}] if wanted else [])


def test_wrong_shapes_are_named(device: str) -> None:
    with pytest.raises(ValueError, match=r"x \(1, 4\) and weight \(3, 4\)"):
        gated_linear(torch.zeros(1, 4, device=device), torch.zeros(3, 4, device=device))
    with pytest.raises(ValueError, match=r"x \(1, 4\) and weight \(2, 5\)"):
        gated_linear(torch.zeros(1, 4, device=device), torch.zeros(2, 5, device=device))
