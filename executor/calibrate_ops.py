"""Entry point that times the engine's kernels on one device, for `calibrate.py`.

Matrix products by (m, n, k) and format, attention by batch and context, norms and activations, the
sampler, and an empty kernel for the price of a launch. On a GPU each sample is a replayed CUDA
graph, with inputs that rotate past the L2 cache, as weights do in a step.
"""

import argparse
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from rankwright.cost_model.calibration import Calibration, OpTime, TimedKind
from rankwright.cost_model.dtypes import Dtype
from rankwright.kernels.decode_attention import decode_attention
from rankwright.kernels.prefill_attention import prefill_attention
from rankwright.kernels.rms_norm import rms_norm
from rankwright.kernels.sampling import sample
from rankwright.kernels.swiglu import swiglu

DeviceType = Literal["cuda", "cpu"]

# (n, k) of the layers of Llama-3.1-8B and 70B and of Qwen3-32B on one, two and eight GPUs, packed
# as the engine packs them: queries, keys and values in one, gate and up in one; and one head.
_WEIGHTS = (
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (4096, 1792),
    (10240, 5120),
    (51200, 5120),
    (5120, 25600),
    (5120, 4096),
    (10240, 8192),
    (8192, 8192),
    (7168, 8192),
    (8192, 3584),
    (768, 4096),
    (128256, 4096),
)
_ROWS = (1, 4, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192)
_QUICK_WEIGHTS, _QUICK_ROWS = ((512, 256), (256, 1024)), (1, 16, 64, 256)
# Products past this are slow, and no less efficient than those before.
_MOST_FLOPS = 6e12
# (sequences, context) that get one token; (sequences, new tokens, context) of prompts.
_DECODES = (
    *((b, c) for b in (1, 8, 32, 64, 128, 256) for c in (128, 512, 1024, 2048, 4096)),
    *((1, 8192), (8, 8192), (32, 8192), (1, 16384), (8, 16384), (1, 32768)),
)
_PREFILLS = (
    *((1, t, t) for t in (128, 256, 512, 1024, 2048, 4096, 8192)),
    *((4, 512, 512), (8, 1024, 1024), (1, 512, 8192), (1, 2048, 8192), (1, 1024, 16384)),
)
_QUICK_DECODES, _QUICK_PREFILLS = ((1, 128), (4, 128)), ((1, 64, 64), (1, 64, 128))
_HEADS = ((32, 8, 128), (64, 8, 128), (8, 1, 128))  # query heads, KV heads, head size
_QUICK_HEADS = ((4, 2, 32),)
_BLOCK_TOKENS = 64
_ROTATION_BYTES = {"cuda": 160e6, "cpu": 0.0}  # more than twice the L2 of an H200
_SAMPLE_S = {"cuda": 2.0e-2, "cpu": 5.0e-3}
_CACHE_BYTES = 8e9  # attention whose cache would be larger is left out


@dataclass(frozen=True, slots=True)
class _Case:
    """What to time: `make` draws inputs of its own and returns the call."""

    kind: TimedKind
    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    flops: float
    bytes: float
    make: Callable[[], Callable[[], object]]


def main() -> None:
    """Time everything and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    measured = time_ops(arguments.device, quick=arguments.quick)
    temporary = arguments.output.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(measured.model_dump_json(), encoding="utf-8")
    temporary.replace(arguments.output)


def time_ops(device: DeviceType, *, quick: bool = False) -> Calibration:
    """Return the seconds of every kernel at every shape on `device`, without any other machine."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU")
    started_s = time.monotonic()
    gc.collect()
    gc.freeze()  # each capture collects garbage, and would go through all of torch for it
    rows: list[OpTime] = []
    notes: list[str] = []
    for title, cases in _table(device, quick):
        print(f"{time.monotonic() - started_s:5.1f} s  {title}", flush=True)
        for case in cases:
            try:
                seconds = _seconds(case, device)
            except (RuntimeError, AttributeError) as error:
                # Not every device and build has float8; any other kernel must run.
                if case.dtype != "float8":
                    raise
                line = (str(error).splitlines() or ["?"])[0][:120]
                notes.append(f"{case.name} {case.dtype} could not be timed: {line}")
                continue
            rows.append(
                OpTime(
                    kind=case.kind,
                    name=case.name,
                    dtype=case.dtype,
                    shape=case.shape,
                    flops=case.flops,
                    bytes=case.bytes,
                    seconds=seconds,
                )
            )
    software = f"torch {torch.__version__}"
    name = "CPU"
    if device == "cuda":
        software += f", CUDA {torch.version.cuda}"
        name = torch.cuda.get_device_name()
    return Calibration(
        device="unknown",
        name=name,
        software=software,
        seconds=time.monotonic() - started_s,
        ops=tuple(rows),
        notes=tuple(dict.fromkeys(notes)),
    )


def _table(device: DeviceType, quick: bool) -> Iterator[tuple[str, Iterator[_Case]]]:
    dtypes: tuple[Dtype, ...] = ("bfloat16",) if device == "cpu" else ("bfloat16", "float8")
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        dtypes = ("bfloat16",)
    yield "launches, norms, activations, sampling", _elementwise(device, quick)
    for dtype in dtypes:
        yield f"matrix products in {dtype}", _products(device, dtype, quick)
    yield "attention of one new token", _decodes(device, quick)
    yield "attention of prompts", _prefills(device, quick)


def _products(device: DeviceType, dtype: Dtype, quick: bool) -> Iterator[_Case]:
    weights, rows = (_QUICK_WEIGHTS, _QUICK_ROWS) if quick else (_WEIGHTS, _ROWS)
    for (n, k), m in itertools.product(weights, rows):
        if 2.0 * m * n * k > _MOST_FLOPS:
            continue
        width = 1 if dtype == "float8" else 2
        moved = width * (n * k + m * k) + 2 * m * n

        def make(m: int = m, n: int = n, k: int = k) -> Callable[[], object]:
            x_MK = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            weight_NK = torch.randn(n, k, device=device, dtype=torch.bfloat16)
            if dtype == "bfloat16":
                return lambda: torch.nn.functional.linear(x_MK, weight_NK)
            left, right = x_MK.to(torch.float8_e4m3fn), weight_NK.to(torch.float8_e4m3fn).t()
            one = torch.ones((), device=device)
            return lambda: torch.ops.aten._scaled_mm(
                left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16
            )

        yield _Case("gemm", "linear", dtype, (m, n, k), 2.0 * m * n * k, moved, make)


def _elementwise(device: DeviceType, quick: bool) -> Iterator[_Case]:
    yield _Case("launch", "one value", "bfloat16", (), 0, 0, lambda: _launch(device))
    hidden, ffn, vocab = (256, 512, 1000) if quick else (4096, 14336, 128256)
    for rows in (1, 64) if quick else (1, 32, 128, 512, 2048, 8192):

        def norm(rows: int = rows) -> Callable[[], object]:
            x_TD, residual_TD = (_random(device, rows, hidden) for _ in range(2))
            weight_D = _random(device, hidden)
            return lambda: rms_norm(x_TD, weight_D, 1e-5, residual_TD)

        yield _Case(
            "elementwise", "rms_norm", "bfloat16", (rows, hidden), 0, 8 * rows * hidden, norm
        )

        def activation(rows: int = rows) -> Callable[[], object]:
            gate_up_TC = _random(device, rows, 2 * ffn)
            return lambda: swiglu(gate_up_TC)

        yield _Case("elementwise", "swiglu", "bfloat16", (rows, ffn), 0, 6 * rows * ffn, activation)
    for rows in (1, 8) if quick else (1, 16, 64, 256):

        def draw(rows: int = rows) -> Callable[[], object]:
            logits_BV = _random(device, rows, vocab)
            counts_B = torch.arange(rows, device=device)
            return lambda: sample(
                logits_BV,
                temperature_B=torch.ones(rows, device=device),
                top_k_B=torch.zeros_like(counts_B),
                top_p_B=torch.ones(rows, device=device),
                seeds_B=counts_B,
                positions_B=counts_B,
                filtered=False,
            )

        yield _Case("elementwise", "sample", "bfloat16", (rows, vocab), 0, 2 * rows * vocab, draw)


def _decodes(device: DeviceType, quick: bool) -> Iterator[_Case]:
    shapes, heads = (_QUICK_DECODES, _QUICK_HEADS) if quick else (_DECODES, _HEADS)
    for (query, kv, size), (batch, context) in itertools.product(heads, shapes):
        cache = 4.0 * batch * context * kv * size
        if cache > _CACHE_BYTES:
            continue

        def make(
            query: int = query, kv: int = kv, size: int = size, batch: int = batch,
            context: int = context,
        ) -> Callable[[], object]:  # fmt: skip
            k, v, tables_BN = _paged_cache(device, [context] * batch, kv, size)
            q_BHD = _random(device, batch, query, size)
            lengths_B = torch.full((batch,), context, dtype=torch.int32, device=device)
            return lambda: decode_attention(q_BHD, k, v, tables_BN, lengths_B, size**-0.5)

        shape = (batch, 1, context, query, kv, size)
        flops = 4.0 * batch * context * query * size
        moved = cache + 4 * batch * query * size
        yield _Case("attention decode", "decode_attention", "bfloat16", shape, flops, moved, make)


def _prefills(device: DeviceType, quick: bool) -> Iterator[_Case]:
    shapes, heads = (_QUICK_PREFILLS, _QUICK_HEADS) if quick else (_PREFILLS, _HEADS)
    for (query, kv, size), (batch, new, context) in itertools.product(heads, shapes):

        def make(
            query: int = query, kv: int = kv, size: int = size, batch: int = batch,
            new: int = new, context: int = context,
        ) -> Callable[[], object]:  # fmt: skip
            k, v, tables_BN = _paged_cache(device, [context] * batch, kv, size)
            q_THD = _random(device, batch * new, query, size)
            starts, lengths = [new * b for b in range(batch + 1)], [context] * batch
            return lambda: prefill_attention(q_THD, k, v, tables_BN, starts, lengths, size**-0.5)

        shape = (batch, new, context, query, kv, size)
        pairs = batch * (new * context - new * (new - 1) / 2)
        moved = 4 * size * batch * (context * kv + new * query)
        flops = 4.0 * query * size * pairs
        yield _Case("attention prefill", "prefill_attention", "bfloat16", shape, flops, moved, make)


def _random(device: DeviceType, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _launch(device: DeviceType) -> Callable[[], object]:
    value = torch.zeros(1, device=device)
    return lambda: value.add_(1.0)


def _paged_cache(
    device: DeviceType, contexts: Sequence[int], kv_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random caches and the tables of sequences whose blocks lie scattered."""
    needed = [-(-context // _BLOCK_TOKENS) for context in contexts]
    k, v = (_random(device, sum(needed), kv_heads, _BLOCK_TOKENS, head_dim) for _ in range(2))
    order = torch.randperm(sum(needed)).int()
    tables_BN = torch.zeros(len(contexts), max(needed), dtype=torch.int32)
    for b, blocks in enumerate(order.split(needed)):
        tables_BN[b, : len(blocks)] = blocks
    return k, v, tables_BN.to(device)


def _seconds(case: _Case, device: DeviceType) -> float:
    """Return the median seconds of one call."""
    sets = max(1, min(8, int(_ROTATION_BYTES[device] // max(case.bytes, 1.0))))
    calls = [case.make() for _ in range(sets)]
    if device == "cpu":
        return _cpu_seconds(calls[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    repeats = max(1, 16 // sets)  # enough calls that the graph's own launch does not show
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    times_s: list[float] = []
    while len(times_s) < 3 or (sum(times_s) < _SAMPLE_S[device] and len(times_s) < 30):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times_s.append(start.elapsed_time(stop) / 1e3)
    del graph
    return statistics.median(times_s) / (repeats * sets)


def _cpu_seconds(call: Callable[[], object]) -> float:
    """Return the least seconds of a call: other work on the machine only ever slows one down."""
    call()
    times_s: list[float] = []
    while len(times_s) < 3 or (sum(times_s) < _SAMPLE_S["cpu"] and len(times_s) < 100):
        start_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - start_s)
    return min(times_s)


if __name__ == "__main__":
    main()
