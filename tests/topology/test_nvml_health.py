"""Notes on limits and faults, from a binding that answers from a table."""

from types import SimpleNamespace
from typing import Any

from rankwright.topology.readers.nvml_health import health_notes


def notes(**answers: object) -> list[str]:
    """Return the notes on GPU 3 if the binding gives these answers, and none to the rest."""
    names = {
        "limit": "nvmlDeviceGetPowerManagementLimit",
        "default": "nvmlDeviceGetPowerManagementDefaultLimit",
        "reasons": "nvmlDeviceGetCurrentClocksThrottleReasons",
        "errors": "nvmlDeviceGetTotalEccErrors",
        "ecc": "nvmlDeviceGetEccMode",
        "width": "nvmlDeviceGetCurrPcieLinkWidth",
        "most": "nvmlDeviceGetMaxPcieLinkWidth",
    }
    binding = SimpleNamespace(NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1, NVML_VOLATILE_ECC=0)
    for name, function in names.items():
        setattr(binding, function, name)

    def ask(_nvml: Any, function: str, *_arguments: object) -> object:
        return answers.get(function)

    return health_notes(binding, ask, 3, "handle")


def test_a_sound_gpu_and_a_silent_driver_give_no_note() -> None:
    assert notes() == []
    sound = {"limit": 700_000, "default": 700_000, "reasons": 0x1 | 0x4, "errors": 0}
    assert notes(**sound, ecc=(1, 1), width=16, most=16) == []
    assert notes(limit=690_000, default=700_000) == []


def test_limits_and_faults_are_named_with_their_remedy() -> None:
    assert notes(limit=500_000, default=700_000)[0].startswith(
        "GPU 3 is limited to 500 W of its 700 W"
    )
    assert notes(reasons=0x48) == [
        "GPU 3 is slowed down now: hardware slowdown, too hot (hardware thermal slowdown)"
    ]
    assert "counted 2 uncorrectable memory errors" in notes(errors=2)[0]
    assert notes(ecc=(1, 0)) == ["GPU 3 turns ECC off at the next reboot"]
    assert notes(width=8, most=16) == [
        "GPU 3 has 8 of 16 PCIe lanes: check its seat, riser and slot"
    ]
