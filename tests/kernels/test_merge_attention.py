from collections.abc import Callable

import pytest
import torch

from rankwright.kernels.backend import Backend
from rankwright.kernels.merge_attention import merge_attention

Close = Callable[[torch.Tensor, torch.Tensor], None]


def parts_of(
    scores_BHL: torch.Tensor, v_LD: torch.Tensor, cuts: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the parts of softmax(scores) v cut at `cuts`, and the whole."""
    parts, start = [], 0
    for stop in cuts:
        scores = scores_BHL[..., start:stop]
        lse = (
            scores.logsumexp(-1, keepdim=True) if stop > start else scores.sum(-1, True) - torch.inf
        )
        mean = scores.softmax(-1) @ v_LD[start:stop]
        parts.append(torch.cat([mean, lse], dim=-1))
        start = stop
    return torch.stack(parts), scores_BHL.softmax(-1) @ v_LD


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dim", [1, 64, 80])
@pytest.mark.parametrize("cuts", [[9], [4, 9], [0, 0, 9], [1, 5, 5, 9]])
def test_parts_merge_to_the_whole(
    cuts: list[int], dim: int, backend: Backend, device: str, assert_close: Close
) -> None:
    scores, v = 30 * torch.randn(3, 5, 9), torch.randn(9, dim)
    parts, whole = parts_of(scores.to(device), v.to(device), cuts)
    assert_close(merge_attention(parts, torch.float32, backend=backend), whole)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_query_without_context_gets_zeros(backend: Backend, device: str) -> None:
    parts = torch.zeros(2, 1, 1, 17, device=device)
    parts[..., -1] = -torch.inf
    out = merge_attention(parts, torch.bfloat16, backend=backend)
    assert out.dtype == torch.bfloat16
    assert out.tolist() == [[[0.0] * 16]]


@pytest.mark.parametrize(
    "parts",
    [
        torch.zeros(2, 3, 4),
        torch.zeros(2, 3, 4, 5, dtype=torch.float64),
        torch.zeros(2, 3, 5, 4).transpose(2, 3),
        torch.zeros(2, 3, 4, 1),
    ],
)
def test_other_parts_are_refused(parts: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"parts \(2, 3, .* of torch.*; expected contiguous"):
        merge_attention(parts, torch.float32)
