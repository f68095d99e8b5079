from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from rankwright.kernels.swiglu import swiglu, swiglu_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Close = Callable[[torch.Tensor, torch.Tensor], None]


def test_gate_is_the_first_half() -> None:
    # silu(0) = 0 and silu(large x) = x.
    out = swiglu(torch.tensor([[0.0, 100.0, 7.0, 3.0]]))
    torch.testing.assert_close(out, torch.tensor([[0.0, 300.0]]))


def test_reference_equals_torch() -> None:
    gate_up = torch.randn(5, 38)
    expected = F.silu(gate_up[:, :19]) * gate_up[:, 19:]
    torch.testing.assert_close(swiglu_reference(gate_up), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (3, 67), (2, 1024), (1, 1025)])
def test_kernel_equals_reference(
    tokens: int, columns: int, dtype: torch.dtype, device: str, assert_close: Close
) -> None:
    gate_up = torch.randn(tokens, 2 * columns, device=device).to(dtype)
    assert_close(swiglu(gate_up, backend="triton"), swiglu(gate_up, backend="reference"))


def test_rows_and_columns_may_be_strided(device: str, assert_close: Close) -> None:
    wide = torch.randn(3, 100, device=device)
    for gate_up in (wide[:, 3:41], wide[:, ::2], wide[:, :60].t().contiguous().t()):
        assert_close(swiglu(gate_up, backend="triton"), swiglu(gate_up, backend="reference"))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # its inf becomes a right 0
def test_extreme_gates_stay_finite(device: str, assert_close: Close) -> None:
    gate_up = torch.tensor([[-1e4, 1e4, -0.0, 1.0, 2.0, 3.0]], device=device)
    out = swiglu(gate_up, backend="triton")
    assert_close(out, torch.tensor([[0.0, 2e4, 0.0]], device=device))


def test_no_tokens_is_fine(device: str) -> None:
    assert swiglu(torch.ones(0, 8, device=device), backend="triton").shape == (0, 4)


def test_an_odd_number_of_columns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"input \(2, 7\)"):
        swiglu(torch.ones(2, 7))


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "columns"), [(1, 14336), (513, 14336)])
def test_large_shapes_replay_in_a_graph(tokens: int, columns: int, assert_close: Close) -> None:
    gate_up = torch.randn(tokens, 2 * columns, device="cuda").bfloat16()
    swiglu(gate_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = swiglu(gate_up)
    for _ in range(2):
        gate_up.copy_(torch.randn_like(gate_up))
        graph.replay()
        assert_close(out, swiglu(gate_up, backend="reference"))
