"""Kernels that are launched while the one before runs give, to the bit, what they give in turn."""

from collections.abc import Callable

import pytest
import torch

from rankwright.kernels import overlap as overlapping
from rankwright.kernels.gpu_facts import GpuFacts
from rankwright.kernels.overlap import overlap
from rankwright.kernels.rms_norm import rms_norm
from rankwright.kernels.skinny_linear import skinny_linear
from rankwright.kernels.swiglu import swiglu


def test_no_kernel_is_launched_early_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlapping, "wanted", _always)
    assert overlap(torch.empty(1)) == {"OVERLAP": False}


@pytest.mark.parametrize(
    ("capability", "variable", "early"),
    [((9, 0), "1", True), ((10, 0), "", True), ((9, 0), "0", False), ((8, 9), "1", False)],
)
def test_the_variable_and_the_gpu_decide_whether_kernels_overlap(
    capability: tuple[int, int], variable: str, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(overlapping, "gpu_facts", lambda _: GpuFacts("", 1, capability))
    monkeypatch.setenv("RANKWRIGHT_OVERLAP_KERNELS", variable)
    overlapping.wanted.cache_clear()
    try:
        assert overlap(torch.empty(1))["OVERLAP"] is early
    finally:
        overlapping.wanted.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
def test_a_chain_of_layers_is_the_same_overlapped(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("kernels overlap from compute capability 9.0 on")
    dim, columns, layers = 2048, 6144, 12

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

    norm_D = made(dim)
    weights = [(made(columns, dim) / 45, made(dim, columns // 2) / 55) for _ in range(layers)]
    x_TD = made(rows, dim)

    def run() -> None:
        residual_TD = x_TD.clone()
        hidden_TD = torch.zeros_like(x_TD)
        for gate_up, down in weights:
            hidden_TD = rms_norm(hidden_TD, norm_D, 1e-6, residual_TD)
            hidden_TD = skinny_linear(swiglu(skinny_linear(hidden_TD, gate_up)), down)
        out_TD.copy_(residual_TD + hidden_TD)

    out_TD = torch.empty_like(x_TD)
    outs = []
    for early in (False, True):
        monkeypatch.setattr(overlapping, "wanted", [_never, _always][early])
        replay = _captured(run)
        for _ in range(20):
            out_TD.fill_(torch.nan)
            replay()
            outs.append(out_TD.clone())
    for out in outs[1:]:
        assert torch.equal(out, outs[0])
    assert not torch.isnan(outs[0]).any()


def _never() -> bool:
    return False


def _always() -> bool:
    return True


def _captured(call: Callable[[], None]) -> Callable[[], None]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
