"""Weights that a checkpoint stores in 8 or 4 bits, widened shard by shard as they load.

What the executor holds and multiplies is the wide form: the memory of the plan is that of the wide
form too (`cost_model/held_weights.py`). Activations are not quantised, so results are those of the
checkpoint's weights, and a little nearer to the original model's than engines get that multiply in
FP8.
Shape letters: R rows (outputs) of a shard, C its columns (inputs), E experts, G groups of inputs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from rankwright.cost_model.read_model import read_model
from rankwright.executor.tensor_formats import MXFP4_GROUP

Range = tuple[int, int]

# E2M1: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats v1.0, table 5).
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_BIAS = 127  # of the E8M0 scales


@dataclass(frozen=True, slots=True)
class View:
    """A tensor in a file.

    Args:
        shape: Its whole shape.
        read: Returns a part of it on the device, as stored, from a range of each axis.
    """

    shape: tuple[int, ...]
    read: Callable[..., torch.Tensor]

    def all(self) -> torch.Tensor:
        """Return all of it, in float32."""
        return self.read(*(None for _ in self.shape)).to(torch.float32)


def read_scaled(
    weight: View,
    scale: View,
    rows: Range,
    columns: Range,
    *,
    block: tuple[int | None, int | None],
    dtype: torch.dtype,
    where: str,
) -> torch.Tensor:
    """Return rows and columns of a matrix that is stored with scales, [R, C].

    Args:
        weight: The whole matrix, in 8 bits.
        scale: Its scales: one, or one for each block.
        rows: Half-open.
        columns: Half-open.
        block: Rows and columns that share a scale, as the config says; None: all.
        dtype: Of the result.
        where: Name for errors.

    Raises:
        ValueError: There are not as many scales as there should be.
    """
    values_RC = weight.read(rows, columns).to(torch.float32)
    whole_rows, whole_columns = weight.shape
    height, width = block[0] or whole_rows, block[1] or whole_columns
    grid = (-(-whole_rows // height), -(-whole_columns // width))
    count = math.prod(scale.shape)
    if count == 1:
        return (values_RC * scale.all()).to(dtype)
    if count != grid[0] * grid[1]:
        raise ValueError(
            f"{where}: scales of shape {scale.shape} for a matrix of {whole_rows} x "
            f"{whole_columns}; quantization_config in config.json asks for {grid[0]} x {grid[1]}"
        )
    scales = scale.all().view(grid)
    row = torch.arange(*rows, device=scales.device) // height
    column = torch.arange(*columns, device=scales.device) // width
    return (values_RC * scales[row][:, column]).to(dtype)


def read_mxfp4(
    blocks: View,
    scales: View,
    experts: Range,
    inputs: Range,
    outputs: Range,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return a part of experts that are stored as MXFP4, [experts, inputs, outputs].

    Args:
        blocks: uint8 [E, outputs, G, 16]: two values a byte, the first in the lower half.
        scales: uint8 [E, outputs, G]: exponents.
        experts: Half-open.
        inputs: Half-open; whole groups are read, and cut.
        outputs: Half-open.
        dtype: Of the result.
    """
    first_group, stop_group = inputs[0] // MXFP4_GROUP, -(-inputs[1] // MXFP4_GROUP)
    part = (experts, outputs, (first_group, stop_group))
    packed = blocks.read(*part, None)
    exponents = scales.read(*part).to(torch.int32) - _EXPONENT_BIAS
    halves = torch.stack([packed & 0x0F, packed >> 4], dim=-1).flatten(-2).to(torch.int32)
    positive = torch.tensor(_FP4_VALUES, device=packed.device)
    values = torch.cat([positive, -positive])[halves]
    # A power of two: exact, also where it and the value would not fit into `dtype` apart.
    wide = torch.ldexp(values, exponents.unsqueeze(-1)).flatten(-2)
    start = inputs[0] - first_group * MXFP4_GROUP
    wide = wide[..., start : start + inputs[1] - inputs[0]]
    return wide.transpose(1, 2).to(dtype).contiguous()


def scale_block(folder: Path) -> tuple[int | None, int | None]:
    """Return how many rows and columns of a matrix share a scale, by the folder's `config.json`.

    Raises:
        ValueError: It is malformed, or says nothing of scales.
    """
    dtypes = read_model(folder).weight_dtypes
    if dtypes.method is None:
        raise ValueError(
            f"{folder} stores weights in 8 bits, and its config.json has no quantization_config"
        )
    return dtypes.scale_rows, dtypes.scale_group
