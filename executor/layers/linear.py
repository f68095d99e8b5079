"""Linear layers cut over the TP group.

Shape letters: T tokens, D hidden, C columns of a shard.
A column-parallel layer splits its outputs and needs no communication; a row-parallel layer splits
its inputs and sums its partial outputs over the group (Megatron-LM, arXiv 1909.08053, section 3).
A rank that holds all inputs, as with attention DP, has nothing to sum.
"""

from dataclasses import dataclass

import torch

from rankwright.executor.mesh import Mesh
from rankwright.executor.weights import Range, WeightSource
from rankwright.kernels.skinny_linear import skinny_linear


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one checkpoint tensor that a packed layer holds."""

    name: str
    whole_rows: int
    rows: Range


class ColumnParallelLinear:
    """`y_TC = x_TD W^T + b`: this rank's rows of one or more tensors, packed into one product.

    `next_weight` is what is multiplied with after it, if one product follows another.
    """

    next_weight: torch.Tensor | None = None

    def __init__(
        self, source: WeightSource, parts: tuple[Part, ...], num_inputs: int, *, bias: bool
    ) -> None:
        self.weight_CD = torch.cat(
            [
                source.shard(f"{part.name}.weight", (part.whole_rows, num_inputs), part.rows)
                for part in parts
            ]
        )
        self.bias_C = (
            torch.cat(
                [source.shard(f"{part.name}.bias", (part.whole_rows,), part.rows) for part in parts]
            )
            if bias
            else None
        )

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return [T, C]."""
        return skinny_linear(x_TD, self.weight_CD, self.bias_C, next_weight=self.next_weight)


class RowParallelLinear:
    """`y_TD = sum over ranks of x_TC W_c^T, + b`: this rank's columns of one tensor.

    `next_weight` is what is multiplied with after it, if one product follows another.
    """

    next_weight: torch.Tensor | None = None

    def __init__(
        self,
        source: WeightSource,
        mesh: Mesh,
        name: str,
        shape: tuple[int, int],
        columns: Range,
        *,
        bias: bool,
        reduce: bool = True,
    ) -> None:
        self._mesh = mesh
        is_whole = columns == (0, shape[1])
        self._reduce = reduce and not is_whole
        self.weight_DC = source.shard(f"{name}.weight", shape, None, columns)
        # The sum over ranks must hold the bias once.
        self.bias_D = None
        if bias and (is_whole or mesh.place.tp_rank == 0):
            self.bias_D = source.shard(f"{name}.bias", (shape[0],))

    def __call__(self, x_TC: torch.Tensor) -> torch.Tensor:
        """Return [T, D], equal on every rank of the group; without `reduce`, this rank's part."""
        y_TD = self._part(x_TC)
        return self._mesh.sum_tokens(y_TD) if self._reduce else y_TD

    def _part(self, x_TC: torch.Tensor) -> torch.Tensor:
        """Return this rank's part, computed where the sum over the ranks will read it."""
        out_TD = self._mesh.part(len(x_TC), len(self.weight_DC), x_TC.dtype)
        return skinny_linear(
            x_TC, self.weight_DC, self.bias_D, out_TD, next_weight=self.next_weight
        )
