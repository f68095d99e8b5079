"""Share of a device's peak that an engine reaches, and what each step costs besides.

One row an engine and device class. Rates of devices themselves are in `topology/devices.py`;
these constants turn a data sheet's peak into what a kernel gets. A CPU's rates are measured on the
machine itself (`Gpu.memory_bytes_per_s`, `Gpu.flops_per_s`), so its shares are near one.
"""

from dataclasses import dataclass, replace
from typing import Literal

from rankwright.topology.cluster import Gpu
from rankwright.topology.devices import device_of

DeviceClass = Literal["cuda", "rocm", "cpu"]
AllReduce = Literal["library", "one_shot"]

ENGINES: tuple[str, ...] = ("rankwright", "vllm", "sglang", "trtllm")


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


# H200, bf16, torch 2.11: matrix products reach 690-785 of 989 TFLOP/s and 1,240-1,360 of 1,979 in
# FP8 (0.70-0.79; 0.63-0.69); weight-bound ones 3.3-4.2 of 4.8 TB/s, where 4.13 TB/s and 2.5 us a
# launch reproduce both ends; a copy reaches 4.24 of 4.8 TB/s, on H100 3.0 of 3.35 (0.88, 0.90).
# Attention: FlashAttention 3 forward, causal, 450-550 of 989 TFLOP/s at head size 128 (its paper,
# figure 5). Grouped products: 523 of 989 TFLOP/s for a Qwen3-30B-A3B shape on H100
# (linkedin/Liger-Kernel pull request 1294). Launch and step: vLLM 0.26 on one H200 decodes the
# Qwen3-8B shape at batch 1 in 5.24 ms, 1.4 ms above its weights at 4.13 TB/s, over 36 layers of 11
# kernels: 2.5 us each, and 0.4 ms of sampling and host work.
_VLLM = Efficiency(
    gemm_compute=0.72,
    gemm_compute_float8=0.64,
    gemm_memory=0.86,
    attention_compute=0.50,
    attention_memory=0.75,
    moe_compute=0.45,
    moe_memory=0.70,
    elementwise_memory=0.75,
    launch_s=2.5e-6,
    step_s=4.0e-4,
    send_s=5.0e-5,
    all_reduce=("library", "one_shot"),
    fused_norms=False,
    source="measured on H200 and H100, vLLM 0.26.0, torch 2.11",
)

# TensorRT-LLM runs norm and all-reduce in one kernel and overlaps its scheduler with the last step.
# With these constants 137 rows of its throughput tables (v0.20 and v1.0, Llama-3.1-8B and 70B FP8
# on H100 and H200, TP1 to TP8) are predicted with a mean error of 8 %, a median ratio of 1.00.
_TRTLLM = replace(
    _VLLM,
    launch_s=2.0e-6,
    step_s=1.5e-4,
    fused_norms=True,
    source="TensorRT-LLM perf-overview v1.0, H100 and H200",
)

# SGLang overlaps scheduling with the step before it (lmsys.org blog, 2024-12-04), which leaves
# sampling only.
_SGLANG = replace(_VLLM, step_s=2.5e-4, source="as vLLM, with SGLang's overlapped scheduler")

# Ours: cuBLAS for products as above; Triton for attention, whose FA2-style kernels reach 407-487 of
# 989 TFLOP/s without a mask (facebookexperimental/triton issue 205) and less with one; NCCL inside
# the graph for every all-reduce.
_RANKWRIGHT = replace(
    _VLLM,
    attention_compute=0.35,
    attention_memory=0.70,
    all_reduce=("library",),
    source="cuBLAS and NCCL measured on H200; attention from published Triton kernels",
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
        launch_s=4.0e-6,
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
    source="rates measured by the probe; dispatch of eager torch",
)

_CUDA = {"rankwright": _RANKWRIGHT, "vllm": _VLLM, "sglang": _SGLANG, "trtllm": _TRTLLM}


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
    if engine not in _CUDA:
        raise ValueError(f"engine {engine!r} is unknown; expected one of {', '.join(ENGINES)}")
    kind = device_class(gpu)
    if kind == "cpu":
        return _CPU
    row = _CUDA[engine]
    return _on_rocm(row) if kind == "rocm" else row
