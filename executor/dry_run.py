"""What kernels a rank will launch, found without a GPU: its start is run on the meta device.

There tensors have shapes and no values, and each launch is noted in place of being made. So the
kernels can be compiled while the ranks do not yet need them (`compile_ahead.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rankwright.cost_model.model_spec import LayerRun
from rankwright.executor.groups import Group
from rankwright.executor.mesh import Mesh
from rankwright.executor.runner import Runner
from rankwright.executor.weights import Range, shard_shape
from rankwright.kernels.gpu_facts import GpuFacts, stand_in
from rankwright.planner.plan import Plan

_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Launch:
    """One version of a kernel.

    Attributes:
        module: Where the kernel is.
        name: Of its function.
        specialization: What Triton's `preload` compiles it by.
    """

    module: str
    name: str
    specialization: str


class _NoDriver:
    """What Triton asks of a GPU before it compiles for one."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class _NoWeights:
    """Shards of the right shapes, and nothing in them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __contains__(self, name: str) -> bool:
        return True

    def shard(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: Range | None = None,
        columns: Range | None = None,
        depth: Range | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return rows and columns; see `WeightSource.shard`."""
        extent = shard_shape(shape, rows, columns, depth)
        return torch.empty(extent, dtype=dtype or self._dtype, device=_META)


class _LoneMesh(Mesh):
    """One rank without the others: what they would send has the right shape, and no values.

    Sums through memory that GPUs share are left out: their kernels take addresses of it.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        self._take_place(plan, rank, _META)
        place, split = self.place, self.split
        stage = [
            other.rank
            for other in plan.ranks
            if (other.replica, other.stage) == (place.replica, place.stage)
        ]
        self.tp = Group(tuple(stage[: split.tp]), None)
        self.cp = Group(tuple(stage[:: split.tp]), None)

    @property
    def is_one_machine(self) -> bool:
        return False  # so that no memory is shared

    def gather_integers(self, value: int) -> list[int]:
        return [value]

    def open_peer_memory(self, *, max_rows: int, dim: int, dtype: torch.dtype) -> None:
        return

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather_tokens(self, rows_TD: torch.Tensor) -> torch.Tensor:
        return rows_TD.new_empty(len(rows_TD) * self.attention_ranks, *rows_TD.shape[1:])

    def sum_tokens(self, parts_TD: torch.Tensor) -> torch.Tensor:
        return parts_TD.new_empty(len(parts_TD) // self.attention_ranks, *parts_TD.shape[1:])

    def gather_context(self, part: torch.Tensor) -> torch.Tensor:
        return part.new_empty(self.cp.size, *part.shape)

    def pass_round(self, part: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        return ((rank, part) for rank in range(self.cp.size))

    def sum_context(self, rows_RD: torch.Tensor) -> torch.Tensor:
        return rows_RD

    def all_gather_columns(self, shard_BV: torch.Tensor) -> torch.Tensor:
        return shard_BV.new_empty(len(shard_BV), self.vocab_ranges[-1][1])

    def send_to_next(self, hidden_TD: torch.Tensor) -> None:
        return None

    def receive_from_previous(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        return hidden_TD


class _OwnRules(TorchFunctionMode):
    """Shapes of what every decoder computes; PyTorch's own rules import sympy or its compiler.

    That takes seconds. What is not here goes by PyTorch's rules, and is right as well.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        if rule is None:
            is_elementwise = getattr(func, "__name__", "").strip("_") in _ELEMENTWISE
            rule = _elementwise if is_elementwise else func
        return rule(*args, **(kwargs or {}))


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return tensors[0].new_empty(shape)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: object = None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _embedding(ids: torch.Tensor, weight: torch.Tensor, **_: object) -> torch.Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


def _item(x: torch.Tensor, index: Any) -> torch.Tensor:
    if isinstance(index, torch.Tensor):
        return x.new_empty(*index.shape, *x.shape[1:])
    return x[index]


def _elementwise(*operands: object) -> torch.Tensor:
    tensors = [operand for operand in operands if isinstance(operand, torch.Tensor)]
    shape = [1] * max(tensor.dim() for tensor in tensors)
    for tensor in tensors:
        for dim, length in enumerate(reversed(tensor.shape), 1):
            shape[-dim] = max(shape[-dim], length)
    return tensors[0].new_empty(shape)


# Comparisons too get the dtype of their first operand: no kernel takes any of these.
_ELEMENTWISE = {"ge", "lt", "and", "sub", "mul", "where"}
_RULES: dict[Any, Callable[..., torch.Tensor]] = {
    torch.cat: _cat,
    torch.nn.functional.linear: _linear,
    torch.nn.functional.embedding: _embedding,
    torch.Tensor.__getitem__: _item,
    torch.zeros_like: lambda x, dtype=None: x.new_empty(x.shape, dtype=dtype),
}


def launches_of(
    plan: Plan, rank: int, gpu: GpuFacts, target: Any, dtype: torch.dtype
) -> list[Launch]:
    """Return each kernel version that `rank` launches until it is ready, once.

    Changes Triton's idea of its GPU for good: for a process of its own.

    Args:
        plan: What runs.
        rank: Whose kernels.
        gpu: That it will run on.
        target: Triton's `GPUTarget` of it.
        dtype: Of the activations.
    """
    from triton.runtime import driver

    no_driver: Any = _NoDriver(target)
    driver.set_active(no_driver)
    stand_in(gpu)
    plan = _one_layer_of_each(plan, rank)
    with _noted() as found, _OwnRules():
        runner = Runner(plan, _LoneMesh(plan, rank), _NoWeights(dtype), dtype=dtype)
        runner.warm_up(plan.limits)
    return list(found)


def _one_layer_of_each(plan: Plan, rank: int) -> Plan:
    """Return the plan with each kind of layer of the rank's stage once: more launch nothing new."""
    place = plan.ranks[rank]
    layers = plan.model.layers
    kept: list[int] = []
    for index in range(*place.layers):
        if layers[index] not in (layers[other] for other in kept):
            kept.append(index)
    runs = tuple(LayerRun(layer=layers[index], count=1) for index in kept)
    ranks = list(plan.ranks)
    ranks[rank] = place.model_copy(update={"layers": (0, len(kept))})
    slots = plan.expert_slots
    if slots is not None:
        is_moe = [layer.feed_forward.kind == "moe" for layer in layers]
        of_kept = tuple(slots.layers[sum(is_moe[:index])] for index in kept if is_moe[index])
        slots = slots.model_copy(update={"layers": of_kept, "rebalance_steps": None})
    return plan.model_copy(
        update={
            "model": plan.model.model_copy(update={"layer_runs": runs}),
            "ranks": tuple(ranks),
            "expert_slots": slots,
        }
    )


@contextmanager
def _noted() -> Iterator[dict[Launch, None]]:
    """Note what is launched in the block, and launch nothing."""
    from triton import knobs

    found: dict[Launch, None] = {}

    def note(*, fn: Any, compile: Any, **_: Any) -> bool:
        found[Launch(fn.module, fn.name.rpartition(".")[2], compile["specialization_data"])] = None
        return True

    knobs.runtime.jit_cache_hook = note
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = None
