"""The gated MLP (SwiGLU), with this rank's columns.

Shape letters: T tokens, D hidden.
"""

import torch

from rankwright.executor.layers.linear import ColumnParallelLinear, Part, RowParallelLinear
from rankwright.executor.mesh import Mesh
from rankwright.executor.weights import WeightSource
from rankwright.kernels.swiglu import swiglu


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
    ) -> None:
        columns = mesh.place.ffn_columns
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
        )

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return [T, D]."""
        return self._down(swiglu(self._gate_up(x_TD)))
