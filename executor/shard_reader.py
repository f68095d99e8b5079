"""Reads parts of tensors out of safetensors files, with several threads, straight to their place.

safetensors' own reader maps the file: one thread then takes a page fault for every few pages, and
on a GPU copies out of memory that the driver cannot read by itself. Here a tensor is cut into
pieces of rows. A piece whose bytes stand together in the file is read by one `preadv` into the
memory of the result; one of columns is copied out of the mapped file, which touches no page that
holds none of them. Both release Python's lock. For a device, pieces pass through a few buffers that
are used over and over (pinned ones beside a GPU), so that one is read while another is copied.

Format: 8 bytes of length, a JSON header of names, dtypes, shapes and offsets, then the data
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

Range = tuple[int, int]
Bytes = npt.NDArray[np.uint8]

# Of one read: long enough that threads and calls cost nothing beside it, short enough that a matrix
# of 50 MB is shared out over all threads and that buffers stay in a core's cache.
PIECE_BYTES = 4 * 2**20
# More threads than that find memory busy.
MOST_THREADS = 8
# Of each thread: one is filled while the other is copied to the device.
NUM_BUFFERS = 2

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file: its type, its shape and where its first byte is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class SafetensorsFile:
    """An open file and what is in it.

    Args:
        path: The file.

    Attributes:
        tensors: What it holds.
        close: Closes it, if nothing has yet; what is mapped goes with its last user.

    Raises:
        ValueError: It is no whole safetensors file, or holds a type that PyTorch has not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(str(path), framework="pt"):
                pass  # safetensors checks the header against the length of the file
        except Exception as error:  # safetensors raises its own SafetensorError, and OSError
            raise ValueError(f"{path} is no readable safetensors file: {error}") from error
        self._number = os.open(path, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, self._number)
        length = int.from_bytes(os.pread(self._number, 8, 0), "little")
        header = json.loads(os.pread(self._number, length, 8))
        header.pop("__metadata__", None)
        self.tensors = {
            name: StoredTensor(
                self._dtype(name, entry["dtype"]),
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
        self._mapped: Bytes | None = None

    def _dtype(self, name: str, stored: str) -> torch.dtype:
        found = _DTYPES.get(stored)
        if found is None:
            raise ValueError(
                f"{self.path}: tensor {name!r} is of type {stored}; expected one of "
                f"{', '.join(_DTYPES)}"
            )
        return found

    def fill(self, target: Bytes, offset: int) -> None:
        """Read as many bytes as `target` has, from `offset` on.

        Raises:
            ValueError: The file has become shorter.
        """
        view = target.data
        while view:
            count = os.preadv(self._number, [view], offset)
            if count == 0:
                raise ValueError(f"{self.path} ends at byte {offset}; it was cut while being read")
            view, offset = view[count:], offset + count

    def rows_of(self, tensor: StoredTensor) -> Bytes:
        """Return the mapped bytes of a tensor in its shape, the last axis as bytes."""
        if self._mapped is None:
            mapping = mmap.mmap(self._number, 0, access=mmap.ACCESS_READ)
            self._mapped = np.frombuffer(mapping, dtype=np.uint8)
        *outer, last = tensor.shape
        count = math.prod(tensor.shape) * tensor.dtype.itemsize
        flat = self._mapped[tensor.offset : tensor.offset + count]
        return flat.reshape(*outer, last * tensor.dtype.itemsize)


class ShardReader:
    """Reads parts of tensors to one device.

    Args:
        device: Where they go.
        num_threads: That read at once; None: a share of the CPUs, for each rank of this machine.
    """

    def __init__(self, device: torch.device, num_threads: int | None = None) -> None:
        self._device = device
        self.num_threads = default_threads() if num_threads is None else num_threads
        self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="weights")
        self._local = threading.local()

    def read(
        self, file: SafetensorsFile, name: str, ranges: Sequence[Range | None], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return a part of a tensor, on the device.

        Args:
            file: That holds it.
            name: Of the tensor.
            ranges: Half-open range of each axis; None: all of it.
            dtype: Of the result.
        """
        stored = file.tensors[name]
        chosen = [
            (0, length) if part is None else part
            for part, length in zip(ranges, stored.shape, strict=True)
        ]
        out = torch.empty(
            [stop - start for start, stop in chosen], dtype=dtype, device=self._device
        )
        if out.numel() == 0:
            return out
        if not chosen:  # a number is a row of one
            stored, chosen = replace(stored, shape=(1,)), [(0, 1)]
        target = out.view(1) if out.dim() == 0 else out
        step = max(1, PIECE_BYTES // (target[0].numel() * stored.dtype.itemsize))

        def read_rows(start: int) -> None:
            piece = target[start : start + step]
            first = chosen[0][0] + start
            here = [(first, first + len(piece)), *chosen[1:]]
            if self._device.type == "cpu" and dtype == stored.dtype:
                _read(file, stored, here, _bytes_of(piece))
            else:
                self._pass_on(file, stored, here, piece)

        starts = range(0, len(target), step)
        if len(starts) == 1:
            read_rows(0)
        else:
            for _ in self._pool.map(read_rows, starts):
                pass
        return out

    def _pass_on(
        self, file: SafetensorsFile, stored: StoredTensor, here: list[Range], piece: torch.Tensor
    ) -> None:
        """Read to a buffer of this thread, and from there to `piece`."""
        if not hasattr(self._local, "buffers"):
            pinned = self._device.type == "cuda"
            self._local.buffers = deque(_Buffer(pinned=pinned) for _ in range(NUM_BUFFERS))
        buffer: _Buffer = self._local.buffers[0]
        self._local.buffers.rotate(-1)
        host = buffer.take(piece.numel() * stored.dtype.itemsize)
        _read(file, stored, here, host.numpy())
        piece.copy_(host.view(stored.dtype).view(piece.shape), non_blocking=True)
        buffer.copies(self._device)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


class _Buffer:
    """Host memory that is read into, and when the copy out of it is over."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return uint8 memory that nobody reads any more."""
        if self._copied is not None:
            self._copied.synchronize()
        if len(self._memory) < num_bytes:
            size = max(num_bytes, PIECE_BYTES)
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        return self._memory[:num_bytes]

    def copies(self, device: torch.device) -> None:
        """Note that a copy to `device` has been started."""
        if self._pinned:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(device))


def default_threads() -> int:
    """Return a rank's share of the CPUs that it may use, `MOST_THREADS` at most."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MOST_THREADS, max(1, cpus // ranks))


def _read(file: SafetensorsFile, stored: StoredTensor, here: list[Range], target: Bytes) -> None:
    """Fill `target` with the ranges `here` of a tensor."""
    item = stored.dtype.itemsize
    if all(part == (0, length) for part, length in zip(here[1:], stored.shape[1:], strict=True)):
        file.fill(target, stored.offset + here[0][0] * math.prod(stored.shape[1:]) * item)
        return
    *outer, (first, stop) = here
    part = file.rows_of(stored)[(*(slice(*one) for one in outer), slice(first * item, stop * item))]
    np.copyto(target.reshape(part.shape), part)


def _bytes_of(tensor: torch.Tensor) -> Bytes:
    """Return the bytes of a contiguous host tensor, which share its memory."""
    found: Bytes = tensor.view(-1).view(torch.uint8).numpy()
    return found
