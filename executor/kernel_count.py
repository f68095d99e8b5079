"""How many Triton kernels this process has compiled or found in the cache, and in how long."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

try:
    from triton import knobs
except ImportError:  # macOS and Windows have no Triton wheels
    knobs = None


@dataclass
class _Tally:
    number: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.number} in {self.seconds:.2f} s"


class KernelCount:
    """Counts from now on: the versions of each kernel, one a set of constants and of arguments."""

    def __init__(self) -> None:
        """Ask Triton to tell of every kernel that it makes or reads."""
        self._compiled: defaultdict[str, _Tally] = defaultdict(_Tally)
        self._read = _Tally()
        if knobs is not None:
            knobs.compilation.listener = self._note

    def _note(self, *, metadata: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        tally = self._read if cache_hit else self._compiled[metadata["name"]]
        tally.number += 1
        tally.seconds += times.total * 1e-6

    def __str__(self) -> str:
        """Say how many were compiled and how many read."""
        made = self._compiled.values()
        total = _Tally(sum(one.number for one in made), sum(one.seconds for one in made))
        return f"compiled {total}, read {self._read}"

    def by_kernel(self) -> list[str]:
        """Return a line for each kernel that was compiled, the slowest first."""
        order = sorted(self._compiled.items(), key=lambda item: -item[1].seconds)
        return [f"{name}: {tally}" for name, tally in order]
