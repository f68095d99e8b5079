from collections.abc import Callable
from copy import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from rankwright.kernels.backend import Backend
from rankwright.kernels.decode_attention import decode_attention
from rankwright.kernels.decode_config import (
    DecodeConfig,
    decode_config,
    decode_workspace_elements,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Close = Callable[[torch.Tensor, torch.Tensor], None]
NEVER_READ = 2**31 - 1  # a block number that would end far outside the pool


class Case:
    """Random inputs of one call: what may not be read is NaN, or a block that does not exist."""

    def __init__(
        self,
        contexts: list[int],
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        device: str,
        block_tokens: int = 16,
        spare_columns: int = 2,
    ) -> None:
        needed = [-(-context // block_tokens) for context in contexts]
        order = torch.randperm(sum(needed) + 1)
        # The caches are one layer's slice of a pool, so their blocks are not adjacent.
        pool = torch.full((2, len(order), 2, kv_heads, block_tokens, dim), torch.nan)
        self.tables = torch.full(
            (len(contexts), max(needed) + spare_columns), NEVER_READ, dtype=torch.int32
        )
        used = 0
        for b, context in enumerate(contexts):
            self.tables[b, : needed[b]] = order[used : used + needed[b]]
            for i, block in enumerate(order[used : used + needed[b]]):
                tokens = min(block_tokens, context - i * block_tokens)
                pool[:, block, 1, :, :tokens] = torch.randn(2, kv_heads, tokens, dim)
            used += needed[b]
        self.k, self.v = pool.to(device, dtype)[:, :, 1].unbind()
        self.q = torch.randn(len(contexts), heads, dim).to(device, dtype)
        self.tables = self.tables.to(device)
        self.contexts = torch.tensor(contexts, dtype=torch.int32, device=device)
        self.scale = dim**-0.5
        self.group: int | None = None
        self.head_offset = 0

    def run(self, backend: Any, **options: Any) -> torch.Tensor:
        return decode_attention(
            self.q, self.k, self.v, self.tables, self.contexts, self.scale,
            backend=backend, group=self.group, head_offset=self.head_offset, **options,
        )  # fmt: skip

    def heads(self, first: int, last: int) -> "Case":
        """Return what a rank with these query heads has of the case."""
        part = copy(self)
        group = self.q.shape[1] // self.k.shape[1]
        part.q, part.group, part.head_offset = self.q[:, first:last], group, first % group
        kv = slice(first // group, (last - 1) // group + 1)
        part.k, part.v = self.k[:, kv], self.v[:, kv]
        return part

    def sdpa(self, window: int | None = None) -> torch.Tensor:
        """Return the same by PyTorch, one sequence at a time, in float32."""
        out = torch.zeros_like(self.q, dtype=torch.float32)
        for b, context in enumerate(self.contexts.tolist()):
            if context == 0:
                continue
            blocks = self.tables[b, : -(-context // self.k.shape[2])].long()
            first = 0 if window is None else max(0, context - window)
            k, v = (
                x[blocks].transpose(0, 1).flatten(1, 2)[None, :, first:context].float()
                for x in (self.k, self.v)
            )
            q = self.q[b, None, :, None].float()
            out[b] = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=True)[
                0, :, 0
            ]
        return out.to(self.q.dtype)


def test_equal_scores_give_the_mean_of_the_values() -> None:
    k = torch.zeros(1, 1, 16, 64)
    v = torch.arange(16.0)[None, None, :, None].expand(1, 1, 16, 64).contiguous()
    tables, contexts = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    q = torch.randn(1, 2, 64)
    out = decode_attention(q, k, v, tables, contexts, 1.0)
    torch.testing.assert_close(out, torch.full((1, 2, 64), 2.0))  # of 0, 1, 2, 3, 4
    out = decode_attention(q, k, v, tables, contexts, 1.0, window=2)
    torch.testing.assert_close(out, torch.full((1, 2, 64), 3.5))


@pytest.mark.parametrize("window", [None, 1, 20, 100])
def test_reference_equals_sdpa(window: int | None, assert_close: Close) -> None:
    case = Case([1, 17, 0, 48, 33], 6, 2, 80, torch.float32, "cpu")
    assert_close(case.run("reference", window=window), case.sdpa(window))


def test_a_sink_takes_its_share_of_the_weight() -> None:
    # Two tokens of score 0 and a sink of log 2: half of the weight is the sink's.
    k, v = torch.zeros(1, 1, 16, 64), torch.ones(1, 1, 16, 64)
    tables, contexts = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    sinks = torch.tensor([2.0]).log()
    out = decode_attention(torch.randn(1, 1, 64), k, v, tables, contexts, 1.0, sinks_H=sinks)
    torch.testing.assert_close(out, torch.full((1, 1, 64), 0.5))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_kernel_with_sinks_equals_reference(
    num_splits: int, window: int | None, device: str, assert_close: Close
) -> None:
    case = Case([1, 70, 0, 33], 6, 2, 64, torch.float32, device)
    # From far below every score to far above.
    sinks = torch.tensor([-1e4, -1.0, 0.0, 1.0, 3.0, 60.0], device=device)
    out = case.run("triton", num_splits=num_splits, window=window, sinks_H=sinks)
    assert_close(out, case.run("reference", window=window, sinks_H=sinks))
    assert_close(out[:, 0], case.sdpa(window)[:, 0])
    assert not out[2].any()
    assert out[0, 5].norm() < 1e-20


def test_sinks_with_a_log_sum_exp_are_refused() -> None:
    case = Case([5], 2, 2, 64, torch.float32, "cpu")
    for sinks, lse in ((torch.zeros(2), torch.zeros(1, 2)), (torch.zeros(3), None)):
        with pytest.raises(ValueError, match=r"sinks \(\d,\) for 2 heads"):
            case.run("reference", sinks_H=sinks, lse_BH=lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_tokens"),
    [(9, 3, 64, 16), (2, 2, 80, 32), (8, 2, 96, 16), (4, 1, 128, 128), (2, 1, 256, 16)],
)
def test_kernel_equals_reference(
    heads: int,
    kv_heads: int,
    dim: int,
    block_tokens: int,
    num_splits: int,
    dtype: torch.dtype,
    device: str,
    assert_close: Close,
) -> None:
    contexts = [1, block_tokens + 1]
    case = Case(contexts, heads, kv_heads, dim, dtype, device, block_tokens)
    assert_close(case.run("triton", num_splits=num_splits), case.run("reference"))


@pytest.mark.parametrize("window", [1, 16, 23, 1000])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_window_hides_what_lies_before_it(
    window: int, num_splits: int, device: str, assert_close: Close
) -> None:
    case = Case([1, 40, 32], 2, 1, 64, torch.float32, device)
    expected = case.sdpa(window)
    for b, context in enumerate(case.contexts.tolist()):  # as if those blocks had been freed
        case.tables[b, : max(0, context - window) // 16] = NEVER_READ
    assert_close(case.run("triton", window=window, num_splits=num_splits), expected)
    assert_close(case.run("reference", window=window), expected)


def test_many_query_heads_may_share_one_key_value_head(device: str, assert_close: Close) -> None:
    case = Case([19, 5], 20, 1, 64, torch.float32, device)
    assert_close(case.run("triton", num_splits=2), case.run("reference"))


@pytest.mark.parametrize("num_splits", [1, 4])
def test_padding_rows_give_zeros(num_splits: int, device: str) -> None:
    case = Case([0, 16, 0], 4, 2, 64, torch.float32, device)
    for backend in ("triton", "reference"):
        out = case.run(backend, num_splits=num_splits)
        assert torch.equal(out[[0, 2]], torch.zeros_like(out[[0, 2]]))
        assert not out.isnan().any()
    case.contexts[:] = 0
    assert not case.run("reference").any()


def test_more_splits_than_tiles_and_a_workspace_full_of_nan(
    device: str, assert_close: Close
) -> None:
    case = Case([3, 40], 4, 1, 64, torch.float32, device)
    elements = decode_workspace_elements(2, 4, 64, 9)
    workspace = torch.empty(elements, device=device)
    out = case.run("triton", num_splits=9, workspace=workspace)
    assert_close(out, case.run("reference"))
    assert_close(case.run("triton", config=DecodeConfig(16, 4, 2, num_splits=9, min_tiles=2)), out)
    with pytest.raises(ValueError, match=f"expected {elements} float32 for 9 splits"):
        case.run("triton", num_splits=9, workspace=workspace[1:])


def test_queries_may_be_strided(device: str, assert_close: Close) -> None:
    case = Case([7, 20], 4, 2, 64, torch.float32, device)
    expected = case.run("reference")
    packed = torch.randn(2, 8, 64, device=device)
    packed[:, 1:5] = case.q
    for q in (packed[:, 1:5], case.q.transpose(1, 2).contiguous().transpose(1, 2)):
        case.q = q
        assert_close(case.run("triton"), expected)


def test_large_scores_do_not_overflow(device: str, assert_close: Callable[..., None]) -> None:
    dim = 64
    case = Case([30], 2, 1, dim, torch.float32, device)
    case.q *= 1000
    keys_LD = case.k[case.tables[0, :2].long(), 0].flatten(0, 1)[:30]
    largest = float((case.q[0] @ keys_LD.T).abs().max()) * case.scale
    assert largest > 100  # exp overflows from 88.8 on
    # A score is a sum of 64 terms: each partial sum, of about the score's size, is rounded by up to
    # eps / 2, and independent roundings add up as their root. Of 200,000 draws the worst was 1.2
    # `largest` eps off where two scores nearly tied; where none do, the scores' error is not seen.
    score_error = dim**0.5 * largest * torch.finfo(torch.float32).eps / 2
    assert_close(case.run("triton", num_splits=2), case.run("reference"), score_error=score_error)


def test_wrong_inputs_are_named() -> None:
    case = Case([7, 20], 4, 2, 64, torch.float32, "cpu")
    with pytest.raises(ValueError, match="window=0"):
        case.run("auto", window=0)
    case.q = case.q.bfloat16()
    with pytest.raises(ValueError, match=r"queries of torch.bfloat16, caches of torch.float32"):
        case.run("auto")
    case.q = torch.randn(2, 3, 64)
    with pytest.raises(ValueError, match="3 query heads of 64 with 2 key/value heads"):
        case.run("auto")
    case.q = torch.randn(3, 4, 64)
    with pytest.raises(ValueError, match="one row for each of 3 sequences"):
        case.run("auto")


H100 = 132  # multiprocessors


@pytest.mark.parametrize(
    ("batch", "kv_heads", "max_blocks", "splits"),
    [
        (1, 8, 128, 32),  # 32 x 8 programs fill 97 % of 2 x 132 places; 33 would fill all
        (1, 8, 1, 1),  # one block is one tile: nothing to cut
        (16, 8, 128, 2),
        (33, 8, 128, 1),  # exactly one wave
        (40, 8, 128, 4),  # 1.2 waves would leave 80 % of the second idle, 4.8 only 3 %
        (512, 8, 128, 1),
    ],
)
def test_splits_fill_the_gpu(batch: int, kv_heads: int, max_blocks: int, splits: int) -> None:
    config = decode_config(batch, kv_heads, 128, max_blocks, 64, torch.bfloat16, H100)
    assert config.num_splits == splits


@given(
    st.integers(1, 1024),
    st.integers(1, 64),
    st.sampled_from([64, 80, 96, 128, 256]),
    st.integers(1, 4096),
    st.sampled_from([16, 64, 256]),
    st.sampled_from(DTYPES),
)
def test_every_configuration_is_legal(
    batch: int, kv_heads: int, dim: int, max_blocks: int, block_tokens: int, dtype: torch.dtype
) -> None:
    config = decode_config(batch, kv_heads, dim, max_blocks, block_tokens, dtype, H100)
    assert block_tokens % config.tile == 0  # a tile never crosses a block
    assert 1 <= config.num_splits <= max_blocks * block_tokens // config.tile
    padded = max(64, 1 << (dim - 1).bit_length())
    buffers = (config.num_stages - 1) * 2 * config.tile * padded * dtype.itemsize
    assert buffers <= 227 * 1024 // 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("contexts", "heads", "kv_heads", "dim"),
    [
        ([8191], 32, 8, 128),
        ([1, 2, 1000, 4097, 0, 64] * 4, 32, 8, 128),
        ([300] * 70, 64, 8, 64),
        ([700, 1500], 16, 16, 256),
        ([4097, 65], 9, 3, 80),
    ],
)
def test_large_shapes_replay_in_a_graph(
    contexts: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype,
    assert_close: Close,
) -> None:  # fmt: skip
    case = Case(contexts, heads, kv_heads, dim, dtype, "cuda", block_tokens=64)
    assert_close(case.run("triton"), case.sdpa())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run("triton")
    for _ in range(2):
        case.q.copy_(torch.randn_like(case.q))
        case.contexts.copy_((case.contexts.float() * torch.rand_like(case.contexts.float())).int())
        graph.replay()
        assert_close(out, case.sdpa())


@pytest.mark.gpu
def test_a_pool_may_hold_more_than_two_to_the_31_values(assert_close: Close) -> None:
    case = Case([100, 64], 4, 1, 128, torch.bfloat16, "cuda", block_tokens=64)
    blocks = 2**31 // (64 * 128) + 8
    k, v = (torch.zeros(blocks, 1, 64, 128, device="cuda").bfloat16() for _ in range(2))
    k[-len(case.k) :], v[-len(case.v) :] = case.k, case.v
    expected = case.run("reference")
    case.tables += blocks - len(case.k)
    case.k, case.v = k, v
    assert_close(case.run("triton"), expected)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(("first", "last"), [(0, 5), (5, 9), (4, 5), (2, 7), (0, 9)])
def test_a_rank_may_hold_parts_of_groups(
    first: int, last: int, num_splits: int, device: str, assert_close: Close
) -> None:
    case = Case([17, 0, 70], 9, 3, 64, torch.float32, device)
    expected = case.sdpa()[:, first:last]
    part = case.heads(first, last)
    assert_close(part.run("reference"), expected)
    assert_close(part.run("triton", num_splits=num_splits), expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_parts_of_a_context_merge_by_their_log_sum_exp(
    num_splits: int, backend: Backend, device: str, assert_close: Close
) -> None:
    case = Case([17, 5, 70, 0], 6, 2, 64, torch.float32, device)
    whole_lse = torch.empty(4, 6, device=device)
    whole = case.run(backend, num_splits=num_splits, lse_BH=whole_lse)
    assert_close(whole, case.sdpa())
    # Two parts: the first 16 tokens of each sequence, and the rest.
    front, rest = copy(case), copy(case)
    front.contexts = case.contexts.clamp(max=16)
    rest.contexts, rest.tables = (case.contexts - 16).clamp(min=0), case.tables[:, 1:]
    outs, lses = [], []
    for part in (front, rest):
        lse = torch.empty(4, 6, device=device)
        outs.append(part.run(backend, num_splits=num_splits, lse_BH=lse))
        lses.append(lse)
    assert lses[1][1].tolist() == [-torch.inf] * 6
    lse = torch.stack(lses)
    weights = (lse - whole_lse).exp().nan_to_num(0)
    merged = (torch.stack(outs) * weights.unsqueeze(-1)).sum(0)
    assert_close(merged, whole)
    assert_close(lse.logsumexp(0)[:3], whole_lse[:3])


@pytest.mark.parametrize("num_splits", [1, 3])
def test_each_sequence_may_have_its_own_window(
    num_splits: int, device: str, assert_close: Close
) -> None:
    case = Case([40, 0, 70, 9], 6, 2, 64, torch.float32, device)
    windows = [3, 0, 33, 100]
    expected = torch.cat([case.sdpa(max(w, 1))[i : i + 1] for i, w in enumerate(windows)])
    found = torch.tensor(windows, dtype=torch.int32, device=device)
    assert_close(case.run("reference", windows_B=found), expected)
    assert_close(case.run("triton", windows_B=found, num_splits=num_splits), expected)
