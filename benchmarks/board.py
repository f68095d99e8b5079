"""What a board does while something runs on it: clock, power, temperature and what limits it.

NVML is asked every 20 ms by a thread of its own. Rates at a power limit are only as equal as the
clocks under which they were taken, so a benchmark that compares two of them says both.
"""

import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

PERIOD_S = 0.02
# What is seen of the last so many seconds is told, as that is what was timed.
LAST_S = 0.5
_REASONS = "nvmlClocksEventReason"

Facts = dict[str, Any]


class Board:
    """One GPU as NVML sees it, or nothing where NVML cannot be asked."""

    def __init__(self, uuid: str | None, nvml: Any = None) -> None:
        """Open a GPU.

        Args:
            uuid: As NVML and CUDA have it, `GPU-...`; None: there is none.
            nvml: Stands in for the module `pynvml`.
        """
        self.why_not: str | None = None
        self._handle: Any = None
        self._nvml: Any = nvml
        try:
            if uuid is None:
                raise ValueError("no GPU")
            if nvml is None:
                self._nvml = import_module("pynvml")  # without types of its own
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        except Exception as error:  # NVML's own errors are made at run time, by code
            self.why_not = f"{type(error).__name__}: {error}"

    def watch(self, work: Callable[[], float]) -> tuple[float, Facts]:
        """Return what `work` returns, and what was seen of the board while it ended."""
        if self._handle is None:
            return work(), {"not_seen": self.why_not}
        seen: list[tuple[float, Facts]] = []
        ended = threading.Event()

        def look() -> None:
            while not ended.is_set():
                seen.append((time.monotonic(), self._look()))
                ended.wait(PERIOD_S)

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            result = work()
        finally:
            ended.set()
            watcher.join()
        return result, summary(seen)

    def _look(self) -> Facts:
        nvml, handle = self._nvml, self._handle
        asks: dict[str, Callable[[], Any]] = {
            "sm_hz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6,
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "energy_j": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(
                handle, nvml.NVML_TEMPERATURE_GPU
            ),
            "limited_by": lambda: self._reasons(
                nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
            ),
        }
        found: Facts = {}
        for what, ask in asks.items():
            with suppress(Exception):  # a board that lacks one of them still tells the others
                found[what] = ask()
        return found

    def _reasons(self, bits: int) -> list[str]:
        named = {
            name.removeprefix(_REASONS): getattr(self._nvml, name)
            for name in dir(self._nvml)
            if name.startswith(_REASONS)
        }
        return sorted(name for name, bit in named.items() if bit.bit_count() == 1 and bits & bit)


def summary(seen: list[tuple[float, Facts]]) -> Facts:
    """Return median clock and temperature, mean power, and all limits of the last `LAST_S`.

    Power is that of the energy counter where the board has one: a reading of power is itself the
    mean of up to a second.

    Args:
        seen: When, in seconds, and what was seen then.
    """
    last = [(at_s, facts) for at_s, facts in seen if at_s >= seen[-1][0] - LAST_S]
    told: Facts = {"looks": len(last)}
    for what in ("sm_hz", "temperature_c"):
        values = [facts[what] for _, facts in last if what in facts]
        if values:
            told[what] = statistics.median(values)
    clocks = [facts["sm_hz"] for _, facts in last if "sm_hz" in facts]
    if clocks:
        told["sm_hz_range"] = [min(clocks), max(clocks)]
    energies = [(at_s, facts["energy_j"]) for at_s, facts in last if "energy_j" in facts]
    powers = [facts["power_w"] for _, facts in last if "power_w" in facts]
    if len(energies) > 1 and energies[-1][1] > energies[0][1]:
        (from_s, from_j), (to_s, to_j) = energies[0], energies[-1]
        told["power_w"] = round((to_j - from_j) / (to_s - from_s), 1)
    elif powers:
        told["power_w"] = round(statistics.mean(powers), 1)
    limits = {name for _, facts in last for name in facts.get("limited_by", ())}
    told["limited_by"] = sorted(limits - {"None", "GpuIdle"})
    return told
