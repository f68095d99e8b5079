"""Parts of a context attended to apart and merged are attention over the whole of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rankwright.kernels.backend import Backend
from rankwright.kernels.merge_attention import merge_attention
from rankwright.kernels.paged_cache import kv_heads_of_queries
from rankwright.kernels.part_attention import part_attention

Close = Callable[[torch.Tensor, torch.Tensor], None]
NEVER_READ = 2**31 - 1  # a block number that would end far outside the pool


class Case:
    """Queries of `pieces`, each (context, rows), over contexts in `parts` with NaN around them."""

    def __init__(
        self,
        pieces: list[tuple[int, int]],
        parts: int,
        *,
        heads: tuple[int, int] = (6, 2),
        dim: int = 24,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        block_tokens: int = 16,
    ) -> None:
        num_heads, kv_heads = heads
        self.parts, self.scale = parts, dim**-0.5
        self.contexts = [context for context, _ in pieces]
        rows = [count for _, count in pieces]
        self.starts = [sum(rows[:i]) for i in range(len(rows) + 1)]
        self.q = torch.randn(sum(rows), num_heads, dim).to(device, dtype)
        self.whole = [torch.randn(2, kv_heads, context, dim).to(dtype) for context in self.contexts]
        most = max(-(-context // block_tokens) for context in self.contexts)
        self.pools, self.tables = [], []
        for part in range(parts):
            blocks: list[torch.Tensor] = []
            table = torch.full((len(pieces), most + 1), NEVER_READ, dtype=torch.int32)
            for piece, keys_values in enumerate(self.whole):
                mine = range(part * block_tokens, keys_values.shape[2], parts * block_tokens)
                for index, first in enumerate(mine):
                    block = torch.full((2, kv_heads, block_tokens, dim), torch.nan, dtype=dtype)
                    found = keys_values[:, :, first : first + block_tokens]
                    block[:, :, : found.shape[2]] = found
                    table[piece, index] = len(blocks)
                    blocks.append(block)
            empty = torch.full((2, kv_heads, block_tokens, dim), torch.nan, dtype=dtype)
            self.pools.append(torch.stack([*blocks, empty], dim=1).to(device))
            self.tables.append(table.to(device))

    def run(self, backend: Any, window: int | None) -> torch.Tensor:
        """All parts, merged."""
        rows, heads, dim = self.q.shape
        out = torch.empty(self.parts, rows, heads, dim + 1, device=self.q.device)
        for part in range(self.parts):
            keys, values = self.pools[part]
            part_attention(
                self.q, keys, values, self.tables[part], self.starts, self.contexts,
                self.scale, out[part], part=part, parts=self.parts, window=window, backend=backend,
            )  # fmt: skip
        return merge_attention(out, self.q.dtype, backend="reference")

    def token_by_token(self, window: int | None) -> torch.Tensor:
        """The same over the whole context, one query at a time in float32."""
        out = torch.empty(self.q.shape)
        for piece, context in enumerate(self.contexts):
            first, last = self.starts[piece : piece + 2]
            keys, values = self.whole[piece].float()
            of_head = kv_heads_of_queries(self.q.shape[1], len(keys), None, 0, keys.device)
            for row in range(first, last):
                stop = context - (last - row) + 1
                start = 0 if window is None else max(0, stop - window)
                scores = torch.einsum("hd,hld->hl", self.q[row].float().cpu(), keys[of_head])
                weights = (scores[:, start:stop] * self.scale).softmax(-1)
                out[row] = torch.einsum("hl,hld->hd", weights, values[of_head][:, start:stop])
        return out.to(self.q.device, self.q.dtype)


# Whole blocks, the start of one, its end, one token, the first of all, none.
PIECES = [(48, 16), (37, 5), (81, 1), (9, 9), (20, 0)]


@pytest.mark.parametrize(
    ("parts", "window", "backend"),
    [
        *((parts, window, "reference") for parts in (1, 2, 5) for window in (None, 1, 20)),
        *((parts, window, "triton") for parts, window in ((2, None), (5, None), (2, 20), (5, 1))),
    ],
)
def test_parts_merge_to_attention_over_the_whole(
    parts: int, window: int | None, backend: Backend, device: str, assert_close: Close
) -> None:
    case = Case(PIECES, parts, heads=(4, 2) if backend == "reference" else (2, 1), device=device)
    assert_close(case.run(backend, window), case.token_by_token(window))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_of_several_tiles_in_short_formats(
    dtype: torch.dtype, device: str, assert_close: Close
) -> None:
    case = Case(
        [(200, 8), (64, 64)], 2, heads=(2, 1), dtype=dtype, dim=64, device=device, block_tokens=128
    )
    assert_close(case.run("triton", None), case.token_by_token(None))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"contexts": [20]}, "1 context lengths|as many context lengths"),
        ({"contexts": [20, 36]}, "piece 1 has 5 tokens up to the 36th"),
        ({"starts": [0, 3, 9]}, "expected to rise from 0 to 8"),
    ],
)
def test_wrong_inputs_are_named(changed: dict[str, Any], message: str) -> None:
    case = Case([(20, 3), (40, 5)], 2)
    for name, value in changed.items():
        setattr(case, name, value)
    with pytest.raises(ValueError, match=message):
        case.run("reference", None)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("heads", [(32, 8), (16, 16)])
@pytest.mark.parametrize("dim", [64, 128, 192])
def test_large_parts_merge_to_attention_over_the_whole(
    window: int | None, heads: tuple[int, int], dim: int, assert_close: Close
) -> None:
    pieces = [(1024, 128), (4000, 32), (130, 2), (777, 9)]
    case = Case(
        pieces, 4, heads=heads, dim=dim, dtype=torch.bfloat16, device="cuda", block_tokens=128
    )
    assert_close(case.run("triton", window), case.token_by_token(window))
