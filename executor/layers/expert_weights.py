"""Loads a rank's experts from either layout of a checkpoint into the packed form of the kernels.

Experts come one by one, so that beside the packed tensors one matrix exists at a time.
Shape letters: S slots of this rank, D hidden, F columns of an expert on this rank.
"""

from collections.abc import Callable, Sequence

import torch

from rankwright.cost_model.model_spec import FeedForward
from rankwright.executor.models.names import ExpertNames, PackedExpertNames
from rankwright.executor.weights import Range, WeightSource
from rankwright.kernels.moe_experts import Experts

# Returns gate and up [2 F, D], down [D, F] and their biases of one expert.
Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def load_experts(
    source: WeightSource,
    names: ExpertNames | PackedExpertNames,
    block: FeedForward,
    *,
    layer: int,
    experts: Sequence[int],
    columns: Range,
    hidden_size: int,
) -> Experts:
    """Return this rank's columns of its experts, packed for the grouped products.

    Args:
        source: Where the weights come from.
        names: Of the experts' tensors.
        block: Shapes of the whole block.
        layer: Number of the layer.
        experts: Which of them, in the order of the slots.
        columns: Which columns of each.
        hidden_size: D.
    """
    read = expert_reader(
        source, names, block, layer=layer, columns=columns, hidden_size=hidden_size
    )
    packed: list[torch.Tensor | None] = [None, None, None, None]
    for slot, expert in enumerate(experts):
        for index, matrix in enumerate(read(expert)):
            if matrix is None:
                continue
            target = packed[index]
            if target is None:
                target = matrix.new_empty(len(experts), *matrix.shape)
                packed[index] = target
            target[slot] = matrix
    gate_up, down, gate_up_bias, down_bias = packed
    assert gate_up is not None, "a rank without experts"
    assert down is not None
    limit = block.activation_limit if block.activation == "clamped_swiglu" else None
    return Experts(gate_up, down, gate_up_bias, down_bias, limit)


def expert_reader(
    source: WeightSource,
    names: ExpertNames | PackedExpertNames,
    block: FeedForward,
    *,
    layer: int,
    columns: Range,
    hidden_size: int,
) -> Callable[[int], Matrices]:
    """Return what reads one expert by its number; see `load_experts`."""
    width = block.intermediate_size

    def separate(names: ExpertNames, expert: int) -> Matrices:
        at = {"layer": layer, "expert": expert}
        gate, up = (
            source.shard(f"{name.format(**at)}.weight", (width, hidden_size), columns)
            for name in (names.gate, names.up)
        )
        down = source.shard(
            f"{names.down.format(**at)}.weight", (hidden_size, width), None, columns
        )
        return torch.cat([gate, up]), down, None, None

    def packed(names: PackedExpertNames, expert: int) -> Matrices:
        one = (expert, expert + 1)
        pairs = (2 * columns[0], 2 * columns[1])
        gate_up_name, down_name = (name.format(layer=layer) for name in (names.gate_up, names.down))
        shape = (block.num_experts, hidden_size, 2 * width)
        gate_up = source.shard(gate_up_name, shape, one, None, pairs)[0]
        down = source.shard(down_name, (block.num_experts, width, hidden_size), one, columns)[0]
        bias = down_bias = None
        if block.bias:
            shape_2 = (block.num_experts, 2 * width)
            bias = _apart(source.shard(f"{gate_up_name}_bias", shape_2, one, pairs)[0])
            if columns[0] == 0:  # the sum over the ranks of an expert must hold it once
                shape_2 = (block.num_experts, hidden_size)
                down_bias = source.shard(f"{down_name}_bias", shape_2, one)[0]
        return _apart(gate_up.T), down.T, bias, down_bias

    if isinstance(names, PackedExpertNames):
        return lambda expert: packed(names, expert)
    return lambda expert: separate(names, expert)


def _apart(rows: torch.Tensor) -> torch.Tensor:
    """Return gate rows, then up rows, of rows that take turns."""
    return torch.cat([rows[0::2], rows[1::2]])
