"""What is wrong with a GPU at this moment, as NVML tells it: slowdowns, memory errors."""

from collections.abc import Mapping
from typing import Any

# nvmlClocksEventReasons of nvml.h that a machine's owner can do something about.
_SLOWDOWNS = {
    0x08: "hardware slowdown",
    0x20: "too hot (software thermal slowdown)",
    0x40: "too hot (hardware thermal slowdown)",
    0x80: "power brake of the power supply",
}

_PROHIBITED = 2  # nvmlComputeMode_t


def health_notes(gpu: Mapping[str, Any]) -> list[str]:
    """Return a note on each fault of one GPU; what the driver does not tell is no note.

    Args:
        gpu: Its facts, of `nvml_facts.py`.
    """
    notes: list[str] = []
    index = gpu["index"]
    reasons = gpu["slowdowns"] or 0
    slow = [meaning for bit, meaning in _SLOWDOWNS.items() if reasons & bit]
    if slow:
        notes.append(f"GPU {index} is slowed down now: {', '.join(slow)}")
    if gpu["uncorrected"]:
        notes.append(
            f"GPU {index} counted {gpu['uncorrected']} uncorrectable memory errors since the "
            "driver was loaded; see `nvidia-smi -q -d ECC`, and replace it if they return"
        )
    if gpu["compute_mode"] == _PROHIBITED:
        notes.append(
            f"GPU {index} lets no process compute (compute mode Prohibited); `nvidia-smi -c 0` "
            "opens it"
        )
    ecc = gpu["ecc"]
    if ecc and ecc[0] != ecc[1]:
        notes.append(f"GPU {index} turns ECC {'on' if ecc[1] else 'off'} at the next reboot")
    return notes
