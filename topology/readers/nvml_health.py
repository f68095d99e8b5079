"""What keeps a GPU below its data sheet, as NVML tells it: limits, slowdowns, faults."""

from collections.abc import Callable
from typing import Any

# nvmlClocksEventReasons of nvml.h that a machine's owner can do something about.
_SLOWDOWNS = {
    0x08: "hardware slowdown",
    0x20: "too hot (software thermal slowdown)",
    0x40: "too hot (hardware thermal slowdown)",
    0x80: "power brake of the power supply",
}

# Limits a few watts below the default are set by vendors; the clocks hardly feel them.
_NOTABLE_POWER = 0.97

Ask = Callable[..., Any]


def health_notes(nvml: Any, ask: Ask, index: int, handle: Any) -> list[str]:
    """Return a note on each limit or fault of one GPU; what the driver does not tell is no note.

    Args:
        nvml: The binding.
        ask: Calls a function of it, None where this GPU or driver does not support it.
        index: Of the GPU, for the notes.
        handle: Of the GPU.
    """
    notes: list[str] = []
    limit = ask(nvml, nvml.nvmlDeviceGetPowerManagementLimit, handle)  # mW
    default = ask(nvml, nvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
    if limit and default and limit < _NOTABLE_POWER * default:
        notes.append(
            f"GPU {index} is limited to {limit / 1000:.0f} W of its {default / 1000:.0f} W: its "
            "clocks fall under load; `nvidia-smi -pl` sets the limit"
        )
    reasons = ask(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    slow = [meaning for bit, meaning in _SLOWDOWNS.items() if reasons & bit]
    if slow:
        notes.append(f"GPU {index} is slowed down now: {', '.join(slow)}")
    errors = ask(
        nvml,
        nvml.nvmlDeviceGetTotalEccErrors,
        handle,
        nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        nvml.NVML_VOLATILE_ECC,
    )
    if errors:
        notes.append(
            f"GPU {index} counted {errors} uncorrectable memory errors since the driver was "
            "loaded; see `nvidia-smi -q -d ECC`, and replace it if they return"
        )
    ecc = ask(nvml, nvml.nvmlDeviceGetEccMode, handle)
    if ecc and ecc[0] != ecc[1]:
        notes.append(f"GPU {index} turns ECC {'on' if ecc[1] else 'off'} at the next reboot")
    width = ask(nvml, nvml.nvmlDeviceGetCurrPcieLinkWidth, handle)
    most = ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkWidth, handle)
    if width and most and width < most:
        notes.append(
            f"GPU {index} has {width} of {most} PCIe lanes: check its seat, riser and slot"
        )
    return notes
