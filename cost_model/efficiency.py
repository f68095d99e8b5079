"""Share of a device's peak that an engine reaches, and what each step costs besides.

One row an engine and device class. Rates of devices themselves are in `topology/devices.py`;
these constants turn a data sheet's peak into what a kernel gets. A CPU's rates are measured on the
machine itself (`Gpu.memory_bytes_per_s`, `Gpu.flops_per_s`), so its shares are near one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from rankwright.cost_model.tiles import TILE_KEYS
from rankwright.topology.cluster import Gpu
from rankwright.topology.devices import device_of

DeviceClass = Literal["cuda", "rocm", "cpu"]
AllReduce = Literal["library", "one_shot"]
Exchange = Literal["gather", "dispatch"]  # of tokens and experts, see `expert_exchange.py`

# Where constants come from: this machine's own calibration, a calibration that ships for the
# device, or data sheets and published figures.
Provenance = Literal["measured here", "measured table", "analytic"]

ENGINES: tuple[str, ...] = ("rankwright", "vllm", "sglang", "sglang-mixed", "trtllm")


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Efficiency constants of one engine on one class of device.

    The shares multiply peak FLOP/s (`_compute`) and peak bytes/s (`_memory`).
    """

    gemm_compute: float
    gemm_compute_float8: float
    gemm_memory: float
    attention_compute: float
    attention_memory: float
    moe_compute: float
    moe_memory: float
    elementwise_memory: float
    launch_s: float  # from the end of one kernel to the start of the next, inside a graph
    step_s: float  # scheduling, sampling, and the host's part of a step that nothing hides
    send_s: float  # handing a stage's output on, before any byte moves
    all_reduce: tuple[AllReduce, ...]  # algorithms the engine may choose from, inside a node
    fused_norms: bool  # the norm runs in the all-reduce's or the residual's kernel
    source: str
    # What ranks wait for each other in a collective of a step, for each doubling of the ranks: a
    # micro-benchmark starts them together, a step does not.
    skew_s: float = 0.0
    # One-shot is taken up to here even where another algorithm were faster.
    one_shot_bytes: float = 0.0
    # Sums over NVLink as the table of `peer_sums.py` says, the norm in the same kernel.
    peer_sums: bool = False
    # Ways for tokens to reach the experts of other ranks under attention DP that the executor may
    # choose from. Dispatch is right on CPUs (tests), and was not yet run on GPUs.
    expert_exchanges: tuple[Exchange, ...] = ("gather",)
    # What a product, and decode attention, take besides a launch: filling and draining the GPU.
    product_s: float = 0.0
    attention_s: float = 0.0
    provenance: Provenance = "analytic"
    # The host's work for each sequence of a step. The GPU computes meanwhile: a step takes the
    # longer of the two.
    host_sequence_s: float = 0.0
    # The host's work for each kernel of a step with prompts, where these run without graphs:
    # likewise, the longer of the two.
    eager_launch_s: float = 0.0
    # What a block of experts takes besides its kernels' launches: sorting tokens by expert, tiles
    # that are mostly empty.
    moe_s: float = 0.0
    # In place of `product_s` where a product has one row; None: the same.
    vector_s: float | None = None
    tile_keys: float = 0.0  # of attention of prompts; see `tiles.prefill_flops`
    # Whether latents of prompts are expanded in kernels of their own; see `latent_prefill.py`.
    expands_by_heads: bool = False


# H200, bf16, torch 2.11: matrix products reach 690-785 of 989 TFLOP/s and 1,240-1,360 of 1,979 in
# FP8 (0.70-0.79; 0.63-0.69); weight-bound ones 3.3-4.2 of 4.8 TB/s, where 4.13 TB/s and 2.5 us a
# launch reproduce both ends; a copy reaches 4.24 of 4.8 TB/s, on H100 3.0 of 3.35 (0.88, 0.90).
# Attention: FlashAttention 3 forward, causal, 450-550 of 989 TFLOP/s at head size 128 (its paper,
# figure 5). Experts: their arithmetic at 0.65 and their bytes at 0.90 of peak, one after the other,
# are within 5 % on average of our own kernel on an H200, 54 shapes of Mixtral-8x7B and
# Qwen3-30B-A3B of 1 to 8,192 tokens (benchmarks/results/moe-*.json). Launch and step: vLLM 0.26 on
# one H200 decodes the Qwen3-8B shape at batch 1 in 5.24 ms, 1.4 ms above its weights at 4.13 TB/s,
# over 36 layers of 11 kernels: 2.5 us each, and 0.4 ms of sampling and host work.
_VLLM = Efficiency(
    gemm_compute=0.72,
    gemm_compute_float8=0.64,
    gemm_memory=0.86,
    attention_compute=0.50,
    attention_memory=0.75,
    moe_compute=0.65,
    moe_memory=0.90,
    elementwise_memory=0.75,
    launch_s=2.5e-6,
    step_s=4.0e-4,
    send_s=5.0e-5,
    all_reduce=("library", "one_shot"),
    fused_norms=False,
    source="measured on H200 and H100, vLLM 0.26.0, torch 2.11",
)

# The rows of the other engines are fitted to published runs on H100 and H200 by
# `benchmarks/fit_published.py`, from the row above as prior, on the half of the workloads that
# `docs/accuracy.md` does not report. They are effective shares: kernels that this model does not
# tell apart (quantising activations, gathering logits) are in them.
_SERVED_VLLM = replace(
    _VLLM,
    gemm_compute_float8=0.614,
    gemm_memory=0.857,
    attention_memory=0.70,
    elementwise_memory=0.777,
    launch_s=2.8e-6,
    step_s=4.2e-4,
    skew_s=3.6e-6,
    host_sequence_s=3.0e-5,
    source="fitted to runs of vLLM 0.12, H100, FP8",
)
_TRTLLM = replace(
    _VLLM,
    gemm_compute=0.755,
    gemm_compute_float8=0.585,
    gemm_memory=0.836,
    attention_compute=0.59,
    attention_memory=0.835,
    elementwise_memory=0.498,
    launch_s=3.7e-6,
    step_s=4.8e-4,
    fused_norms=True,  # norm and all-reduce are one kernel
    skew_s=1.6e-6,
    host_sequence_s=4.1e-5,
    one_shot_bytes=8e6,
    source="fitted to runs of TensorRT-LLM 0.15 to 1.0, H100 and H200",
)
_SGLANG = replace(
    _VLLM,
    gemm_compute=0.763,
    gemm_compute_float8=0.52,
    gemm_memory=0.905,
    attention_compute=0.45,
    attention_memory=0.638,
    elementwise_memory=0.77,
    launch_s=2.3e-6,
    step_s=7.5e-4,
    skew_s=1.9e-6,
    host_sequence_s=2.0e-5,
    # DeepSeek-R1 on 8 H200, 8 to 64 in flight (`benchmarks/data/public_rows.json`): a block of
    # experts takes so much longer than its kernels here. Our run of vLLM 0.26 shows none.
    moe_s=4.0e-5,
    source="fitted to runs of SGLang 0.5, H100 and H200",
)

# Ours, on devices that no calibration ships for: the shares that `rankwright calibrate` gave on an
# H200 (`data/calibrated.json`). Sums: `executor/peer_memory.py` where GPUs have NVLink, else NCCL.
_RANKWRIGHT = replace(
    _VLLM,
    gemm_compute=0.717,
    gemm_compute_float8=0.643,
    gemm_memory=0.885,
    attention_compute=0.443,
    attention_memory=0.879,
    elementwise_memory=0.878,
    launch_s=1.57e-6,
    product_s=3.5e-6,
    attention_s=3.1e-6,
    all_reduce=("library", "one_shot"),
    peer_sums=True,
    # Prompts of 128 tokens of Llama-3.1-8B, 9 kernels a layer: 9.6 to 10.7 ms beside two H200, 17
    # beside an H100; of Qwen3-30B-A3B 26 to 29 ms. Hosts differ, and two ranks wait for the slower.
    eager_launch_s=4.0e-5,
    # One row goes through a kernel of its own: 129 products of Llama-3.1-8B at batch 1 leave 0.7 us
    # each on H200 and 1.1 us on H100.
    vector_s=8.0e-7,
    tile_keys=TILE_KEYS,
    expands_by_heads=True,
    # The next step is decided while one runs: six batches of 1 to 256 of Llama-3.1-8B on an H100
    # leave 0.1 ms beside their kernels.
    step_s=1.0e-4,
    skew_s=2.0e-6,  # as the fits of the other engines, 1.6 to 3.6 us
    source="shares measured on H200 with rankwright calibrate",
)

# MI300X reaches 668 of 1,307 TFLOP/s and MI325X 785 in bf16 products (stas00/ml-engineering,
# compute/accelerator/benchmarks). The other shares are scaled down like it, from H100's.


def _on_rocm(row: Efficiency) -> Efficiency:
    return replace(
        row,
        gemm_compute=0.52,
        gemm_compute_float8=0.45,
        gemm_memory=0.70,
        attention_compute=0.30,
        attention_memory=0.60,
        moe_compute=0.47,
        moe_memory=0.71,
        elementwise_memory=min(row.elementwise_memory, 0.75),
        launch_s=4.0e-6,
        peer_sums=False,
        all_reduce=row.all_reduce if row.one_shot_bytes or not row.peer_sums else ("library",),
        source="MI300X products measured by stas00/ml-engineering",
    )


# The rates of a CPU are measured by the probe with the same torch kernels that the engine uses, so
# they need no share. An eager torch operation costs 5-10 us of dispatch, a layer's are counted like
# the kernels of a GPU; a step costs about 1 ms of Python around them.
_CPU = Efficiency(
    gemm_compute=1.0,
    gemm_compute_float8=1.0,
    gemm_memory=1.0,
    attention_compute=0.5,
    attention_memory=0.5,
    moe_compute=0.5,
    moe_memory=0.5,
    elementwise_memory=0.5,
    launch_s=1.0e-5,
    step_s=1.0e-3,
    send_s=1.0e-4,
    all_reduce=("library",),
    fused_norms=False,
    expands_by_heads=True,
    expert_exchanges=("gather", "dispatch"),
    source="rates measured by the probe; dispatch of eager torch",
)

# Constants that a calibration can set; the others stay the engine's.
CALIBRATED = (
    "gemm_compute",
    "gemm_compute_float8",
    "gemm_memory",
    "attention_compute",
    "attention_memory",
    "elementwise_memory",
    "launch_s",
    "product_s",
    "attention_s",
    "step_s",
)
# Made by `benchmarks/fit_calibrations.py` from `rankwright calibrate` on each device.
_TABLES = Path(__file__).parent / "data" / "calibrated.json"

CUDA_ROWS = {
    "rankwright": _RANKWRIGHT,
    "vllm": _SERVED_VLLM,
    "sglang": _SGLANG,
    "sglang-mixed": _SGLANG,
    "trtllm": _TRTLLM,
}


_RUNTIMES: dict[str, DeviceClass] = {"nvidia": "cuda", "amd": "rocm", "cpu": "cpu"}


def device_class(gpu: Gpu) -> DeviceClass:
    """Return which runtime `gpu` runs under."""
    device = device_of(gpu)
    if device is None:
        return "cuda"  # the probe derives rates from SM counts, which only NVIDIA has
    return _RUNTIMES[device.vendor]


def find_efficiency(engine: str, gpu: Gpu) -> Efficiency:
    """Return the constants of `engine` on `gpu`.

    Raises:
        ValueError: `engine` is not in `ENGINES`.
    """
    if engine not in CUDA_ROWS:
        raise ValueError(f"engine {engine!r} is unknown; expected one of {', '.join(ENGINES)}")
    kind = device_class(gpu)
    if kind == "cpu":
        if gpu.efficiency is None or engine != "rankwright":
            return _CPU
        return _calibrated(_CPU, gpu.efficiency, "measured here", "rankwright calibrate")
    row = CUDA_ROWS[engine]
    if kind == "rocm":
        row = _on_rocm(row)
    if engine != "rankwright":
        return row
    if gpu.efficiency is not None:
        return _calibrated(row, gpu.efficiency, "measured here", "rankwright calibrate")
    table = _measured_tables().get(gpu.device)
    if table is None:
        return row
    return _calibrated(row, table["shares"], "measured table", table["source"])


def _calibrated(
    row: Efficiency, shares: Mapping[str, float], provenance: Provenance, source: str
) -> Efficiency:
    unknown = sorted(set(shares) - set(CALIBRATED))
    if unknown:
        raise ValueError(
            f"efficiency of a calibration: {', '.join(unknown)} unknown; expected some of "
            f"{', '.join(CALIBRATED)}"
        )
    return replace(row, **shares, provenance=provenance, source=source)  # type: ignore[arg-type]


@cache
def _measured_tables() -> dict[str, dict[str, Any]]:
    """Return what calibrations shipped for devices say, by device key."""
    return cast("dict[str, dict[str, Any]]", json.loads(_TABLES.read_text(encoding="utf-8")))
