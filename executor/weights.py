"""Where weights come from: safetensors read shard by shard, or random ones for benchmarks.

A layer asks its source for the rows and columns its rank holds, so that no rank ever holds a whole
tensor that it shares, and host memory holds one shard at a time. What is stored in 8 or 4 bits is
widened on its way (`dequantize.py`).
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from rankwright.executor.dequantize import View, read_mxfp4, read_scaled, scale_block
from rankwright.executor.shard_reader import Range as Range
from rankwright.executor.shard_reader import SafetensorsFile, ShardReader
from rankwright.executor.tensor_formats import scale_names


class WeightSource(Protocol):
    """Hands out one shard of a named tensor."""

    def shard(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: Range | None = None,
        columns: Range | None = None,
        depth: Range | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return rows and columns of the tensor `name`, whose whole shape is `shape`.

        Args:
            name: Name in the checkpoint.
            shape: Shape that the model needs; another one in the checkpoint is an error.
            rows: Half-open range of dim 0; None: all.
            columns: Half-open range of dim 1; None: all.
            depth: Half-open range of dim 2; None: all.
            dtype: In place of the target dtype.

        Returns:
            The shard on the target device in the target dtype, owning its memory.
        """
        ...


class SafetensorsSource:
    """Shards of a Hugging Face folder: `model.safetensors`, or several with an index.

    Args:
        folder: Where the files are.
        dtype: What the weights are converted to.
        device: Where they go.
        num_threads: That read at once; None: this rank's share of the CPUs.

    Raises:
        ValueError: The folder has no safetensors, or the index names a file that is missing.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        *,
        num_threads: int | None = None,
    ) -> None:
        self._folder = folder
        self._dtype = dtype
        self._device = device
        self._file_of = _tensor_files(folder)
        self._reader = ShardReader(device, num_threads)
        self._open: dict[Path, SafetensorsFile] = {}
        # On a GPU the reader's pinned buffers have not run yet: there they have to be asked for.
        asked = os.environ.get("RANKWRIGHT_PINNED_LOAD") == "1"
        self._mapped: dict[Path, safe_open] = {}
        self._through_library = device.type != "cpu" and not asked
        self._scale_block: tuple[int | None, int | None] | None = None

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of that name."""
        return name in self._file_of

    def shard(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: Range | None = None,
        columns: Range | None = None,
        depth: Range | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return rows and columns of the tensor `name`; see `WeightSource.shard`.

        Raises:
            ValueError: The checkpoint has no such tensor, or of another shape.
        """
        dtype = dtype or self._dtype
        if name not in self._file_of and f"{name}_blocks" in self._file_of:
            return self._mxfp4(name, shape, (rows, columns, depth), dtype)
        stored = self._file(name).tensors[name]
        if stored.shape != shape:
            raise ValueError(
                f"{self._file_of[name]}: tensor {name!r} has shape {stored.shape}, config.json "
                f"asks for {shape}"
            )
        if stored.dtype.itemsize == 1:
            return self._scaled(name, shape, rows, columns, dtype)
        return self._read(name, (rows, columns, depth)[: len(shape)], dtype)

    def _file(self, name: str) -> SafetensorsFile:
        path = self._file_of.get(name)
        if path is None:
            raise ValueError(
                f"{self._folder}: no tensor {name!r} among {len(self._file_of)}; the checkpoint is "
                "of another architecture than its config.json says, or incomplete"
            )
        if path not in self._open:
            self._open[path] = SafetensorsFile(path)
        return self._open[path]

    def _read(self, name: str, parts: Sequence[Range | None], dtype: torch.dtype) -> torch.Tensor:
        file = self._file(name)
        if self._through_library:
            if file.path not in self._mapped:
                self._mapped[file.path] = safe_open(str(file.path), framework="pt")
            index = tuple(slice(*part) if part else slice(None) for part in parts)
            part = self._mapped[file.path].get_slice(name)[index]
            return part.to(self._device, dtype, copy=True).contiguous()
        return self._reader.read(file, name, parts, dtype)

    def _view(self, name: str) -> View:
        """Return a tensor as it is stored, of which parts can be read to the device."""
        stored = self._file(name).tensors[name]
        return View(stored.shape, lambda *parts: self._read(name, parts, stored.dtype))

    def _scaled(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: Range | None,
        columns: Range | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if self._scale_block is None:
            self._scale_block = scale_block(self._folder)
        names = scale_names(name)
        scale = next((one for one in names if one in self._file_of), names[0])
        return read_scaled(
            self._view(name),
            self._view(scale),
            rows or (0, shape[0]),
            columns or (0, shape[1]),
            block=self._scale_block,
            dtype=dtype,
            where=f"{self._file_of[name]}: tensor {name!r}",
        )

    def _mxfp4(
        self,
        name: str,
        shape: tuple[int, ...],
        parts: tuple[Range | None, ...],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        experts, inputs, outputs = (
            part or (0, whole) for part, whole in zip(parts, shape, strict=True)
        )
        blocks, scales = self._view(f"{name}_blocks"), self._view(f"{name}_scales")
        return read_mxfp4(blocks, scales, experts, inputs, outputs, dtype=dtype)

    def close(self) -> None:
        """Close the files; what was read stays."""
        self._reader.close()
        for file in self._open.values():
            file.close()
        self._open.clear()
        self._mapped.clear()


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor in `folder`."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: folder / file for name, file in names.items()}
        for path in sorted(set(files.values())):
            if not path.exists():
                raise ValueError(f"{index} names {path.name}, which is missing; download it again")
        return files
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(path), framework="pt") as opened:
                files.update(dict.fromkeys(opened.keys(), path))
        except Exception as error:  # safetensors raises its own SafetensorError, and OSError
            raise ValueError(f"{path} is no readable safetensors file: {error}") from error
    if not files:
        raise ValueError(
            f"{folder} holds no .safetensors file; give a Hugging Face model folder, or "
            "--load-format dummy for random weights"
        )
    return files


class DummySource:
    """Random weights of the right shapes, made on the device: speed is real, text is not.

    Values are small and the norms are one, so that activations stay finite through many layers.
    """

    # Width of GPT-2's initialisation (Radford et al. 2019, section 2.3), usual for decoders.
    STANDARD_DEVIATION = 0.02
    # As of `torch.nn.Embedding`. With 0.02 what attention adds to every token of a prompt outweighs
    # the token itself: from the second layer on they all chose the same 8 to 16 of 128 experts.
    EMBEDDING_DEVIATION = 1.0

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self._dtype = dtype
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def __contains__(self, name: str) -> bool:
        """Every tensor can be made up."""
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
        """Return random rows and columns; see `WeightSource.shard`."""
        extent = shard_shape(shape, rows, columns, depth)
        tensor = torch.empty(extent, dtype=dtype or self._dtype, device=self._device)
        if "norm" in name:
            return tensor.fill_(1.0)
        deviation = self.EMBEDDING_DEVIATION if "embed" in name else self.STANDARD_DEVIATION
        return tensor.normal_(0, deviation, generator=self._generator)


def shard_shape(shape: tuple[int, ...], *parts: Range | None) -> list[int]:
    """Return the shape of a shard of a tensor of `shape`: of each dim the part, None being all.

    >>> shard_shape((8, 4), (2, 5), None, None)
    [3, 4]
    """
    return [
        whole if part is None else part[1] - part[0]
        for whole, part in zip(shape, parts, strict=False)
    ]
