import pytest
import torch

from rankwright.kernels.backend import Backend
from rankwright.kernels.shard_embedding import shard_embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 70, 1030])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_shards_add_up_to_the_whole(
    dtype: torch.dtype, dim: int, given: bool, backend: Backend, device: str
) -> None:
    whole = torch.randn(11, dim, device=device).to(dtype)
    ids = torch.tensor([0, 3, 4, 10, 4], device=device)
    parts = []
    for first, stop in ((0, 4), (4, 5), (5, 11)):
        wide = torch.full((stop - first, dim + 3), torch.nan, device=device, dtype=dtype)
        wide[:, :dim] = whole[first:stop]
        out = torch.full((5, dim), torch.nan, device=device, dtype=dtype) if given else None
        part = shard_embedding(ids, wide[:, :dim], first, out, backend=backend)
        assert out is None or part is out
        here = (ids >= first) & (ids < stop)
        assert torch.equal(part[here], whole[ids[here]])
        assert (part[~here] == 0).all()
        parts.append(part)
    assert torch.equal(torch.stack(parts).sum(0), whole[ids])


def test_no_tokens_need_no_launch(device: str) -> None:
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    weight = torch.zeros(2, 3, device=device)
    assert shard_embedding(nothing, weight, 0, backend="triton").shape == (0, 3)
