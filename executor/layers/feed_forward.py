"""The gated MLP (SwiGLU), with this rank's columns.

Shape letters: T tokens, D hidden.
"""

import torch

from rankwright.cost_model.shards import column_range
from rankwright.executor.layers.linear import ColumnParallelLinear, Part, RowParallelLinear
from rankwright.executor.mesh import Mesh
from rankwright.executor.weights import Range, WeightSource
from rankwright.kernels.gated_linear import gated_linear


class GatedMlp:
    """`down(silu(gate(x)) * up(x))`; gate and up are one product (Shazeer, arXiv 2002.05202)."""

    def __init__(
        self,
        source: WeightSource,
        mesh: Mesh,
        *,
        prefix: str,
        hidden_size: int,
        intermediate_size: int,
        bias: bool,
        reduce: bool = True,
        whole: bool = False,
    ) -> None:
        """Load this rank's columns.

        Args:
            source: Where the weights come from.
            mesh: This rank's groups.
            prefix: Name of the block in the checkpoint.
            hidden_size: Of the model.
            intermediate_size: Of the whole block.
            bias: Whether the three products add one.
            reduce: Sum over the TP group; False: the caller does, with what it adds.
            whole: This rank has all columns, for tokens of its own.
        """
        columns = (0, intermediate_size) if whole else dense_columns(mesh, intermediate_size)
        self._gate_up = ColumnParallelLinear(
            source,
            (
                Part(f"{prefix}.gate_proj", intermediate_size, columns),
                Part(f"{prefix}.up_proj", intermediate_size, columns),
            ),
            hidden_size,
            bias=bias,
        )
        self._down = RowParallelLinear(
            source,
            mesh,
            f"{prefix}.down_proj",
            (hidden_size, intermediate_size),
            columns,
            bias=bias,
            reduce=reduce,
        )

    @property
    def first_weight(self) -> torch.Tensor:
        """What its input is multiplied with."""
        return self._gate_up.weight_CD

    def goes_before(self, next_weight: torch.Tensor) -> None:
        """Say what is multiplied with after it."""
        self._down.next_weight = next_weight

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return [T, D]; without `reduce`, this rank's part of it."""
        gate_up = self._gate_up
        return self._down(gated_linear(x_TD, gate_up.weight_CD, gate_up.bias_C))


def dense_columns(mesh: Mesh, intermediate_size: int) -> Range:
    """Return this rank's columns of a dense block or of the shared experts.

    In a model with experts the plan's columns are those of each expert, which moe_tp ranks share;
    a block without experts is cut over all ranks, by the rule that memory was counted with.
    """
    if mesh.place.experts == (0, 0):
        return mesh.place.ffn_columns
    return column_range(intermediate_size, mesh.tp.size, mesh.place.tp_rank)
