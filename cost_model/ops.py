"""Seconds of what one rank computes in one step.

A step is a roofline: each op takes the longer of its arithmetic and its memory traffic (products of
experts take both), at the share of peak that the engine reaches (`efficiency.py`), and a launch for
each kernel. Which ops a layer has is in `layer_ops.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

from rankwright.cost_model.dtypes import Dtype
from rankwright.cost_model.efficiency import Efficiency, find_efficiency
from rankwright.cost_model.prediction import Bound
from rankwright.topology.cluster import Gpu
from rankwright.topology.devices import device_of, flops_per_s, memory_bytes_per_s

# Weights of 4 bits are widened in registers. From there Hopper's processors take them by the older
# instructions only, which reach some 60 % of its peak (arXiv 2402.13499, section on tensor cores);
# Ampere and Ada have no others.
_HOPPER = (9, 0)
_WIDENED_SHARE = 0.6

OpKind = Literal["gemm", "vector", "moe", "attention prefill", "attention decode", "elementwise"]


class StepTokens(NamedTuple):
    """What one micro-batch computes in one step.

    A tuple, not a dataclass, as `Op` is: the planner makes and hashes tens of thousands of each,
    and a frozen dataclass takes four times as long.

    Args:
        decode: Sequences that get one token each.
        decode_context: Mean tokens that each of them attends to.
        prefill: Prompt tokens.
        prefill_context: Mean tokens that each prompt token attends to.
        prompts: Prompts that end in this step, whose last token gets logits.
        sequences: Prompts that share the prompt tokens, where known to be more than end.
    """

    decode: float = 0
    decode_context: float = 0
    prefill: float = 0
    prefill_context: float = 0
    prompts: float = 0
    sequences: float = 0

    @property
    def total(self) -> float:
        """Tokens that pass through the layers."""
        return self.decode + self.prefill


class Op(NamedTuple):
    """One term of a rank's step."""

    name: str
    kind: OpKind
    flops: float
    bytes: float
    launches: int
    dtype: Dtype
    padding_flops: float = 0.0  # of rows that fill a tile and are thrown away


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one op and what limits it."""

    seconds: float
    bound: Bound


@dataclass(frozen=True)
class Rates:
    """What one GPU does in a second under one engine.

    Args:
        flops_per_s: Peak, by what is multiplied.
        memory_bytes_per_s: Peak.
        efficiency: The engine's shares of these.
        widened_share: Of a product's FLOP/s, that weights which are widened on their way leave.
    """

    flops_per_s: dict[Dtype, float]
    memory_bytes_per_s: float
    efficiency: Efficiency
    widened_share: float = 1.0

    def cost(self, op: Op) -> Cost:
        """Return the seconds of `op`: the longer of compute and memory, and its launches.

        Of experts' products it is both, since tiles of few rows overlap little of the two.

        >>> from rankwright.cost_model.efficiency import find_efficiency
        >>> from rankwright.topology.shorthand import parse_cluster
        >>> rates = find_rates(parse_cluster("1xh200-sxm").nodes[0].gpus[0], "vllm")
        >>> rates.cost(Op("copy", "gemm", 0.0, 4.128e9, 0, "bfloat16")).bound
        'memory'
        """
        compute_s, memory_s, launch_s = self._terms(op)
        times: dict[Bound, float] = {
            "compute": compute_s,
            "memory": memory_s,
            "launch": launch_s,
        }
        return Cost(self.seconds((op,)), max(times, key=times.__getitem__))

    def seconds(self, ops: Iterable[Op]) -> float:
        """Return the seconds of `ops`, one after another."""
        total = 0.0
        for op in ops:
            compute_s, memory_s, launch_s = self._terms(op)
            if op.kind == "moe":
                total += compute_s + memory_s + launch_s
            else:
                total += (compute_s if compute_s > memory_s else memory_s) + launch_s
        return total

    def _terms(self, op: Op) -> tuple[float, float, float]:
        """Return the seconds of arithmetic, of memory traffic and of launches."""
        compute_rate, memory_rate, launch_s = self._peak[op.kind, op.dtype]
        return (
            (op.flops + op.padding_flops) / compute_rate,
            op.bytes / memory_rate,
            op.launches * launch_s,
        )

    @cached_property
    def _peak(self) -> dict[tuple[OpKind, Dtype], tuple[float, float, float]]:
        """What a kernel of each kind and format reaches: FLOP/s, bytes/s, seconds a launch."""
        share = self.efficiency
        shares: dict[OpKind, tuple[float, float]] = {
            "gemm": (share.gemm_compute, share.gemm_memory),
            "vector": (share.gemm_compute, share.gemm_memory),
            "moe": (share.moe_compute, share.moe_memory),
            "attention prefill": (share.attention_compute, share.attention_memory),
            "attention decode": (share.attention_compute, share.attention_memory),
            "elementwise": (1.0, share.elementwise_memory),
        }
        starts: dict[OpKind, float] = {
            "gemm": share.product_s,
            "vector": share.product_s if share.vector_s is None else share.vector_s,
            "moe": share.product_s + share.moe_s / 2,  # it has two launches
            "attention decode": share.attention_s / 2,  # it has two launches
        }
        peaks: dict[tuple[OpKind, Dtype], tuple[float, float, float]] = {}
        for kind, (compute, memory) in shares.items():
            launch_s = share.launch_s + starts.get(kind, 0.0)
            for dtype, flops in self.flops_per_s.items():
                reached = flops * compute
                if kind in ("gemm", "vector", "moe"):
                    reached = compute * self._product_flops_per_s(dtype)
                peaks[kind, dtype] = reached, self.memory_bytes_per_s * memory, launch_s
        return peaks

    def _product_flops_per_s(self, dtype: Dtype) -> float:
        """Return the FLOP/s of which products with weights of `dtype` reach the share of 16 bits.

        MXFP4 weights meet FP8 inputs where a GPU multiplies both; everywhere else weights of 4 bits
        are widened on their way to the processors.
        """
        rates, share = self.flops_per_s, self.efficiency
        float8 = rates["float8"] * share.gemm_compute_float8 / share.gemm_compute
        if dtype == "float8" or (dtype == "mxfp4" and rates["mxfp4"] > rates["float8"]):
            return float8
        return rates[dtype] * (self.widened_share if dtype in ("mxfp4", "int4") else 1.0)


def find_rates(gpu: Gpu, engine: str) -> Rates:
    """Return what `gpu` does under `engine`."""
    rates: dict[Dtype, float] = {dtype: flops_per_s(gpu, dtype) for dtype in get_args(Dtype)}
    device = device_of(gpu)
    capability = gpu.compute_capability or (device.compute_capability if device else None)
    widened = _WIDENED_SHARE if capability is not None and capability >= _HOPPER else 1.0
    return Rates(rates, memory_bytes_per_s(gpu), find_efficiency(engine, gpu), widened)
