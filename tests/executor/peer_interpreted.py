"""What ranks without GPUs run: kernels that wait for each other, interpreted, over mapped files."""

import time
from pathlib import Path
from typing import Any

import tests.kernels.conftest  # noqa: F401  (mends Triton's interpreter)
import torch

from rankwright.kernels.all_reduce import MAX_PROGRAMS, Peers, sum_parts
from rankwright.kernels.pushed_sum import arrivals_words, sum_pushed_parts
from rankwright.kernels.rms_norm import rms_norm
from rankwright.kernels.two_shot_sum import sum_parts_in_two_shots

PLACES = 3  # as `PeerMemory` has them, and room for what others summed
EPS = 1e-5


def chain(rank: int, folder: Path, world_size: int, forms: str, tokens: int, dim: int) -> Any:
    """A chain of sums with norms, a form for each letter; ranks lag in turn.

    Returns what the chain gives, and its residual, here and by plain sums of what all ranks have.
    """
    values = PLACES * tokens * dim
    words = MAX_PROGRAMS * world_size
    memory = [
        torch.from_file(str(folder / f"{other}"), shared=True, size=values + tokens * dim + words)
        for other in range(world_size)
    ]
    table = torch.tensor([one.data_ptr() for one in memory])
    peers = Peers(
        table_address=table.data_ptr(),
        words=memory[rank].view(torch.int32)[-words:],
        epochs=torch.zeros(MAX_PROGRAMS, dtype=torch.int32),
        signal_word=values + tokens * dim,
        rank=rank,
        world_size=world_size,
    )
    generator = torch.Generator().manual_seed(5)  # equal on all ranks
    parts = torch.randn(len(forms), world_size, tokens, dim, generator=generator)
    weight = torch.rand(dim, generator=generator) + 0.5
    residual = torch.randn(tokens, dim, generator=generator)
    plain = residual.clone()
    found, expected = torch.zeros(tokens, dim), torch.zeros(tokens, dim)
    place = 0
    for call, form in enumerate(forms):
        if call % world_size == rank:
            time.sleep(0.02)
        # What a call before left in a place must not be read again.
        part = memory[rank][place * tokens * dim :][: tokens * dim].view(tokens, dim)
        torch.add(parts[call, rank], found, out=part)
        norm: dict[str, Any] = {"weight_D": weight, "eps": EPS, "residual_TD": residual}
        out, offset = torch.full((tokens, dim), torch.nan), place * tokens * dim
        if form == "2":
            sum_parts_in_two_shots(out, peers, offset, values, **norm)
        else:
            sum_parts(out, peers, offset, **norm)
        place = 1 if place != 1 else 2
        plain += (parts[call] + expected).sum(0)
        expected = plain * torch.rsqrt(plain.pow(2).mean(-1, keepdim=True) + EPS) * weight
        found = out
    return found, residual, expected, plain


def pushed_chain(rank: int, folder: Path, world_size: int, calls: int, dim: int) -> Any:
    """A chain of sums with norms of 1 to 3 rows, each rank's part written to the others.

    Ranks lag in turn. Returns what the chain gives, and its residual, here and by plain sums of
    what all ranks have.
    """
    most, dtype = 3, torch.bfloat16
    memory = [
        torch.from_file(
            str(folder / f"{other}"),
            shared=True,
            size=arrivals_words(most, dim, world_size),
            dtype=torch.int64,
        )
        for other in range(world_size)
    ]
    table = torch.tensor([one.data_ptr() for one in memory])
    epochs = torch.zeros(most, dtype=torch.int32)
    generator = torch.Generator().manual_seed(6)  # equal on all ranks
    parts = torch.randn(calls, world_size, most, dim, generator=generator).to(dtype)
    weight = (torch.rand(dim, generator=generator) + 0.5).to(dtype)
    residual = torch.randn(most, dim, generator=generator).to(dtype)
    plain, results = residual.clone(), []
    for call in range(calls):
        if call % world_size == rank:
            time.sleep(0.02)
        rows = call % most + 1
        out = sum_pushed_parts(
            parts[call, rank, :rows],
            torch.full((rows, dim), torch.nan, dtype=dtype),
            table_address=table.data_ptr(),
            arrivals=memory[rank],
            epochs=epochs,
            word_offset=0,
            max_rows=most,
            rank=rank,
            world_size=world_size,
            weight_D=weight,
            eps=EPS,
            residual_TD=residual[:rows],
        )
        total = parts[call, :, :rows].float().sum(0).to(dtype)
        expected = rms_norm(total, weight, EPS, plain[:rows], backend="reference")
        results.append((out, expected))
    return results, residual, plain
