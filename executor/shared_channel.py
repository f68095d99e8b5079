"""Messages from one process to others of the same machine, through memory that they share.

A step batch is small and every rank waits for it before each step, so what counts is latency. The
writer copies the message into a ring of slots and counts it; readers look at the counter, and take
it when it moves: no socket, and no thread to wake. Those that sleep are woken by a `Bell`.

The memory is a file that is unlinked as soon as everybody has mapped it, so nothing is left behind
however a process ends. Stores are seen in order on x86-64 only, which `is_supported` asks for.
"""

import mmap
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rankwright.executor.bell import Bell

NUM_SLOTS = 32
# A decode step of 256 sequences of 32 blocks each; a longer message takes several slots.
SLOT_BYTES = 65536
# A reader that sleeps looks this often whether the writer still lives.
LOOK_S = 1.0
# Longest sleep of a writer between two looks whether the ring has room.
NAP_S = 0.0005
_HEADER_WORDS = 2  # sequence number, bytes of the message still to come with this slot's
_FOLDER = Path("/dev/shm")


def is_supported() -> bool:
    """Return whether this machine keeps the order of stores and has memory files."""
    return platform.machine() == "x86_64" and _FOLDER.is_dir()


class SharedChannel:
    """One end of a channel: made by the writer, opened by each reader.

    Args:
        path: File of the ring.
        num_readers: Readers in all.
        reader: Which of them this is; None: the writer.
        spin_s: How long to look without sleeping: right where a core can be spared, as beside a
            GPU; 0 where ranks compute on the cores themselves.
        timeout_s: Silence after which the other side is given up.
    """

    def __init__(
        self,
        path: Path,
        num_readers: int,
        reader: int | None,
        *,
        spin_s: float = 0.0,
        timeout_s: float = 600.0,
    ) -> None:
        self._reader = reader
        self._spin_s = spin_s
        self._timeout_s = timeout_s
        words = 2 + num_readers + NUM_SLOTS * _HEADER_WORDS
        with path.open("r+b") as file:
            if reader is None:
                file.truncate(words * 8 + NUM_SLOTS * SLOT_BYTES)
            self._memory = mmap.mmap(file.fileno(), 0)
        numbers = np.frombuffer(self._memory, dtype=np.int64, count=words)
        self._writer_pid = numbers[:1]
        self._bell = Bell(numbers[1:2].view(np.int32)[:1])
        self._read = numbers[2 : 2 + num_readers]  # messages that each reader has taken
        self._headers = numbers[2 + num_readers :].reshape(NUM_SLOTS, _HEADER_WORDS)
        self._bodies = memoryview(self._memory)[words * 8 :]
        self._count = 0
        if reader is None:
            self._writer_pid[0] = os.getpid()

    @classmethod
    def create(cls, num_readers: int, *, spin_s: float = 0.0) -> "tuple[SharedChannel, Path]":
        """Return the writer's end and the file for the readers; unlink it once they have opened."""
        number, name = tempfile.mkstemp(prefix="rankwright-", dir=_FOLDER)
        os.close(number)
        return cls(Path(name), num_readers, None, spin_s=spin_s), Path(name)

    def write(self, data: bytes) -> None:
        """Give `data` to every reader; waits only when the ring is full.

        Raises:
            TimeoutError: A reader has not read for `timeout_s`.
        """
        for first in range(0, max(len(data), 1), SLOT_BYTES):
            self._wait(lambda: int(self._read.min()) > self._count - NUM_SLOTS, "a reader")
            slot = self._count % NUM_SLOTS
            part = data[first : first + SLOT_BYTES]
            self._bodies[slot * SLOT_BYTES : slot * SLOT_BYTES + len(part)] = part
            self._headers[slot, 1] = len(data) - first
            # Last: a reader that sees the number sees the rest.
            self._headers[slot, 0] = self._count + 1
            self._count += 1
            self._bell.ring(self._count)

    def read(self) -> bytes:
        """Return the next message.

        Raises:
            TimeoutError: There was none for `timeout_s`.
            ConnectionError: The writer's process is gone.
        """
        assert self._reader is not None
        parts: list[bytes] = []
        while True:
            slot = self._count % NUM_SLOTS
            self._wait(self.has_next, "the leader")
            left = int(self._headers[slot, 1])
            size = min(left, SLOT_BYTES)
            parts.append(bytes(self._bodies[slot * SLOT_BYTES : slot * SLOT_BYTES + size]))
            self._count += 1
            self._read[self._reader] = self._count
            if left <= SLOT_BYTES:
                return b"".join(parts)

    def has_next(self) -> bool:
        """Whether `read` would return at once."""
        return int(self._headers[self._count % NUM_SLOTS, 0]) == self._count + 1

    def _wait(self, ready: Callable[[], bool], who: str) -> None:
        started = looked = time.monotonic()
        while True:
            rung = self._bell.count  # before the look: a message after it ends the sleep
            if ready():
                return
            now = time.monotonic()
            if now - started <= self._spin_s:
                continue
            if self._reader is None:
                time.sleep(min(NAP_S, (now - started) / 4))
            else:
                self._bell.wait(rung, LOOK_S)
                now = time.monotonic()
            if now - looked >= LOOK_S:
                looked = now
                if self._reader is not None and not Path(f"/proc/{self._writer_pid[0]}").exists():
                    raise ConnectionError("the leader's process is gone")
                if now - started > self._timeout_s:
                    raise TimeoutError(f"{who} said nothing for {self._timeout_s:.0f} s")
