from typing import Any

import pytest
import torch

from rankwright.kernels.token_feed import feed_tokens


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("count", [0, 1, 255, 257, 700])
def test_negative_ids_name_rows_of_the_step_before(backend: Any, count: int, device: str) -> None:
    drawn = torch.randint(0, 2**40, (31,), device=device)
    ids = torch.randint(0, 2**40, (count,), device=device)
    rows = torch.randint(0, 31, (count,), device=device)
    named = torch.rand(count, device=device) < 0.5
    out = feed_tokens(torch.where(named, -1 - rows, ids), drawn, backend=backend)
    assert out.tolist() == torch.where(named, drawn[rows], ids).tolist()


def test_strided_ids_are_refused(device: str) -> None:
    ids = torch.zeros(8, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="a dense vector of int64"):
        feed_tokens(ids[::2], ids)
