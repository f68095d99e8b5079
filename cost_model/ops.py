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
from rankwright.topology.devices import flops_per_s, memory_bytes_per_s

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
    """

    decode: float = 0
    decode_context: float = 0
    prefill: float = 0
    prefill_context: float = 0
    prompts: float = 0

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
    """What one GPU does in a second under one engine."""

    flops_per_s: dict[Dtype, float]
    memory_bytes_per_s: float
    efficiency: Efficiency

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
            for dtype, flops in self.flops_per_s.items():
                of_dtype = compute
                if dtype == "float8" and kind in ("gemm", "vector", "moe"):
                    of_dtype *= share.gemm_compute_float8 / share.gemm_compute
                launch_s = share.launch_s + starts.get(kind, 0.0)
                peaks[kind, dtype] = flops * of_dtype, self.memory_bytes_per_s * memory, launch_s
        return peaks


def find_rates(gpu: Gpu, engine: str) -> Rates:
    """Return what `gpu` does under `engine`."""
    rates: dict[Dtype, float] = {dtype: flops_per_s(gpu, dtype) for dtype in get_args(Dtype)}
    return Rates(rates, memory_bytes_per_s(gpu), find_efficiency(engine, gpu))
