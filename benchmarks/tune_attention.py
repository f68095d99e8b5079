"""Finds how attention of heads of 128 values is best cut, and where torch's own is faster."""

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from kernel_cases import (
    BLOCK_TOKENS,
    DECODES,
    HEAD_DIM,
    KV_HEADS,
    PREFILLS,
    decode_inputs,
    prefill_inputs,
)
from kernel_timing import DTYPE, num_multiprocessors
from kernel_tuning import NOISE, Row, Tuner, best
from rankwright.kernels.decode_attention import decode_attention
from rankwright.kernels.decode_config import DecodeConfig, decode_config, with_splits
from rankwright.kernels.prefill_attention import prefill_attention
from rankwright.kernels.prefill_config import PrefillConfig, prefill_config

SHAPE = [HEAD_DIM, DTYPE.itemsize]  # by which the table is asked
SCALE = HEAD_DIM**-0.5
DECODED = ("1 x 8192", "1 x 65536", "8 x 2048", "64 mixed", "64 x 4096")


def decode_timer(tuner: Tuner, name: str) -> Callable[[DecodeConfig], float]:
    """Return what tells the microseconds of a batch under a configuration."""
    q, k, v, tables, lengths = decode_inputs(DECODES[name])
    exact = decode_attention(q, k, v, tables, lengths, SCALE, backend="reference")

    def time_us(config: DecodeConfig) -> float:
        programs = len(q) * KV_HEADS
        cut = with_splits(config, programs, tables.shape[1], BLOCK_TOKENS, num_multiprocessors())
        call = lambda: decode_attention(q, k, v, tables, lengths, SCALE, config=cut)  # noqa: E731
        return tuner.us(f"decode {name} {cut}", [call], exact)

    return time_us


def tune_decode(tuner: Tuner) -> list[Row]:
    """Return the row for decode: the best over batches and contexts."""
    base = decode_config(1, KV_HEADS, HEAD_DIM, 1, BLOCK_TOKENS, DTYPE, num_multiprocessors())
    base = replace(base, num_splits=1)
    timers = [decode_timer(tuner, name) for name in DECODED]
    cuts = itertools.product((32, 64), (4, 8), (2, 3, 4), (1, 2, 3, 4))
    candidates = [
        replace(base, tile=tile, num_warps=warps, num_stages=stages, programs=programs)
        for tile, warps, stages, programs in cuts
    ]
    config, ratio = best(candidates, [(timer(base), timer) for timer in timers])
    now = ", ".join(f"{name}: {timer(config):.1f} us" for name, timer in zip(DECODED, timers))  # noqa: B905
    print(f"decode: {config}, {ratio:.3f} of today's time; {now}", flush=True)
    return [{"shape": SHAPE, "config": asdict(config)}] if ratio < NOISE else []


def prefill_timer(tuner: Tuner, name: str) -> Callable[[PrefillConfig | str], float]:
    """Return what tells the microseconds of prompts, under a configuration or by torch."""
    inputs = prefill_inputs(*PREFILLS[name])
    exact = prefill_attention(*inputs, SCALE, backend="sdpa")

    def time_us(how: PrefillConfig | str) -> float:
        options: dict[str, Any] = {"backend": how}
        if isinstance(how, PrefillConfig):
            options = {"config": how, "backend": "triton"}
        call = lambda: prefill_attention(*inputs, SCALE, **options)  # noqa: E731
        return tuner.us(f"prefill {name} {how}", [call], exact)

    return time_us


def tune_prefill(tuner: Tuner) -> dict[str, list[Row]]:
    """Return the rows for prompts: the best cut, and from where torch's own kernel is faster."""
    base = prefill_config(8192, HEAD_DIM, BLOCK_TOKENS, DTYPE)
    timers = {name: prefill_timer(tuner, name) for name in PREFILLS}
    candidates = [
        PrefillConfig(block_m, tile, warps, stages)
        for block_m, tile, warps, stages in itertools.product(
            (64, 128), (32, 64), (4, 8), (2, 3, 4)
        )
        if block_m // warps >= 16  # a warpgroup of 4 warps takes 64 rows
    ]
    config, ratio = best(candidates, [(timer(base), timer) for timer in timers.values()])
    print(f"prefill: {config}, {ratio:.3f} of today's time", flush=True)
    rows = [{"shape": SHAPE, "config": asdict(config)}] if ratio < NOISE else []
    return {"prefill": rows, "whole_prompts": whole_prompts(timers, config if rows else base)}


def whole_prompts(
    timers: dict[str, Callable[[PrefillConfig | str], float]], config: PrefillConfig
) -> list[Row]:
    """Return the row that says from how many tokens which kernel of torch is faster."""
    kernel = ""  # of torch, the better one at the largest
    from_tokens = 0
    for tokens in (8192, 4096, 2048):
        time_us = timers[f"1 x {tokens}"]
        ours = time_us(config)
        torchs = {backend: time_us(backend) for backend in ("sdpa", "cudnn")}
        print(f"prompt of {tokens}: Triton {ours:.0f} us, torch {torchs}", flush=True)
        kernel = kernel or min(torchs, key=lambda backend: torchs[backend])
        if torchs[kernel] >= NOISE * ours:
            break
        from_tokens = tokens
    found = {"from_tokens": from_tokens, "is_cudnn": int(kernel == "cudnn")}
    return [{"shape": SHAPE, "config": found}] if from_tokens else []
