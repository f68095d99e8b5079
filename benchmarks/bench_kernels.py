"""Times the kernels at the shapes of an 8B-class model beside what the memory could do.

    PYTHONPATH=src python benchmarks/bench_kernels.py [--only decode] [--output FOLDER]
    PYTHONPATH=src python benchmarks/bench_kernels.py --sweep decode

Every kernel is first held to its reference on fresh random inputs; one that fails is not timed,
and the exit status is 1. Times are medians of CUDA graph replays, so launches cost what they cost
in a decode step. `share` is the least time that the GPU needs for the bytes (or operations), by a
copy (or matrix product) measured in the same run, over the time it took.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rankwright.kernels.decode_attention import decode_attention
from rankwright.kernels.decode_config import decode_config
from rankwright.kernels.prefill_attention import prefill_attention, prefill_config
from rankwright.kernels.rms_norm import rms_norm
from rankwright.kernels.rotary import rope_table, rotary_and_cache
from rankwright.kernels.sampling import sample
from rankwright.kernels.skinny_linear import SkinnyConfig, skinny_config, skinny_linear
from rankwright.kernels.swiglu import swiglu
from result import copy_bytes_per_s, write_result

# Llama-3.1-8B: hidden, FFN, query and key/value heads, head dim, vocabulary (its config.json).
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 14336, 32, 8, 128, 128256
# Inputs and outputs of its products: qkv, o, gate and up, down.
LINEARS = (
    (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
    (HEADS * HEAD_DIM, HIDDEN),
    (HIDDEN, 2 * FFN),
    (FFN, HIDDEN),
)
BLOCK_TOKENS = 64
DTYPE = torch.bfloat16
# Inputs rotate over this many bytes, more than twice the L2 of an H100 (50 MB) or H200 (60 MB).
ROTATION_BYTES = 160e6

Run = Callable[[str], torch.Tensor | tuple[torch.Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table: `make` draws new inputs and returns the call by backend."""

    op: str
    shape: str
    make: Callable[[], Run]
    bytes_moved: float
    flops: float = 0.0
    backend: str = "triton"
    reference: str = "reference"
    tolerance: float = torch.finfo(DTYPE).eps  # one rounding of the result


def random(*shape: int) -> torch.Tensor:
    """Return normal values on the GPU."""
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def _backend(backend: str) -> Any:
    return "triton" if backend == "timed" else backend


def norm_case(tokens: int) -> Case:
    """Return RMSNorm of a residual that it updates."""

    def make() -> Run:
        x, residual, weight = random(tokens, HIDDEN), random(tokens, HIDDEN), random(HIDDEN)

        def run(backend: Any) -> tuple[torch.Tensor, ...]:
            total = residual if backend == "timed" else residual.clone()
            return rms_norm(x, weight, 1e-5, total, backend=_backend(backend)), total

        return run

    return Case("rms_norm + residual", f"{tokens} x {HIDDEN}", make, 4 * 2 * tokens * HIDDEN)


def swiglu_case(tokens: int) -> Case:
    """Return SwiGLU of a fused gate and up projection."""

    def make() -> Run:
        gate_up = random(tokens, 2 * FFN)
        return lambda backend: swiglu(gate_up, backend=_backend(backend))

    return Case("swiglu", f"{tokens} x {FFN}", make, 3 * 2 * tokens * FFN)


def rotary_case(tokens: int, with_norm: bool) -> Case:
    """Return rotary embedding with the cache write, for Qwen3 with norms of queries and keys."""
    columns = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    blocks = -(-tokens // BLOCK_TOKENS) + 4

    def make() -> Run:
        qkv, table = random(tokens, columns), rope_table(HEAD_DIM, 8192, 5e5, device="cuda")
        positions = torch.randint(0, 8192, (tokens,), device="cuda")
        slots = torch.randperm(blocks * BLOCK_TOKENS, device="cuda")[:tokens]
        shape = (2, blocks, KV_HEADS, BLOCK_TOKENS, HEAD_DIM)
        cache = torch.zeros(shape, device="cuda", dtype=DTYPE)
        norms = (random(HEAD_DIM), random(HEAD_DIM)) if with_norm else (None, None)

        def run(backend: Any) -> tuple[torch.Tensor, ...]:
            pool = cache if backend == "timed" else cache.clone()
            q = rotary_and_cache(
                qkv, table, positions, slots, pool[0], pool[1], HEADS, KV_HEADS, HEAD_DIM,
                *norms, backend=_backend(backend),
            )  # fmt: skip
            return q, pool

        return run

    moved = 2 * 2 * tokens * columns + tokens * (4 * HEAD_DIM + 16)
    op = "norm + rotary + cache" if with_norm else "rotary + cache"
    return Case(op, f"{tokens} tokens", make, moved)


def linear_case(
    tokens: int, inputs: int, outputs: int, config: SkinnyConfig | None = None, label: str = ""
) -> Case:
    """Return the product with a weight, by cuBLAS or by the kernel for few rows."""

    def make() -> Run:
        x, weight = random(tokens, inputs), random(outputs, inputs) * inputs**-0.5

        def run(backend: Any) -> torch.Tensor:
            if backend == "reference":
                return x.double() @ weight.double().t()
            if config is None:
                return torch.nn.functional.linear(x, weight)
            return skinny_linear(x, weight, config=config)

        return run

    moved = 2 * (outputs * inputs + tokens * (inputs + outputs))
    shape = f"{tokens} x {inputs} > {outputs}{label}"
    op = "linear (cuBLAS)" if config is None else "linear (skinny)"
    return Case(op, shape, make, moved, 2.0 * tokens * inputs * outputs)


def paged_cache(contexts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return random caches and the block tables of sequences whose blocks lie scattered."""
    needed = [-(-context // BLOCK_TOKENS) for context in contexts]
    k, v = (random(sum(needed), KV_HEADS, BLOCK_TOKENS, HEAD_DIM) for _ in range(2))
    order = torch.randperm(sum(needed)).int()
    tables = torch.zeros(len(contexts), max(needed), dtype=torch.int32)
    for b, blocks in enumerate(order.split(needed)):
        tables[b, : len(blocks)] = blocks
    return k, v, tables.cuda()


def decode_case(contexts: Sequence[int], shape: str, **options: Any) -> Case:
    """Return decode attention of one token for each context."""

    def make() -> Run:
        k, v, tables = paged_cache(contexts)
        q = random(len(contexts), HEADS, HEAD_DIM)
        lengths = torch.tensor(contexts, dtype=torch.int32, device="cuda")
        return lambda backend: decode_attention(
            q, k, v, tables, lengths, HEAD_DIM**-0.5, backend=_backend(backend), **options
        )

    moved = 2 * 2 * HEAD_DIM * (sum(contexts) * KV_HEADS + len(contexts) * HEADS)
    flops = 4.0 * HEADS * HEAD_DIM * sum(contexts)
    return Case("decode_attention", shape, make, moved, flops)


def prefill_case(
    lengths: Sequence[int], contexts: Sequence[int], shape: str, backend: str, **options: Any
) -> Case:
    """Return prefill attention of chunks at the end of their contexts."""
    starts = [sum(lengths[:b]) for b in range(len(lengths) + 1)]

    def make() -> Run:
        k, v, tables = paged_cache(contexts)
        q = random(starts[-1], HEADS, HEAD_DIM)
        return lambda how: prefill_attention(
            q, k, v, tables, starts, contexts, HEAD_DIM**-0.5,
            backend=_backend(backend if how == "timed" else how), **options,
        )  # fmt: skip

    pairs = sum(n * c - n * (n - 1) / 2 for n, c in zip(lengths, contexts, strict=True))
    moved = 2 * 2 * HEAD_DIM * (sum(contexts) * KV_HEADS + starts[-1] * HEADS)
    op = f"prefill_attention ({backend})"
    return Case(op, shape, make, moved, 4.0 * HEADS * HEAD_DIM * pairs, backend)


def sample_case(batch: int, filtered: bool) -> Case:
    """Return drawing one token a row, exact but for scores equal in their last bits."""

    def make() -> Run:
        logits = random(batch, VOCAB)
        rows = {
            "temperature_B": torch.ones(batch, device="cuda"),
            "top_k_B": torch.full((batch,), 50 if filtered else 0, device="cuda"),
            "top_p_B": torch.full((batch,), 0.9 if filtered else 1.0, device="cuda"),
            "seeds_B": torch.arange(batch, device="cuda"),
            "positions_B": torch.arange(batch, device="cuda"),
        }

        def run(backend: Any) -> torch.Tensor:
            on_cpu = backend == "reference"
            inputs = {key: value.cpu() if on_cpu else value for key, value in rows.items()}
            x = logits.cpu() if on_cpu else logits
            return sample(x, **inputs, filtered=filtered, backend=_backend(backend))

        return run

    op = "sample (top-k, top-p)" if filtered else "sample"
    # One row in some ten thousand may be decided by the last bit of a logarithm; one such row of
    # 64 is an error of up to 0.2, wrong draws are one near 1.
    return Case(op, f"{batch} x {VOCAB}", make, 2 * batch * VOCAB, tolerance=0.2)


MIXED = [128 + 61 * i for i in range(64)]  # 128 to 3971 tokens, 2050 on average
DECODES: dict[str, list[int]] = {
    "1 x 2048": [2048],
    "1 x 8192": [8192],
    "1 x 32768": [32768],
    "8 x 2048": [2048] * 8,
    "32 x 2048": [2048] * 32,
    "64 x 2048": [2048] * 64,
    "64 mixed": MIXED,
    "256 x 1024": [1024] * 256,
}
PREFILLS: dict[str, tuple[list[int], list[int]]] = {
    "1 x 2048": ([2048], [2048]),
    "4 x 1024": ([1024] * 4, [1024] * 4),
    "1 x 4096": ([4096], [4096]),
    "512 of 8192": ([512], [8192]),
}


def cases() -> Iterator[Case]:
    """Return the table, cheap rows first."""
    for tokens in (1, 64, 8192):
        yield norm_case(tokens)
        yield swiglu_case(min(tokens, 4096))
        yield rotary_case(tokens, with_norm=False)
        yield rotary_case(tokens, with_norm=True)
    for tokens in (1, 4, 8, 16, 64):
        for inputs, outputs in LINEARS:
            yield linear_case(tokens, inputs, outputs)
            config = skinny_config(tokens, outputs, num_multiprocessors())
            if config is not None:
                yield linear_case(tokens, inputs, outputs, config)
    for shape, contexts in DECODES.items():
        yield decode_case(contexts, shape)
    for shape, (lengths, contexts) in PREFILLS.items():
        for backend in ("triton", "sdpa"):
            yield prefill_case(lengths, contexts, shape, backend)
    for batch, filtered in ((1, False), (64, False), (64, True)):
        yield sample_case(batch, filtered)


def relative_error(out: Any, reference: Any) -> float:
    """Return the largest ||out - reference|| / ||reference|| of the outputs."""
    pairs = zip(
        out if isinstance(out, tuple) else (out,),
        reference if isinstance(reference, tuple) else (reference,),
        strict=True,
    )
    return max(
        float((a.cpu().double() - b.cpu().double()).norm() / b.cpu().double().norm().clamp(1e-30))
        for a, b in pairs
    )


def graph_us(calls: Sequence[Callable[[], Any]], target_ms: float = 60.0) -> float:
    """Return the median microseconds of one call, the calls replayed one after the other."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Enough calls a graph that its own launch does not show.
    repeats = max(1, 16 // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()

    def once() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    warm_ms = [once() for _ in range(3)][-1]
    times = [once() for _ in range(max(7, min(100, int(target_ms / max(warm_ms, 1e-3)))))]
    return statistics.median(times) * 1e3 / (repeats * len(calls))


def ceilings() -> dict[str, float]:
    """Return the rates that this GPU reaches here: a copy, read and written; a matrix product."""
    a, b = random(8192, 8192), random(8192, 8192)
    out = torch.empty_like(a)
    product_us = graph_us([lambda: torch.mm(a, b, out=out)])
    return {
        "copy_bytes_per_s": copy_bytes_per_s(),
        "matmul_flops_per_s": 2 * 8192**3 / product_us * 1e6,
    }


def measure(case: Case, rates: dict[str, float]) -> dict[str, Any]:
    """Return the row of a case; without a time where the kernel failed its check."""
    run = case.make()
    error = relative_error(run(case.backend), run(case.reference))
    passed = error <= case.tolerance  # NaN does not
    row: dict[str, Any] = {
        "op": case.op,
        "shape": case.shape,
        "dtype": str(DTYPE).removeprefix("torch."),
        "relative_error": error,
        "passed": passed,
        "bytes": case.bytes_moved,
        "flops": case.flops,
    }
    if not passed:
        return row
    # Tiny inputs stay few, and so in L2, as they do between the operations of a model.
    sets = max(1, min(8, int(ROTATION_BYTES // case.bytes_moved)))
    runs = [run, *(case.make() for _ in range(sets - 1))]
    us = graph_us([lambda run=run: run("timed") for run in runs])  # type: ignore[misc]
    cached = sets * case.bytes_moved < ROTATION_BYTES / 2
    by_memory = case.bytes_moved / rates["copy_bytes_per_s"]
    by_arithmetic = case.flops / rates["matmul_flops_per_s"]
    return row | {
        "us": us,
        "bytes_per_s": case.bytes_moved / us * 1e6,
        "flops_per_s": case.flops / us * 1e6,
        "floor_us": max(by_memory, by_arithmetic) * 1e6,
        "share_of_floor": max(by_memory, by_arithmetic) * 1e6 / us,
        "bound": "arithmetic" if by_arithmetic > by_memory else "memory",
        "inputs_in_l2": cached,
    }


def line(row: dict[str, Any]) -> str:
    """Return a row as printed."""
    head = f"{row['op']:<27} {row['shape']:<18}"
    if not row["passed"]:
        return f"{head} FAILED its check: relative error {row['relative_error']:.1e}"
    rate = (
        f"{row['flops_per_s'] / 1e12:7.0f} TFLOP/s"
        if row["bound"] == "arithmetic"
        else f"{row['bytes_per_s'] / 1e9:7.0f} GB/s   "
    )
    return (
        f"{head} {row['us']:9.2f} us {row['bytes'] / 1e6:8.1f} MB {rate} "
        f"{row['share_of_floor']:6.1%}{' (L2)' if row['inputs_in_l2'] else ''}"
    )


def num_multiprocessors() -> int:
    """Return those of this GPU."""
    return torch.cuda.get_device_properties(0).multi_processor_count


def sweep_linear() -> Iterator[Case]:
    """Return products of few rows under other configurations than `skinny_config`'s."""
    # Also of half of the heads and columns, as two ranks share them.
    halves = ((HIDDEN, 3072), (HIDDEN // 2, HIDDEN), (HIDDEN, FFN), (FFN // 2, HIDDEN))
    for inputs, outputs in (*LINEARS, *halves):
        for tokens in (1, 8):
            yield linear_case(tokens, inputs, outputs)
            cuts = (
                itertools.product((4, 8, 16), (512, 1024), (4, 8), (1, 3, 4))
                if tokens == 1
                else itertools.product((16, 32, 64), (128, 256), (4,), (3, 4, 5))
            )
            for block_n, block_k, warps, stages in cuts:
                config = SkinnyConfig(block_n, block_k, warps, stages)
                if block_n * block_k * 2 * stages > 200_000 or block_n * block_k > 8192 * warps:
                    continue
                label = f" n{block_n} k{block_k} w{warps} p{stages}"
                yield linear_case(tokens, inputs, outputs, config, label)


def sweep_decode() -> Iterator[Case]:
    """Return decode shapes under other configurations than `decode_config`'s."""
    multiprocessors = num_multiprocessors()
    for shape in ("1 x 2048", "1 x 8192", "64 x 2048", "64 mixed"):
        contexts = DECODES[shape]
        blocks = -(-max(contexts) // BLOCK_TOKENS)
        base = decode_config(
            len(contexts), KV_HEADS, HEAD_DIM, blocks, BLOCK_TOKENS, DTYPE, multiprocessors
        )
        splits = sorted({max(1, base.num_splits * i // 2) for i in (1, 2, 3)})
        for num_splits, warps, stages in itertools.product(splits, (4, 8), (3, 4)):
            config = replace(base, num_splits=num_splits, num_warps=warps, num_stages=stages)
            label = f"{shape} s{num_splits} w{warps} p{stages}"
            yield decode_case(contexts, label, config=config)


def sweep_prefill() -> Iterator[Case]:
    """Return prefill shapes under other configurations than `prefill_config`'s."""
    for shape in ("1 x 4096", "512 of 8192"):
        lengths, contexts = PREFILLS[shape]
        base = prefill_config(max(lengths), HEAD_DIM, BLOCK_TOKENS, DTYPE)
        for block_m, tile, warps, stages in itertools.product(
            (64, 128), (32, 64), (4, 8), (2, 3, 4)
        ):
            if block_m // warps < 16:  # a warpgroup of 4 warps takes 64 rows
                continue
            config = replace(base, block_m=block_m, tile=tile, num_warps=warps, num_stages=stages)
            label = f"{shape} m{block_m} n{tile} w{warps} p{stages}"
            yield prefill_case(lengths, contexts, label, "triton", config=config)


SWEEPS = {"decode": sweep_decode, "linear": sweep_linear, "prefill": sweep_prefill}


def begin(program: str) -> tuple[int, dict[str, float]]:
    """Return the seed and what the GPU reaches, both printed; exit with 4 where there is none."""
    if not torch.cuda.is_available():
        print(f"{program}: needs a CUDA GPU, and torch sees none", file=sys.stderr)
        raise SystemExit(4)
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    rates = ceilings()
    print(
        f"{torch.cuda.get_device_name()}: copy {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"matrix product {rates['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s; seed {seed}",
        flush=True,
    )
    return seed, rates


def main() -> int:
    """Return the exit status: 1 where a kernel failed its check, 4 without a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="rows whose operation contains this")
    parser.add_argument("--sweep", choices=SWEEPS, help="try configurations instead")
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    seed, rates = begin("bench_kernels")
    table = SWEEPS[arguments.sweep]() if arguments.sweep else cases()
    rows = []
    for case in table:
        if arguments.only in case.op:
            rows.append(measure(case, rates))
            print(line(rows[-1]), flush=True)
            torch.cuda.empty_cache()
    name = f"kernels-sweep-{arguments.sweep}" if arguments.sweep else "kernels"
    content = {"seed": seed, **rates, "rows": rows}
    print(write_result(name, content, folder=arguments.output))
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
