from collections.abc import Callable
from copy import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from rankwright.kernels.prefill_attention import prefill_attention, whole_prompts_backend
from rankwright.kernels.prefill_config import PrefillConfig, prefill_config
from rankwright.kernels.tuned import rows_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = PrefillConfig(block_m=16, tile=16, num_warps=4, num_stages=2)
Close = Callable[[torch.Tensor, torch.Tensor], None]
NEVER_READ = 2**31 - 1  # a block number that would end far outside the pool


class Case:
    """Random chunks of `lengths` tokens at the end of `contexts`; the rest of the pool is NaN."""

    def __init__(
        self,
        lengths: list[int],
        contexts: list[int],
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        device: str,
        block_tokens: int = 16,
    ) -> None:
        needed = [-(-context // block_tokens) for context in contexts]
        order = torch.randperm(sum(needed) + 1)
        # The caches are one layer's slice of a pool, so their blocks are not adjacent.
        pool = torch.full((2, len(order), 2, kv_heads, block_tokens, dim), torch.nan)
        self.tables = torch.full((len(contexts), max(needed) + 1), NEVER_READ, dtype=torch.int32)
        used = 0
        for b, context in enumerate(contexts):
            self.tables[b, : needed[b]] = order[used : used + needed[b]]
            for i, block in enumerate(order[used : used + needed[b]]):
                tokens = min(block_tokens, context - i * block_tokens)
                pool[:, block, 1, :, :tokens] = torch.randn(2, kv_heads, tokens, dim)
            used += needed[b]
        self.k, self.v = pool.to(device, dtype)[:, :, 1].unbind()
        self.q = torch.randn(sum(lengths), heads, dim).to(device, dtype)
        self.tables = self.tables.to(device)
        self.group: int | None = None
        self.head_offset = 0
        self.starts = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
        self.contexts = contexts
        self.scale = dim**-0.5

    def run(self, backend: Any, **options: Any) -> torch.Tensor:
        return prefill_attention(
            self.q, self.k, self.v, self.tables, self.starts, self.contexts, self.scale,
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

    def token_by_token(self, window: int | None = None) -> torch.Tensor:
        """Return the same by one maskless PyTorch call a query token, in float32."""
        out = torch.empty(self.q.shape, dtype=torch.float32, device=self.q.device)
        for b, context in enumerate(self.contexts):
            blocks = self.tables[b, : -(-context // self.k.shape[2])].long()
            k, v = (x[blocks].transpose(0, 1).flatten(1, 2).float() for x in (self.k, self.v))
            for row in range(self.starts[b], self.starts[b + 1]):
                stop = context - (self.starts[b + 1] - row) + 1
                first = 0 if window is None else max(0, stop - window)
                out[row] = F.scaled_dot_product_attention(
                    self.q[row, None, :, None].float(),
                    k[None, :, first:stop],
                    v[None, :, first:stop],
                    scale=self.scale,
                    enable_gqa=True,
                )[0, :, 0]
        return out.to(self.q.dtype)


def test_the_last_query_is_the_last_token_of_the_context() -> None:
    k = torch.zeros(1, 1, 16, 64)
    v = torch.arange(16.0)[None, None, :, None].expand(1, 1, 16, 64).contiguous()
    tables = torch.zeros(1, 1, dtype=torch.int32)
    q = torch.randn(2, 1, 64)
    for backend in ("reference", "sdpa"):
        out = prefill_attention(q, k, v, tables, [0, 2], [5], 1.0, backend=backend)
        torch.testing.assert_close(out[:, 0, 0], torch.tensor([1.5, 2.0]))  # of 0 to 3, 0 to 4
        out = prefill_attention(q, k, v, tables, [0, 2], [5], 1.0, window=2, backend=backend)
        torch.testing.assert_close(out[:, 0, 0], torch.tensor([2.5, 3.5]))


CHUNKS = {
    "a whole prompt": ([37], [37]),
    "a chunk of a long prompt": ([5], [53]),
    "one token": ([1], [1]),
    "several, one of them empty": ([3, 0, 18, 1], [3, 20, 40, 17]),
}


@pytest.mark.parametrize("backend", ["reference", "sdpa", "auto"])
@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_references_equal_one_call_a_token(
    chunk: str, window: int | None, backend: str, assert_close: Close
) -> None:
    case = Case(*CHUNKS[chunk], 6, 2, 32, torch.float32, "cpu")
    assert_close(case.run(backend, window=window), case.token_by_token(window))


def test_whole_prompts_by_cudnn_equal_one_call_a_token(device: str, assert_close: Close) -> None:
    # Beyond the prompts the pool is NaN, and lengths are padded to what cuDNN plans for.
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    case = Case([37, 513], [37, 513], 6, 2, 64, dtype, device)
    assert_close(case.run("cudnn"), case.token_by_token())
    with pytest.raises(ValueError, match="5 queries of 53 tokens"):
        Case([5], [53], 6, 2, 64, dtype, device).run("cudnn")


def test_long_whole_prompts_run_on_what_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = {"shape": [64, 4], "config": {"from_tokens": 30, "is_cudnn": 1}}
    table = {"whole_prompts": [row]}
    monkeypatch.setattr(
        "rankwright.kernels.prefill_attention.tuned_rows", lambda _, kind: rows_of(table, kind)
    )

    def chosen(lengths: list[int], contexts: list[int], dim: int = 64) -> str:
        case = Case(lengths, contexts, 2, 1, dim, torch.float32, "cpu")
        return whole_prompts_backend(case.q, case.starts, case.contexts)

    assert chosen([30, 31], [30, 31]) == "cudnn"
    row["config"] = {"from_tokens": 30, "is_cudnn": 0}
    assert chosen([30, 31], [30, 31]) == "sdpa"
    assert chosen([30, 29], [30, 29]) == "auto"
    assert chosen([30], [40]) == "auto"
    assert chosen([30], [30], dim=128) == "auto"


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_sinks_are_one_more_score_a_head(
    chunk: str, window: int | None, device: str, assert_close: Close
) -> None:
    case = Case(*CHUNKS[chunk], 4, 2, 32, torch.float32, device)
    none = torch.full((4,), -1e4, device=device)
    assert_close(case.run("reference", window=window, sinks_H=none), case.token_by_token(window))
    sinks = torch.tensor([-1e4, -1.0, 1.0, 60.0], device=device)
    expected = case.run("reference", window=window, sinks_H=sinks)
    assert expected[:, 3].norm() < 1e-20
    assert_close(case.run("auto", window=window, sinks_H=sinks), expected)
    out = case.run("triton", window=window, sinks_H=sinks, config=SMALL)
    assert_close(out, expected)


def test_sinks_that_cannot_be_are_refused() -> None:
    case = Case([3], [3], 2, 2, 32, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"'sdpa' has no sinks"):
        case.run("sdpa", sinks_H=torch.zeros(2))
    with pytest.raises(ValueError, match=r"sinks \(3,\)"):
        case.run("reference", sinks_H=torch.zeros(3))


@pytest.mark.parametrize("window", [None, 1, 9, 100])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_kernel_equals_reference(
    chunk: str, window: int | None, device: str, assert_close: Close
) -> None:
    case = Case(*CHUNKS[chunk], 2, 1, 64, torch.float32, device)
    expected = case.run("reference", window=window)
    assert_close(case.run("triton", window=window, config=SMALL), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_tokens"),
    [(2, 2, 80, 32), (4, 2, 96, 16), (2, 1, 128, 64), (1, 1, 256, 16)],
)
def test_kernel_equals_reference_in_every_dtype(
    heads: int,
    kv_heads: int,
    dim: int,
    block_tokens: int,
    dtype: torch.dtype,
    device: str,
    assert_close: Close,
) -> None:
    case = Case([17, 3], [33, 3], heads, kv_heads, dim, dtype, device, block_tokens)
    assert_close(case.run("triton"), case.run("reference"))


def test_queries_may_be_strided(device: str, assert_close: Close) -> None:
    case = Case([5], [9], 4, 2, 64, torch.float32, device)
    expected = case.run("reference")
    packed = torch.randn(5, 8, 64, device=device)
    packed[:, 1:5] = case.q
    for q in (packed[:, 1:5], case.q.transpose(1, 2).contiguous().transpose(1, 2)):
        case.q = q
        assert_close(case.run("triton", config=SMALL), expected)


@pytest.mark.parametrize(("first", "last"), [(0, 5), (5, 9), (4, 5), (2, 7), (0, 9)])
def test_a_rank_may_hold_parts_of_groups(
    first: int, last: int, device: str, assert_close: Close
) -> None:
    case = Case([5, 17], [9, 40], 9, 3, 64, torch.float32, device)
    expected = case.token_by_token()[:, first:last]
    for backend in ("reference", "sdpa", "triton"):
        assert_close(case.heads(first, last).run(backend), expected)


def test_no_tokens_is_fine(device: str) -> None:
    case = Case([0], [4], 4, 2, 64, torch.float32, device)
    for backend in ("triton", "reference", "sdpa"):
        assert case.run(backend).shape == (0, 4, 64)


def test_wrong_inputs_are_named() -> None:
    case = Case([2, 3], [2, 9], 4, 2, 64, torch.float32, "cpu")
    case.contexts = [1, 9]
    with pytest.raises(ValueError, match=r"contexts \[1, 9\] are shorter than chunks \[2, 3\]"):
        case.run("auto")
    case.contexts, case.starts = [2, 9], [0, 2, 4]
    with pytest.raises(ValueError, match="expected to rise from 0 to 5"):
        case.run("auto")
    case.starts = [0, 5]
    case.group, case.head_offset = 2, 1
    with pytest.raises(ValueError, match="4 query heads from head 1 of a group of 2 with 2 key"):
        case.run("auto")
    case.group, case.head_offset = None, 0
    with pytest.raises(ValueError, match="2 query starts and 2 block tables; expected 3 and 2"):
        case.run("auto")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("queries", [1, 17, 5000])
def test_every_configuration_is_legal(queries: int, dim: int, dtype: torch.dtype) -> None:
    for block_tokens in (16, 64, 256):
        config = prefill_config(queries, dim, block_tokens, dtype)
        assert block_tokens % config.tile == 0  # a tile never crosses a block
        assert 16 <= config.block_m <= 128


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "contexts", "heads", "kv_heads", "dim"),
    [
        ([700], [700], 32, 8, 128),
        ([129, 1, 64, 500], [1000, 65, 64, 777], 32, 8, 128),
        ([300], [431], 16, 16, 64),
        ([130], [513], 4, 2, 256),
        ([100, 200], [100, 333], 9, 3, 80),
    ],
)
def test_large_shapes_equal_reference(
    lengths: list[int], contexts: list[int], heads: int, kv_heads: int, dim: int,
    dtype: torch.dtype, window: int | None, assert_close: Close,
) -> None:  # fmt: skip
    case = Case(lengths, contexts, heads, kv_heads, dim, dtype, "cuda", block_tokens=64)
    expected = case.run("reference", window=window)
    assert_close(case.run("triton", window=window), expected)
    assert_close(case.run("sdpa", window=window), expected)
