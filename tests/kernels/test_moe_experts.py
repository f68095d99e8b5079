"""Alignment and grouped GEMMs of a MoE block against their references."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.conftest import DEVICE

from rankwright.kernels.backend import Backend
from rankwright.kernels.moe_align import align, max_blocks
from rankwright.kernels.moe_configs import ExpertsConfig, Tile, experts_config, rule_config
from rankwright.kernels.moe_experts import Experts, run_experts, run_experts_reference

Close = Callable[[torch.Tensor, torch.Tensor], None]
SMALL = ExpertsConfig(16, Tile(16, 16, 4, 2, 2), Tile(32, 16, 4, 2, 1))


def made_up(
    tokens: int,
    top_k: int,
    slots: int,
    hidden: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bias: bool = False,
    limit: float | None = None,
) -> tuple[torch.Tensor, Experts, torch.Tensor, torch.Tensor]:
    """Tokens, experts, weights and slots; about a third of the pairs are another rank's."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    experts = Experts(
        random(slots, 2 * width, hidden) * hidden**-0.5,
        random(slots, hidden, width) * width**-0.5,
        random(slots, 2 * width) if bias else None,
        random(slots, hidden) if bias else None,
        limit,
    )
    chosen = torch.stack([torch.randperm(max(slots + slots // 2, top_k)) for _ in range(tokens)])
    chosen = chosen[:, :top_k].to(device, torch.int32)
    chosen = chosen.where(chosen < slots, -1)
    weights = torch.rand(tokens, top_k, device=device)
    return random(tokens, hidden), experts, weights, chosen


def test_reference_is_the_sum_of_gated_mlps() -> None:
    x, experts, weights, _ = made_up(3, 2, 4, 6, 5)
    slots = torch.tensor([[0, 3], [3, 1], [-1, 2]], dtype=torch.int32)
    out = run_experts_reference(x, experts, weights, slots)
    for token in range(3):
        expected = torch.zeros(6)
        for k in range(2):
            slot = int(slots[token, k])
            if slot >= 0:
                gate, up = (experts.gate_up[slot] @ x[token]).chunk(2)
                expected += weights[token, k] * (experts.down[slot] @ (F.silu(gate) * up))
        torch.testing.assert_close(out[token], expected)


def test_clamped_activation_by_hand() -> None:
    # One column: gate 9 is cut to 7, up -8 to -7; (up + 1) gate sigmoid(1.702 gate).
    experts = Experts(
        torch.tensor([[[9.0], [-8.0]]]), torch.ones(1, 1, 1), torch.zeros(1, 2), None, 7.0
    )
    out = run_experts(
        torch.ones(1, 1), experts, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32)
    )
    assert out.item() == pytest.approx(-6 * 7 / (1 + 2.718281828 ** (-1.702 * 7)))


@settings(max_examples=25, deadline=None)
@given(
    slots=st.lists(st.integers(-1, 4), max_size=60),
    num_slots=st.integers(1, 5),
    rows=st.sampled_from([1, 2, 16]),
)
def test_alignment_holds_each_pair_of_this_rank_once(
    slots: list[int], num_slots: int, rows: int
) -> None:
    found = torch.tensor(slots, dtype=torch.int32, device=DEVICE).view(-1, 1)
    if not slots:
        return
    ours = align(found, num_slots, rows, backend="triton")
    theirs = align(found, num_slots, rows, backend="reference")
    assert torch.equal(ours.block_slots, theirs.block_slots)
    assert ours.max_blocks == max_blocks(len(slots), num_slots, rows)
    used = int((theirs.block_slots >= 0).sum()) * rows
    assert torch.equal(ours.pairs[:used], theirs.pairs[:used])
    pairs = [int(pair) for pair in ours.pairs[:used] if pair < len(slots)]
    assert sorted(pairs) == [i for i, slot in enumerate(slots) if 0 <= slot < num_slots]


def test_alignment_of_more_pairs_than_one_round_takes(device: str) -> None:
    slots = torch.randint(-1, 3, (700, 3), dtype=torch.int32, device=device)
    ours = align(slots, 3, 16, backend="triton")
    theirs = align(slots, 3, 16, backend="reference")
    used = int((theirs.block_slots >= 0).sum()) * 16
    assert torch.equal(ours.block_slots, theirs.block_slots)
    assert torch.equal(ours.pairs[:used], theirs.pairs[:used])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "top_k", "slots", "hidden", "width"),
    [(1, 2, 3, 16, 16), (1, 1, 1, 7, 5), (37, 2, 3, 40, 24), (5, 4, 9, 33, 17), (2, 2, 40, 24, 9)],
)
def test_kernel_equals_reference(
    tokens: int,
    top_k: int,
    slots: int,
    hidden: int,
    width: int,
    dtype: torch.dtype,
    device: str,
    assert_close: Close,
) -> None:
    made = made_up(tokens, top_k, slots, hidden, width, dtype=dtype, device=device)
    out = run_experts(*made, config=SMALL, backend="triton")
    # A sum of K rounded rows has K + 1 roundings; the norm's share of them is below 2.
    expected = run_experts_reference(*made)
    assert out.dtype == dtype
    bound = (16 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    assert (out - expected).float().norm() <= bound * expected.float().norm()


@pytest.mark.parametrize("limit", [None, 0.5])
def test_biases_and_the_clamped_activation(
    limit: float | None, device: str, assert_close: Close
) -> None:
    made = made_up(21, 2, 3, 20, 12, device=device, bias=True, limit=limit)
    assert_close(run_experts(*made, config=SMALL, backend="triton"), run_experts_reference(*made))


def test_tokens_may_be_strided(device: str, assert_close: Close) -> None:
    _, experts, weights, slots = made_up(9, 2, 3, 20, 12, device=device)
    wide = torch.randn(9, 60, device=device)
    for tokens in (wide[:, 7:27], wide[:, ::3]):
        out = run_experts(tokens, experts, weights, slots, config=SMALL, backend="triton")
        assert_close(out, run_experts_reference(tokens, experts, weights, slots))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_rank_that_is_not_chosen_returns_zeros(backend: Backend, device: str) -> None:
    x, experts, weights, slots = made_up(3, 2, 3, 20, 12, device=device)
    out = run_experts(x, experts, weights, torch.full_like(slots, -1), backend=backend)
    assert torch.equal(out, torch.zeros_like(x))
    none = run_experts(x[:0], experts, weights[:0], slots[:0], backend=backend)
    assert none.shape == (0, 20)


def test_shapes_that_disagree_are_refused() -> None:
    x, experts, weights, slots = made_up(3, 2, 3, 20, 12)
    with pytest.raises(ValueError, match=r"run_experts: tokens \(3, 19\)"):
        run_experts(x[:, :19], experts, weights, slots)
    with pytest.raises(ValueError, match=r"weights \(2, 2\)"):
        run_experts(x, experts, weights[:2], slots)


def test_more_rows_an_expert_take_larger_blocks() -> None:
    shape = {"num_experts": 8, "top_k": 2, "width": 64, "hidden_size": 64}
    device = torch.device("cpu")
    rows = [
        experts_config(num_tokens=n, dtype=torch.bfloat16, device=device, **shape).block_rows
        for n in (1, 64, 128, 4096)
    ]
    assert rows == [16, 32, 64, 128]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 20, 40, 300])
@pytest.mark.parametrize(("slots", "top_k"), [(8, 2), (64, 8)])
def test_large_shapes_replay_in_a_graph(rows: int, slots: int, top_k: int) -> None:
    tokens = max(1, rows * slots // top_k)
    made = made_up(tokens, top_k, slots, 1024, 768, dtype=torch.bfloat16, device="cuda")
    x, experts, weights, chosen = made
    config = rule_config(rows)
    run_experts(*made, config=config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_experts(*made, config=config)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        chosen.copy_(chosen[torch.randperm(tokens, device="cuda")])
        graph.replay()
        expected = run_experts_reference(x, experts, weights, chosen)
        assert (out - expected).float().norm() <= 2**-7 * expected.float().norm()
