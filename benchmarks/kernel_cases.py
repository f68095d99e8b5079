"""The operations of a model at the shapes of an 8B-class one, as rows of a benchmark's table."""

from collections.abc import Sequence
from typing import Any

import torch

from kernel_timing import DTYPE, Case, Run, random
from rankwright.kernels.decode_attention import decode_attention
from rankwright.kernels.prefill_attention import prefill_attention
from rankwright.kernels.rms_norm import rms_norm
from rankwright.kernels.rotary import rope_table, rotary_and_cache
from rankwright.kernels.sampling import sample
from rankwright.kernels.skinny_linear import SkinnyConfig, skinny_linear
from rankwright.kernels.swiglu import swiglu

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

DecodeInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
PrefillInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[int], list[int]]


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


def linear_case(tokens: int, inputs: int, outputs: int, config: SkinnyConfig | None = None) -> Case:
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
    shape = f"{tokens} x {inputs} > {outputs}"
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


def decode_inputs(contexts: Sequence[int]) -> DecodeInputs:
    """Return queries, caches, block tables and lengths of one token for each context."""
    lengths = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    return random(len(contexts), HEADS, HEAD_DIM), *paged_cache(contexts), lengths


def decode_case(contexts: Sequence[int], shape: str) -> Case:
    """Return decode attention of one token for each context."""

    def make() -> Run:
        inputs = decode_inputs(contexts)
        return lambda backend: decode_attention(*inputs, HEAD_DIM**-0.5, backend=_backend(backend))

    moved = 2 * 2 * HEAD_DIM * (sum(contexts) * KV_HEADS + len(contexts) * HEADS)
    flops = 4.0 * HEADS * HEAD_DIM * sum(contexts)
    return Case("decode_attention", shape, make, moved, flops)


def prefill_inputs(lengths: Sequence[int], contexts: Sequence[int]) -> PrefillInputs:
    """Return queries, caches, block tables, starts and contexts of chunks at their ends."""
    starts = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    return random(starts[-1], HEADS, HEAD_DIM), *paged_cache(contexts), starts, list(contexts)


def prefill_case(lengths: Sequence[int], contexts: Sequence[int], shape: str, backend: str) -> Case:
    """Return prefill attention of chunks at the end of their contexts."""

    def make() -> Run:
        inputs = prefill_inputs(lengths, contexts)
        return lambda how: prefill_attention(
            *inputs, HEAD_DIM**-0.5, backend=_backend(backend if how == "timed" else how)
        )

    pairs = sum(n * c - n * (n - 1) / 2 for n, c in zip(lengths, contexts, strict=True))
    moved = 2 * 2 * HEAD_DIM * (sum(contexts) * KV_HEADS + sum(lengths) * HEADS)
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
    "1 x 65536": [65536],
    "8 x 2048": [2048] * 8,
    "32 x 2048": [2048] * 32,
    "64 x 2048": [2048] * 64,
    "64 x 4096": [4096] * 64,
    "64 mixed": MIXED,
    "256 x 1024": [1024] * 256,
}
PREFILLS: dict[str, tuple[list[int], list[int]]] = {
    "1 x 2048": ([2048], [2048]),
    "4 x 1024": ([1024] * 4, [1024] * 4),
    "1 x 4096": ([4096], [4096]),
    "1 x 8192": ([8192], [8192]),
    "512 of 8192": ([512], [8192]),
}
