import pytest
import torch

from rankwright.kernels import weights_ahead
from rankwright.kernels.gpu_facts import GpuFacts
from rankwright.kernels.weights_ahead import share_ahead

MEBIBYTE = 2**20


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The compute capability of every device, to be changed; and 16 MiB are wanted."""
    found = [(9, 0)]
    monkeypatch.setattr(weights_ahead, "wanted_bytes", lambda: 16 * MEBIBYTE)
    monkeypatch.setattr(weights_ahead, "gpu_facts", lambda _: GpuFacts("", 132, found[0]))
    return found


@pytest.mark.parametrize(("programs", "askers"), [(512, 264), (100, 100), (7168, 264)])
def test_the_last_programs_ask_for_no_more_than_there_is_or_is_wanted(
    capability: list[tuple[int, int]], programs: int, askers: int
) -> None:
    for rows in (8, 4096, 28672):
        weight = torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta")
        number, each = share_ahead(weight, programs, 128)
        assert number == askers
        assert each % (16 * 128) == 0
        there = min(rows * 8192, 16 * MEBIBYTE)
        assert there - number * 16 * 128 < number * each <= there


def test_nobody_asks_where_it_is_not_known_or_cannot_be_done(
    capability: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    assert share_ahead(weight, 512, 128)[1] > 0
    assert share_ahead(None, 512, 128) == (0, 0)
    assert share_ahead(weight[:, ::2], 512, 128) == (0, 0)
    assert share_ahead(torch.empty(4096, 4096), 512, 128) == (0, 0)
    capability[0] = (8, 9)
    assert share_ahead(weight, 512, 128) == (0, 0)
    capability[0] = (9, 0)
    monkeypatch.setattr(weights_ahead, "wanted_bytes", lambda: 0)
    assert share_ahead(weight, 512, 128) == (0, 0)
