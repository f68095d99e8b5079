"""Finds the products of few rows that the skinny kernel does faster than cuBLAS, and how."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
from torch.nn.functional import linear

from kernel_timing import ROTATION_BYTES, graph_us, num_multiprocessors, random
from kernel_tuning import CALL_MS, NOISE, Row, Tuner, best
from rankwright.kernels.rms_norm import rms_norm
from rankwright.kernels.skinny_linear import ROW_BUCKETS, SkinnyConfig, skinny_linear
from rankwright.kernels.swiglu import swiglu

# Inputs and outputs of the products of Llama-3.1-8B and Qwen3-8B, their heads last, on one GPU and
# on each of two.
SHAPES = (
    *((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256)),
    *((4096, 24576), (12288, 4096), (4096, 151936)),
    *((4096, 3072), (2048, 4096), (4096, 14336), (7168, 4096), (4096, 64128)),
    *((4096, 12288), (6144, 4096), (4096, 75968)),
)
# qkv, o, gate and up, down: of Llama-3.1-8B on one GPU, and on each of two.
LAYERS = (SHAPES[:4], SHAPES[8:12])
NUM_LAYERS = 6  # 2.6 GB of weights: none come from L2
# Outputs and inputs of a tile, and stages: 64 KB in flight on a multiprocessor and more.
CUTS = (
    *((16, 256, 5), (32, 128, 5), (32, 256, 4), (64, 64, 6), (64, 128, 4), (64, 128, 5)),
    *((64, 256, 3), (64, 256, 4), (128, 64, 5), (128, 128, 4)),
)


def candidates(inputs: int, outputs: int) -> Iterator[SkinnyConfig]:
    """Yield cuts of a product whose programs fill the GPU between half and eight times."""
    least = num_multiprocessors() / 2
    for block_n, block_k, stages in CUTS:
        for splits in (1, 2, 3, 4, 6, 8):
            fills = least <= -(-outputs // block_n) * splits <= 16 * least
            if splits == 1 or (fills and inputs >= 4 * splits * block_k):
                yield SkinnyConfig(block_n, block_k, 4, stages, splits)


def timer_of(
    tuner: Tuner, x: torch.Tensor, weights: Sequence[torch.Tensor]
) -> Callable[[SkinnyConfig], float]:
    """Return what tells the microseconds of a product under a configuration."""
    exact = x.float() @ weights[0].float().t()

    def time_us(config: SkinnyConfig) -> float:
        calls = [
            lambda weight=weight: skinny_linear(x, weight, config=config) for weight in weights
        ]
        return tuner.us(f"{config}", calls, exact)

    return time_us


def tune_linear(tuner: Tuner, copy_bytes_per_s: float) -> dict[str, list[Row]]:
    """Return the rows of the table: what beats cuBLAS, alone and in layers."""
    rows: list[Row] = []
    for inputs, outputs in SHAPES:
        count = max(1, min(8, int(ROTATION_BYTES // (2 * inputs * outputs))))
        weights = [random(outputs, inputs) * inputs**-0.5 for _ in range(count)]
        for num_rows in ROW_BUCKETS[1:]:
            x = random(num_rows, inputs)
            products = [lambda x=x, weight=weight: linear(x, weight) for weight in weights]
            library_us = graph_us(products, CALL_MS)
            timers = [(library_us, timer_of(tuner, x, weights))]
            config, ratio = best(list(candidates(inputs, outputs)), timers)
            row = {
                "shape": [num_rows, inputs, outputs],
                "config": asdict(config),
                "us": ratio * library_us,
                "library_us": library_us,
                "weights_us": 2 * inputs * outputs / copy_bytes_per_s * 1e6,
            }
            print(
                f"{num_rows:>3} x {inputs} > {outputs}: cuBLAS {library_us:.1f} us, "
                f"{row['us']:.1f} by {config}, weights alone {row['weights_us']:.1f}",
                flush=True,
            )
            rows += [row] if ratio < NOISE else []
        del weights
        torch.cuda.empty_cache()
    return {"linear": [row for num_rows in ROW_BUCKETS[1:] for row in that_pay(num_rows, rows)]}


def that_pay(num_rows: int, rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the table for `num_rows`, or none where whole layers are not faster."""
    mine = [row for row in rows if row["shape"][0] == num_rows]
    pay = True
    for layer in LAYERS:
        library_us, tuned_us = (layers_us(num_rows, layer, some) for some in ([], mine))
        pay &= tuned_us < 0.99 * library_us
        print(
            f"{num_rows:>3} rows, layers {layer}: cuBLAS {library_us:.1f} us each, "
            f"by the table {tuned_us:.1f}{'' if pay else ': no row is kept'}",
            flush=True,
        )
    return mine if pay else []


def layers_us(num_rows: int, layer: Sequence[tuple[int, int]], rows: Sequence[Row]) -> float:
    """Return the microseconds of a layer but its attention, products by `rows` or by cuBLAS.

    In a layer, kernels before and after a product count too: another use of shared memory, weights
    that are not in L2.
    """
    configs = {tuple(row["shape"]): SkinnyConfig(**row["config"]) for row in rows}
    weights = [
        [random(outputs, inputs) * inputs**-0.5 for inputs, outputs in layer]
        for _ in range(NUM_LAYERS)
    ]
    hidden, residual = (random(num_rows, layer[0][0]) for _ in range(2))
    norm = random(layer[0][0])

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        config = configs.get((num_rows, weight.shape[1], weight.shape[0]))
        return linear(x, weight) if config is None else skinny_linear(x, weight, config=config)

    def run() -> torch.Tensor:
        x = hidden
        for qkv, o, gate_up, down in weights:
            x = product(rms_norm(x, norm, 1e-5, residual), qkv)
            x = product(x[:, : o.shape[1]], o)
            x = product(rms_norm(x, norm, 1e-5, residual), gate_up)
            x = product(swiglu(x), down)
        return x

    return graph_us([run]) / NUM_LAYERS
