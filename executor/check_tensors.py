"""Whether a checkpoint holds what the model needs, from the headers of its files, without torch.

Read before any process starts: a truncated download, a tensor that is missing or of another shape,
or a number format that cannot be read costs a second, and not the time to load all before it.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rankwright.cost_model.model_spec import ModelSpec, WeightDtypes
from rankwright.cost_model.read_model import read_model
from rankwright.executor.models.expected import expected_tensors
from rankwright.executor.tensor_formats import (
    ITEM_BYTES,
    MXFP4_GROUP,
    PLAIN,
    SCALED,
    SCALES,
    scale_names,
)

# The format's own limit (safetensors, `MAX_HEADER_SIZE`).
_MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a header names it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def check_tensors(spec: ModelSpec, files: Sequence[Path]) -> None:
    """Return if `files` hold every tensor of `spec` in a form that can be read.

    Raises:
        ValueError: A file is truncated or no safetensors file, or a tensor is missing, of another
            shape, or in a format that the executor cannot read; names it.
    """
    stored: dict[str, Stored] = {}
    for path in files:
        stored.update(read_header(path))
    quantised = cache(lambda: read_model(files[0].parent).weight_dtypes)
    missing: list[str] = []
    for name, shape in expected_tensors(spec):
        found = stored.get(name)
        if found is not None:
            _check_stored(name, shape, found, stored, quantised)
        elif f"{name}_blocks" in stored:
            _check_blocks(name, shape, stored)
        else:
            missing.append(name)
    if missing:
        raise ValueError(
            f"{files[0].parent} lacks {len(missing)} of the tensors that its config.json asks for, "
            f"first {missing[0]!r}; it is incomplete, or of another architecture than that says"
        )


def read_header(path: Path) -> dict[str, Stored]:
    """Return the tensors in the safetensors file `path`.

    Raises:
        ValueError: It is none, or shorter or longer than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MOST_HEADER_BYTES, size - 8):
            raise ValueError(f"{path} is no safetensors file, or truncated; download it again")
        text = file.read(length)
    stored: dict[str, Stored] = {}
    places: list[tuple[int, int, str]] = []
    try:
        entries: dict[str, dict[str, Any]] = json.loads(text)
        for name, entry in entries.items():
            if name != "__metadata__":
                stored[name] = Stored(path, str(entry["dtype"]), tuple(map(int, entry["shape"])))
                start, stop = map(int, entry["data_offsets"])
                places.append((start, stop, name))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise ValueError(f"{path} has a header that is none; download it again") from None
    whole = 8 + length + max((stop for _, stop, _ in places), default=0)
    if whole != size:
        raise ValueError(
            f"{path} has {size:,} bytes, and its header asks for {whole:,}: it is truncated or "
            "corrupt; download it again"
        )
    _check_places(path, places, stored)
    return stored


def _check_places(
    path: Path, places: list[tuple[int, int, str]], stored: dict[str, Stored]
) -> None:
    """Check that tensors stand one behind the other, each in as many bytes as it needs."""
    end = 0
    for start, stop, name in sorted(places):
        tensor = stored[name]
        item = ITEM_BYTES.get(tensor.dtype)
        wrong = item is not None and stop - start != item * math.prod(tensor.shape)
        if start != end or stop < start or min(tensor.shape, default=0) < 0 or wrong:
            raise ValueError(
                f"{path} has a header that contradicts itself: tensor {name!r}, {tensor.dtype} of "
                f"{tensor.shape}, in bytes {start:,} to {stop:,}; download it again"
            )
        end = stop


def _check_stored(
    name: str,
    shape: tuple[int, ...],
    found: Stored,
    stored: dict[str, Stored],
    quantised: Callable[[], WeightDtypes],
) -> None:
    if found.shape != shape:
        raise ValueError(
            f"{found.path}: tensor {name!r} has shape {found.shape}, config.json asks for {shape}"
        )
    if found.dtype in PLAIN:
        return
    if found.dtype not in SCALED:
        raise ValueError(
            f"{found.path}: tensor {name!r} is stored as {found.dtype}, which the executor cannot "
            f"read; it reads {', '.join((*PLAIN, *SCALED))} and MXFP4"
        )
    scales = scale_names(name)
    scale = next((stored[each] for each in scales if each in stored), None)
    if scale is None:
        raise ValueError(
            f"{found.path}: tensor {name!r} is stored as {found.dtype} without its scale, "
            f"{' or '.join(scales)}; the checkpoint is incomplete"
        )
    _check_scale(name, found, scale, quantised())


def _check_scale(name: str, found: Stored, scale: Stored, dtypes: WeightDtypes) -> None:
    """Check that there is one scale, or one for each block that the folder's config names."""
    if dtypes.method is None:
        raise ValueError(
            f"{found.path}: tensor {name!r} is stored as {found.dtype}, and config.json has no "
            "quantization_config that says what its scales are for"
        )
    if scale.dtype not in SCALES:
        raise ValueError(
            f"{scale.path}: the scale of {name!r} is stored as {scale.dtype}; expected one of "
            f"{', '.join(SCALES)}"
        )
    if len(found.shape) < 2:
        raise ValueError(
            f"{found.path}: tensor {name!r} of {found.shape} is stored as {found.dtype}; the "
            "executor reads only matrices in 8 bits"
        )
    count, (rows, columns) = math.prod(scale.shape), found.shape[-2:]
    grid = -(-rows // (dtypes.scale_rows or rows)), -(-columns // (dtypes.scale_group or columns))
    if count not in (1, math.prod((*found.shape[:-2], *grid))):
        raise ValueError(
            f"{scale.path}: the scales of {name!r} have shape {scale.shape}, quantization_config "
            f"in config.json asks for {grid[0]} x {grid[1]}"
        )


def _check_blocks(name: str, shape: tuple[int, ...], stored: dict[str, Stored]) -> None:
    """Check MXFP4: [experts, outputs, groups of inputs, 16 bytes], and a scale for each group."""
    experts, inputs, outputs = shape
    groups = -(-inputs // MXFP4_GROUP)
    wanted = {
        f"{name}_blocks": (experts, outputs, groups, MXFP4_GROUP // 2),
        f"{name}_scales": (experts, outputs, groups),
    }
    for part, extent in wanted.items():
        found = stored.get(part)
        if found is None or found.shape != extent or found.dtype != "U8":
            is_there = "is missing" if found is None else f"is {found.dtype} of {found.shape}"
            raise ValueError(
                f"{stored[f'{name}_blocks'].path}: MXFP4 tensor {part!r} {is_there}, config.json "
                f"asks for U8 of {extent}"
            )
